"""Sentences on intervals, trust and training data: reports, viewer, exports and messages all take them from here."""

CONDITIONED = "The map is conditioned on spots of this slide, so it agrees with them by construction."
SCORES = "Scores on held-out spots are in the report of histosge evaluate."


def trained_on_sentence(trained_on: bool | None) -> str:
    """State whether the model of a map was trained on spots of the map's slide.

    Parameters
    ----------
    trained_on
        None where it was not recorded.
    """
    if trained_on is None:
        return "It is not recorded whether the model was trained on spots of this slide."
    if trained_on:
        return "The model was trained on spots of this slide, so its map is better here than on new tissue."
    return "The model was trained without spots of this slide."


def interval_name(level: float | None) -> str:
    """Name an interval with its level, such as ``90 % prediction interval``; without it where it is not recorded."""
    return "prediction interval" if level is None else f"{round(100 * level)} % prediction interval"


def half_width_text(half_widths: list[float]) -> str:
    """Write a gene's half widths: ``± 0.64``, or ``± 0.21 to ± 1.14`` where they differ by predicted library size."""
    low, high = (f"± {width:.2f}" for width in (min(half_widths), max(half_widths)))
    return low if low == high else f"{low} to {high}"


def trust_sentence(n_spots: int, scope: str) -> str:
    """State what trust is, and what it was measured on.

    Parameters
    ----------
    n_spots
        Held-out spots of the training sections.
    scope
        `histosge.calibration.conformal.Intervals.scope`.
    """
    return (
        "Trust is the lower 99 % confidence limit of a gene's Pearson correlation on held-out spots of the training"
        f" data ({n_spots} spots, {scope})."
    )
