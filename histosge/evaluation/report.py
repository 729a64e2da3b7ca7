"""What an evaluation found, as blocks of a page, in the order in which a reader should meet it.

Maps and plots first, then numbers, each with what it is beside it: held out or not, model, oracle or control;
then caveats. It computes no score: all its numbers are means of rows of scores.csv, genes.csv and
differences.csv.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.evaluation.map_plots import gene_map
from histosge.evaluation.results import MODEL, NOISE, NOISE_LIMIT, Scores
from histosge.evaluation.score_plots import (
    Defect,
    Difference,
    defect_plot,
    difference_plot,
    score_distributions,
)
from histosge.heldout.metric_registry import METRICS
from histosge.reporting.page import Block, Picture, Table

CORRELATIONS = {
    "pearson_mean": "Pearson",
    "pearson_depth_adjusted": "depth-adjusted",
    "pearson_median": "median gene",
    "pearson_top50": "top 50",
    "spearman_mean": "Spearman",
    "n_nan_genes": "NaN genes",
}
"""Metric -> its column in the first table; registered metrics that are not here stand in the second."""
PAPER = {"paper_all_spots": "paper_all_spots (half of them trained on)"}
"""Exists for the random split only."""
ABLATION = {
    "pearson_mean": "held out",
    "paper_all_spots": "paper_all_spots (trained on, too)",
    "as_reported": "as it would be reported",
    "pearson_mean_on_noise": "noise: held out",
    "paper_all_spots_on_noise": "noise: paper_all_spots",
}
DEFECTS = {
    "spots": "no defect; predicted at spots, as published",
    "file_order_groups": "attention sees 50 consecutive rows of the file, not neighbours",
    "integer_coordinates": "positions cut down to whole lattice steps",
    "bgr": "red and blue change places before a patch is encoded",
    "fixed_pixel_crop": "50 x 50 px around a patch's centre, whatever the scale, enlarged",
    "hvg_before_split": "genes chosen on all spots, held-out ones included",
    "all_spots_metric": "reports the figure over all spots, those trained on included",
    "all": "all of them",
}
CONTROL = "control: must be 0"

HELD_OUT = {
    "block": "spatial blocks of every section: straight cuts at an angle drawn from the seed",
    "section": "one whole section at a time",
    "donor": "all sections of one donor at a time",
    "random": "a random half of every section's spots",
}


def evaluation_blocks(scores: Scores, notes: Sequence[str] = ()) -> list[Block]:
    """Return what an evaluation found: maps, plots, scores, caveats.

    Parameters
    ----------
    scores
        From `histosge.evaluation.runner.evaluate_sections`.
    notes
        Further caveats, such as how many spots fell under the floor on counts.
    """
    ablation = [_ablation_block(scores)] if _variants(scores) else []
    plots = [_map_block(scores), _spread_block(scores), *_difference_block(scores), *ablation]
    return [*plots, _score_block(scores), _caveat_block(scores, notes)]


def _map_block(scores: Scores) -> Block:
    if not scores.maps:
        return Block("Maps", "No gene was chosen in every fold of the section shown, so there is no map.")
    first = scores.maps[0]
    pictures = tuple(
        Picture(
            gene_map(shown),
            f"Maps of {shown.gene}: H&E, measured spots and prediction for every patch of {shown.slide_id}",
            f"{shown.role} gene of {scores.default_preset}: held-out r = {shown.pearson:.3f}",
            shown.gene,
        )
        for shown in scores.maps
    )
    text = (
        f"The best, the median and the worst gene of {scores.default_preset} by held-out Pearson on section"
        f" {first.slide_id}, seed {scores.seeds[0]}. Measured and predicted share one colour scale. Each patch"
        " is predicted by the model that holds out the nearest held-out spot."
    )
    if scores.split == "random":
        text += " The other half of the spots, between those shown, was trained on."
    return Block("Maps: best, median and worst gene", text, pictures)


def _score_block(scores: Scores) -> Block:
    noise = scores.mean(NOISE, "pearson_mean")
    draws = len(scores.values(NOISE, "pearson_mean"))
    verdict = f"Noise control: {noise:.4f}, mean over {draws} draws of random embeddings"
    if scores.noise_is_zero:
        status, verdict = "good", f"{verdict}; within 0 ± {NOISE_LIMIT}, as it must be."
    else:
        status = "bad"
        verdict = f"{verdict}; beyond 0 ± {NOISE_LIMIT}: the held-out spots are too few, or something leaks."
        verdict += " Differences of this size between presets mean nothing."
    shown, n_genes = scores.default_preset, scores.mean(scores.default_preset, "n_genes")
    pearson = _spread(scores.values(shown, "pearson_mean"), "pearson_mean")
    text = (
        f"{shown} predicts held-out spots with a Pearson of {pearson}, the mean over {n_genes:.0f} genes."
        " All entries are means over folds, then mean ± standard deviation over seeds (noise: over draws)."
        " Depth-adjusted: log library size and its square are regressed out of truth and prediction first,"
        " so what remains is composition, not depth."
    )
    columns = CORRELATIONS | (PAPER if scores.split == "random" else {})
    caption = (
        f"Held-out spots: correlation over {n_genes:.0f} genes, split {scores.split},"
        f" {_plural(len(scores.seeds), 'seed')}."
    )
    tables = [
        _preset_table(scores, columns, caption, kinds=True),
        _preset_table(
            scores,
            _further_metrics(),
            "Held-out spots: error of log1p(CP10k), share of the variance within sections explained, structural"
            " similarity of the map, and spatial autocorrelation (Moran's I; a map that is smoother than the measured"
            " one is above it).",
        ),
    ]
    if len({count.name for count in scores.folds}) > 1:
        tables.insert(1, _fold_table(scores))
    return Block("Scores on held-out spots", text, tables=tuple(tables), status=status, status_text=verdict)


def _further_metrics() -> dict[str, str]:
    return {m.summary_name: m.heading for m in METRICS.records() if m.summary_name not in CORRELATIONS}


def _preset_table(scores: Scores, columns: Mapping[str, str], caption: str, *, kinds: bool = False) -> Table:
    rows = [
        (
            preset,
            *(_spread(scores.values(preset, metric), metric) for metric in columns),
            *([CONTROL if preset == NOISE else scores.kinds.get(preset, MODEL)] if kinds else []),
        )
        for preset in _by_score(scores)
    ]
    header = ("preset", *columns.values(), *(["what it is"] if kinds else []))
    return Table(header, tuple(rows), caption, frozenset({NOISE, *scores.oracles}))


def _variants(scores: Scores) -> list[str]:
    """Return the variants of the published code, in the order asked for."""
    return [name for name in scores.presets if len(scores.values(name, "as_reported"))]


def _ablation_block(scores: Scores) -> Block:
    names = _variants(scores)
    rows = [(name, *(_spread(scores.values(name, metric), metric) for metric in ABLATION)) for name in names]
    table = Table(
        ("published code", *ABLATION.values()),
        tuple(rows),
        f"Held out by {scores.split}. paper_all_spots is no held-out figure. Noise: the same on random embeddings,"
        f" {_plural(len(scores.seeds), 'draw')}.",
    )
    metrics = ("pearson_mean", "paper_all_spots", "pearson_mean_on_noise", "paper_all_spots_on_noise")
    defects = [Defect(name, *(_mean(scores, name, metric) for metric in metrics)) for name in names]
    picture = Picture(
        defect_plot(defects),
        "Held-out Pearson of the published code with each defect, beside the figure that counts training spots",
        "Filled: the sections' embeddings. Hollow: random embeddings, on which nothing can be learned but where a"
        " spot lies.",
    )
    on_noise = _mean(scores, names[0], "paper_all_spots_on_noise")
    reach = "" if np.isnan(on_noise) else f": random embeddings reach {on_noise:.2f} on it"
    text = (
        "The published network with none of the released code's defects, with each alone, and with all. The figure"
        f" that the code reports, paper_all_spots, counts the spots that it was trained on{reach}."
    )
    parts = dict.fromkeys(part for name in names for part in name.split("+")[1:])
    points = tuple(f"{part}: {DEFECTS[part]}." for part in parts if part in DEFECTS)
    return Block("What the published code's defects do", text, (picture,), (table,), points)


def _difference_block(scores: Scores) -> list[Block]:
    """Return nothing where there is nothing to compare."""
    rows = [] if scores.differences is None else scores.differences.rows(named=True)
    if not rows:
        return []
    base = "paper+spots" if "paper+spots" in scores.presets else scores.default_preset
    differences, cells = [], []
    for row in rows:
        sign = 1 if row["preset_a"] == base else -1
        if base not in (row["preset_a"], row["preset_b"]):
            continue
        other = row["preset_b"] if sign == 1 else row["preset_a"]
        low, high = sorted((sign * row["low"], sign * row["high"]))
        gap = Difference(f"{base} - {other}", sign * row["difference"], low, high)
        if row["metric"] == "pearson_mean":
            differences.append(gap)
        cells.append((gap.name, _TITLES[row["metric"]], f"{gap.value:+.3f}", f"{low:+.3f} to {high:+.3f}"))
    about = f"Paired bootstrap over genes and held-out spots, {rows[0]['draws']} draws, {rows[0]['confidence']:.0%} interval"
    picture = Picture(
        difference_plot(differences, f"difference in held-out Pearson, {rows[0]['confidence']:.0%} interval"),
        f"Differences of {base} from every other preset with their intervals",
        "Grey: the interval holds 0, so the data cannot tell the two apart.",
    )
    text = (
        f"{about}: both presets are scored on the same resampled spots and genes. What another section, or another"
        " donor, would change is not in it."
    )
    table = Table(("difference", "metric", "value", "interval"), tuple(cells), f"{about}.", folded=True)
    return [Block("Which differences are real", text, (picture,), (table,))]


_TITLES = {"pearson_mean": "Pearson", "pearson_depth_adjusted": "depth-adjusted"}


def _mean(scores: Scores, preset: str, metric: str) -> float:
    values = scores.values(preset, metric)
    return float(values.mean()) if len(values) else np.nan


def _fold_table(scores: Scores) -> Table:
    folds = tuple(dict.fromkeys(count.name for count in scores.folds))
    rows = [
        (preset, *(_spread(scores.values(preset, "pearson_mean", fold), "pearson_mean") for fold in folds))
        for preset in _by_score(scores)
    ]
    caption = "Pearson per fold, named by what is held out."
    if scores.split == "block":
        caption += " Blocks differ from seed to seed."
    return Table(("preset", *folds), tuple(rows), caption, frozenset({NOISE, *scores.oracles}))


def _spread_block(scores: Scores) -> Block:
    per_gene = scores.genes.group_by("preset", "gene").agg(pl.col("pearson").mean()).sort("gene")
    values = {
        preset: per_gene.filter(pl.col("preset") == preset)["pearson"].to_numpy()
        for preset in _by_score(scores)
    }
    picture = Picture(
        score_distributions(values),
        "Box plots of the held-out Pearson of every gene, one row per preset",
        "One dot per gene: its mean over folds and seeds.",
    )
    return Block("Spread over genes", pictures=(picture,))


def _caveat_block(scores: Scores, notes: Sequence[str]) -> Block:
    counts = scores.folds
    dropped = sum(count.n_dropped for count in counts)
    undefined = scores.mean(scores.default_preset, "n_nan_genes")
    points = [
        f"Split {scores.split}: held out are {HELD_OUT[scores.split]}.",
        f"Genes: {scores.gene_rule}.",
        f"NaN genes: {undefined:.1f} a fold, constant in truth or in {scores.default_preset}; they count as 0.",
        "Top 50: the 50 genes that vary most over the training spots; no held-out spot had a say.",
        "Correlations are taken within sections, so a difference between sections earns nothing.",
        *scores.left_out,
        *scores.notes,
        *notes,
    ]
    if scores.oracles:
        points.append(
            "depth is an oracle: it is told each held-out spot's total counts, which no picture gives. A model near it"
            " may know no more than how much there is of everything; read the depth-adjusted column."
        )
    if scores.split == "block":
        points.insert(
            1,
            f"Buffer: training spots nearer than {scores.buffer_um:.0f} µm to a held-out spot were dropped"
            f" ({dropped} of {sum(c.n_train + c.n_test + c.n_dropped for c in counts)} over all folds).",
        )
    if scores.split == "random":
        points.append(
            "paper_all_spots is the published code's figure: half of its spots were trained on, and NaN genes"
            " are left out. A model that memorises scores high; compare it with the paper, do not believe it."
        )
    table = Table(
        ("fold", "seed", "training spots", "held-out spots", "dropped"),
        tuple((c.name, *(str(n) for n in (c.seed, c.n_train, c.n_test, c.n_dropped))) for c in counts),
        "What each fold trained on and held out",
        folded=True,
    )
    return Block("What to keep in mind", tables=(table,), points=tuple(points))


def _by_score(scores: Scores) -> list[str]:
    """Return the presets, best first, and the control last."""
    return [*sorted(scores.presets, key=lambda name: -scores.mean(name, "pearson_mean")), NOISE]


def _spread(values: NDArray[np.float64], metric: str) -> str:
    if not len(values):
        return "-"
    digits = 1 if metric == "n_nan_genes" else 3
    mean = f"{values.mean():z.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
