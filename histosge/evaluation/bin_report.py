"""The part of an evaluation's page on bins finer than spots: what was measured, and how maps score beside which controls."""

from histosge.evaluation.bin_scores import bin_suffix
from histosge.evaluation.methods import DEPTH
from histosge.evaluation.results import NOISE, NOISE_LIMIT, BinFacts, Scores
from histosge.reporting.page import Block, Table

COLUMNS = {
    "pearson_mean": "Pearson",
    "pearson_depth_adjusted": "depth-adjusted",
    "pearson_within_spots": "within spots",
    "spearman_mean": "Spearman",
    "mse": "MSE",
}
"""Metric at bins, without their size -> column."""


def bin_block(scores: Scores) -> list[Block]:
    """Return nothing where no bins were scored."""
    facts = scores.bins
    if facts is None:
        return []
    rows = bin_rows(scores)
    title = f"Finer than a spot: bins of {facts.side_um:g} µm"
    if not rows:
        return [Block(title, "No fold holds out enough bins.", points=_points(facts))]
    at = bin_suffix(facts.side_um)
    shown = scores.default_preset
    n, counts, gene = (
        scores.mean(shown, f"{name}_{at}") for name in ("n_bins", "median_counts", "gene_counts")
    )
    text = (
        f"Maps of models that were trained on spots of up to {facts.spot_um:g} µm, averaged over the area of each measured"
        f" bin: {n:.0f} held-out bins a fold, with a median of {counts:.0f} counts each; of a gene {gene:.2g} counts a bin"
        " (mean, of the median gene). Bins with a count of a training spot are left out. Within spots: after the mean of"
        f" each square of {facts.spot_um:g} µm is taken from truth and prediction, which leaves what a map shows below the"
        " size of a spot. Few counts limit every score: true rates would correlate with these counts by about"
        f" {scores.mean(shown, f'attainable_{at}'):.2f} (estimate, depth-adjusted)."
    )
    table = Table(
        ("preset", *bin_header(scores)),
        tuple(rows),
        f"Held-out bins of {facts.side_um:g} µm, split {scores.split}: mean over genes, then over folds and seeds.",
        frozenset({*scores.controls, *scores.oracles, DEPTH}),
    )
    noise = scores.mean(NOISE, f"pearson_mean_{at}")
    verdict = f"Noise control at the bins: {noise:z.4f}"
    if abs(noise) <= NOISE_LIMIT:
        status, verdict = "good", f"{verdict}, within 0 ± {NOISE_LIMIT}."
    else:
        status, verdict = (
            "bad",
            f"{verdict}, outside 0 ± {NOISE_LIMIT}: there are too few bins, or information leaks.",
        )
    return [Block(title, text, tables=(table,), points=_points(facts), status=status, status_text=verdict)]


def bin_rows(scores: Scores) -> list[tuple[str, ...]]:
    """Return preset, its scores at bins as text and what it is, best first, controls last; empty without any."""
    if scores.bins is None:
        return []
    at = bin_suffix(scores.bins.side_um)
    names = dict.fromkeys((*scores.presets, DEPTH, *scores.controls))
    scored = [name for name in names if len(scores.values(name, f"pearson_mean_{at}"))]
    models = [name for name in scored if name in scores.presets and name not in scores.oracles]
    ranked = sorted(models, key=lambda name: -scores.mean(name, f"pearson_mean_{at}"))
    rows = []
    for name in [*ranked, *(name for name in scored if name not in models)]:
        cells = [_cell(scores, name, f"{metric}_{at}") for metric, _ in _columns(scores)]
        kind = (
            "oracle: knows the total counts"
            if scores.plain_name(name) == DEPTH
            else scores.kinds.get(name, "")
        )
        rows.append((name, *cells, "control" if name in scores.controls else kind or "model"))
    return rows


def bin_header(scores: Scores) -> tuple[str, ...]:
    """Return the headings of `bin_rows`, without the preset's."""
    return (*(heading for _, heading in _columns(scores)), "what it is")


def _columns(scores: Scores) -> list[tuple[str, str]]:
    """Return metrics and headings; within spots only where bins are finer than spots."""
    at = bin_suffix(scores.bins.side_um) if scores.bins else ""
    return [
        (metric, heading)
        for metric, heading in COLUMNS.items()
        if len(scores.values(scores.default_preset, f"{metric}_{at}"))
    ]


def _cell(scores: Scores, preset: str, metric: str) -> str:
    values = scores.values(preset, metric)
    if not len(values):
        return "-"
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():z.3f}{spread}"


def _points(facts: BinFacts) -> tuple[str, ...]:
    maps = [f"The maps have {each}." for each in facts.maps]
    return (*maps, *(f"{line.rstrip('.')}." for line in facts.describe()))
