"""Sentences on intervals, trust and training data: reports, viewer, exports and messages all take them from here."""

from collections.abc import Mapping, Sequence

from featurestore.wording import counted
from histosge.calibration.widths import CROSS_CONFORMAL, DONOR_WEIGHTED, least_donors

CONDITIONED = "The map is conditioned on spots of this slide, so it agrees with them by construction."
SCORES = "Scores on held-out spots are in the report of histosge evaluate."
_SHOWN_DONORS = 12


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


def interval_name(level: float | None, claim: str = "") -> str:
    """Name an interval with its level, such as ``90 % prediction interval``; without it where it is not recorded.

    Parameters
    ----------
    claim
        For whom it holds, see `claim_text`; empty where that is not known.
    """
    name = "prediction interval" if level is None else f"{round(100 * level)} % prediction interval"
    return f"{name} ({claim})" if claim else name


def claim_text(method: str, donors: Sequence[str]) -> str:
    """State for whom intervals and trust hold, in a few words.

    Parameters
    ----------
    method
        Of the half widths, see `histosge.calibration.widths`; empty for models of earlier versions.
    donors
        Of the training sections; empty where they are not known.
    """
    if not method:
        return "donors not considered"
    if method == CROSS_CONFORMAL:
        return _within(donors)
    return (
        f"empirical, {counted(len(donors), 'donor')}"
        if method == DONOR_WEIGHTED
        else counted(len(donors), "donor")
    )


def scope_text(held_out: str, method: str, donors: Sequence[str]) -> str:
    """State what was held out, and for whom what was measured on it holds; parameters as of `claim_text`.

    Parameters
    ----------
    held_out
        ``donor``, ``section`` or ``block``.
    """
    if held_out == "donor":
        return f"held-out donors, {claim_text(method, donors)}"
    tissue = "held-out sections" if held_out == "section" else "held-out blocks of one section"
    if not method:
        return f"{tissue}; measured by an earlier version, which took spots as independent and ignored donors"
    return f"{tissue}, {_within(donors)}"


def method_sentence(method: str, level: float, donor_coverage: Mapping[str, float]) -> str:
    """State how half widths were measured and what follows from it; parameters as of `claim_text`.

    Parameters
    ----------
    donor_coverage
        Donor -> share of its spots that widths measured on the other donors cover.
    """
    percent = f"{round(100 * level)} %"
    if not method:
        return ""
    if method == CROSS_CONFORMAL:
        return (
            f"Intervals: cross-conformal, pooled over folds. They cover {percent} of the held-out spots; this is measured, "
            "not guaranteed, and nothing follows for another donor."
        )
    found = ", ".join(
        f"{_one_line(donor)} {share:.0%}" for donor, share in list(donor_coverage.items())[:_SHOWN_DONORS]
    )
    found += ", ..." if len(donor_coverage) > _SHOWN_DONORS else ""
    covered = f" Coverage of each donor by widths from the others: {found}." if found else ""
    if method == DONOR_WEIGHTED:
        return (
            f"Intervals: donor-weighted quantiles of the errors on donors left out. With fewer than {least_donors(level)} "
            f"donors this is empirical: {percent} is not promised for another donor.{covered}"
        )
    return (
        "Intervals: hierarchical conformal, the quantile within each donor and then over donors. In at least "
        f"{percent} of new donors like these, at least {percent} of the spots are covered, as far as leaving donors out of "
        f"a fit changes it little.{covered}"
    )


def distance_sentence(distance: float, among_sections: float | None) -> str:
    """State how far a slide's embeddings lie from those of training, which nothing else is known of.

    Parameters
    ----------
    distance
        `histosge.calibration.embedding_distance.EmbeddingReference.distance`.
    among_sections
        The largest such distance of a training section from the others; None for a lone section.
    """
    if among_sections is None:
        compared = "how far two sections of the training data would lie apart is not known from one"
    else:
        compared = f"the training sections lie up to {among_sections:.2f} from each other"
    far = (
        " It lies further out than they do: intervals may be too narrow here, and trusted genes may fail."
        if among_sections is not None and distance > among_sections
        else ""
    )
    lies = (
        f"The slide's embeddings lie {distance:.2f} standard deviations from those of the training sections"
    )
    return f"{lies}; {compared}.{far}"


def _within(donors: Sequence[str]) -> str:
    if len(donors) == 1:
        return f"within donor {_one_line(donors[0])} only"
    return "within the training data's donors only (donors not named)"


def _one_line(name: str) -> str:
    # A model folder may come from elsewhere: what it names is shown, and must stay one short line.
    return "".join(letter for letter in " ".join(name.split()) if letter.isprintable())[:60]


def adapted_sentence(n_new: int) -> str:
    """State on which sections intervals and trust of an adapted model were measured.

    Parameters
    ----------
    n_new
        Sections that the earlier model was adapted to.
    """
    if n_new == 1:
        return (
            "Intervals and trust were measured on blocks of the one section that the model was adapted to, each predicted "
            "by the earlier model adapted to the rest of it; nothing is claimed for the earlier sections."
        )
    return (
        f"Intervals and trust were measured on the {n_new} sections that the model was adapted to, each predicted by the "
        "earlier model adapted to others of them; nothing is claimed for the earlier sections."
    )


def half_width_text(half_widths: list[float]) -> str:
    """Write a gene's half widths: ``± 0.64``, or ``± 0.21 to ± 1.14`` where they differ by predicted library size."""
    low, high = (f"± {width:.2f}" for width in (min(half_widths), max(half_widths)))
    return low if low == high else f"{low} to {high}"


def trust_sentence(n_spots: int, scope: str, *, by_effective_spots: bool = True) -> str:
    """State what trust is, and what it was measured on.

    Parameters
    ----------
    n_spots
        Held-out spots of the training sections.
    scope
        `histosge.calibration.conformal.Intervals.scope`.
    by_effective_spots
        False for models of earlier versions.
    """
    text = (
        "Trust is the lower 99 % confidence limit of a gene's Pearson correlation on held-out spots of the training"
        f" data ({n_spots} spots, {scope})."
    )
    if by_effective_spots:
        return f"{text} Neighbouring spots repeat each other, so the limit counts effective spots, fewer than there are."
    return (
        f"{text} It takes spots as independent, so genes that are only smooth in space may pass; train again."
    )
