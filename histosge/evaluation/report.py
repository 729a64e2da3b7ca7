"""The page of an evaluation: maps and plots first, then tables of scores, then limitations.

Every figure is labelled as held out or not, and every preset as model, baseline, oracle or control. The page computes
no score: all its numbers are means of rows of scores.csv, genes.csv and differences.csv.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.wording import counted
from histosge.evaluation.bin_report import bin_block
from histosge.evaluation.map_plots import gene_map
from histosge.evaluation.results import CONTROLS, MODEL, NOISE, NOISE_LIMIT, SMOOTH_NOISE, GeneMap, Scores
from histosge.evaluation.score_plots import (
    Defect,
    Difference,
    defect_plot,
    difference_plot,
    score_distributions,
)
from histosge.heldout.metric_registry import METRICS
from histosge.heldout.splits import INTERLEAVED, WITHIN_SECTION
from histosge.reporting.page import Block, Picture, Table
from histosge.reporting.plots import to_svg

CORRELATIONS = {
    "pearson_mean": "Pearson",
    "pearson_depth_adjusted": "depth-adjusted",
    "pearson_median": "median gene",
    "pearson_top50": "top 50",
    "spearman_mean": "Spearman",
    "n_nan_genes": "NaN genes",
}
"""Metric -> its column in the first table; registered metrics that are not here stand in the second."""
PAPER = {"paper_all_spots": "paper_all_spots (half are training spots)"}
"""Exists for the random split only."""
ABLATION = {
    "pearson_mean": "held out",
    "paper_all_spots": "paper_all_spots (includes training spots)",
    "as_reported": "as the variant reports it",
    "pearson_mean_on_noise": "noise: held out",
    "paper_all_spots_on_noise": "noise: paper_all_spots",
}
DEFECTS = {
    "spots": "no defect; predicted at spots, as published",
    "file_order_groups": "attention groups are 50 consecutive rows of the file instead of neighbouring spots",
    "integer_coordinates": "positions are truncated to whole lattice steps",
    "bgr": "red and blue channels are swapped before a patch is encoded",
    "fixed_pixel_crop": "a crop of 50 x 50 px around the patch's centre at any scale, then enlarged",
    "hvg_before_split": "genes are chosen on all spots, including held-out ones",
    "all_spots_metric": "the reported score is over all spots, including training spots",
    "all": "all of these defects",
}
CONTROL_KINDS = {NOISE: "control: must be 0", SMOOTH_NOISE: "control: smooth in space, blind to the picture"}

HELD_OUT = {
    "block": "each fold holds out one spatial block of every section; blocks are cut along straight lines, at an angle "
    "drawn from the seed",
    "section": "each fold holds out one whole section",
    "donor": "each fold holds out all sections of one donor",
    "random": "a random half of every section's spots is held out",
    "checkerboard": "each fold holds out every second spot of every section's lattice (the published generation task)",
}
"""Split -> what it holds out."""


def evaluation_blocks(scores: Scores, notes: Sequence[str] = ()) -> list[Block]:
    """Return the blocks of the page: maps, plots, scores, limitations.

    Parameters
    ----------
    scores
        From `histosge.evaluation.runner.evaluate_sections`.
    notes
        Further limitations, such as how many spots had too few counts.
    """
    ablation = [_ablation_block(scores)] if _variants(scores) else []
    # Maps first: whoever reads on to the tables has seen what a correlation of 0.3 looks like.
    plots = [_map_block(scores), _spread_block(scores), *_difference_block(scores), *ablation]
    tables = [_score_block(scores), *bin_block(scores), *_domain_block(scores)]
    return [*plots, *tables, _limitation_block(scores, notes)]


def _map_block(scores: Scores) -> Block:
    if not scores.maps:
        return Block("Maps", "No gene was chosen in every fold of the section shown, so there is no map.")
    first = scores.maps[0]
    pictures = tuple(
        _map_picture(shown, number, f"{shown.role} gene of {scores.default_preset}")
        for number, shown in enumerate(scores.maps)
    )
    text = (
        f"The best, the median and the worst gene of {scores.default_preset} by held-out Pearson on section"
        f" {first.slide_id}, seed {scores.seeds[0]}. Measured and predicted share one colour scale. Each patch"
        " is predicted by the model that holds out the nearest held-out spot."
    )
    if scores.section_maps:
        text += " Every gene, below, has the maps of all sections."
    if scores.split in INTERLEAVED:
        text += " The spots between those shown are training spots."
    return Block("Maps: best, median and worst gene", text, pictures)


def _map_picture(shown: GeneMap, number: int, label: str) -> Picture:
    return Picture(
        to_svg(gene_map(shown)),
        f"Maps of {shown.gene}: H&E, measured spots and prediction for every patch of {shown.slide_id}",
        f"{label}: held-out r = {shown.pearson:.3f}",
        shown.gene,
        f"map{number}",
    )


def _score_block(scores: Scores) -> Block:
    # The control stands above the scores: if it is off, none of them can be read.
    noise = scores.noise_means()
    draws = len(scores.values(NOISE, "pearson_mean"))
    found = ", ".join(f"{mean:.4f}{f' ({name})' if len(noise) > 1 else ''}" for name, mean in noise.items())
    verdict = f"Noise control: {found}, mean over {counted(draws, 'draw')} of random embeddings"
    if scores.noise_is_zero:
        status, verdict = "good", f"{verdict}; within 0 ± {NOISE_LIMIT}, as expected without leakage."
    else:
        status = "bad"
        verdict = (
            f"{verdict}; outside 0 ± {NOISE_LIMIT}: there are too few held-out spots, or information leaks."
        )
        verdict += " Differences of this size between presets are not meaningful."
    verdict += _smooth_verdict(scores)
    shown, n_genes = scores.default_preset, scores.mean(scores.default_preset, "n_genes")
    pearson = _spread(scores.values(shown, "pearson_mean"), "pearson_mean")
    text = (
        f"{shown} predicts held-out spots with a Pearson of {pearson}, the mean over {counted(int(n_genes), 'gene')}."
        " All entries are means over folds, then mean ± standard deviation over seeds (controls: over draws)."
        " Depth-adjusted: log library size and its square are regressed out of truth and prediction first,"
        " so the score is about composition, not depth."
    )
    # Only of the random split: elsewhere no half of every section was trained on, and the figure has no meaning.
    columns = CORRELATIONS | (PAPER if scores.split == "random" else {})
    caption = (
        f"Held-out spots: correlation over {counted(int(n_genes), 'gene')}, split {scores.split},"
        f" {counted(len(scores.seeds), 'seed')}."
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
    # With one fold its table would repeat the first.
    if len({count.name for count in scores.folds}) > 1:
        tables.insert(1, _fold_table(scores))
    return Block("Scores on held-out spots", text, tables=tuple(tables), status=status, status_text=verdict)


def _smooth_verdict(scores: Scores) -> str:
    """State what embeddings score that are smooth in space and random, and how many genes would be trusted with them."""
    if SMOOTH_NOISE not in scores.controls:
        return ""
    draws = len(scores.values(SMOOTH_NOISE, "pearson_mean"))
    text = (
        f" Smooth-noise control: {scores.mean(SMOOTH_NOISE, 'pearson_mean'):z.4f}, mean over {counted(draws, 'draw')} of"
        " random embeddings that are smooth in space."
    )
    if scores.split in WITHIN_SECTION:
        text += " Tissue near the held-out spots was trained on, so smoothness alone may score; a model must score more."
    trusted = scores.values(SMOOTH_NOISE, "trusted_share")
    return f"{text} With them {trusted.mean():.1%} of the genes would be trusted." if len(trusted) else text


def _domain_block(scores: Scores) -> list[Block]:
    """Return how well domains agree with an annotation, where one was given."""
    means = scores.domain_means()
    if not means:
        return []
    table = Table(
        ("domains from", "ARI", "NMI"),
        tuple((name, f"{ari:z.3f} ± {sd:.3f}", f"{nmi:z.3f}") for name, ari, sd, nmi in means),
        "Agreement with the annotation, mean over sections and seeds of k-means (±: standard deviation over these seeds)",
    )
    text = (
        "ARI is 0 by chance and 1 for equal partitions. Predictions are of held-out spots. No seed is selected and no label"
        " is used to find domains; every value is in domains.csv."
    )
    return [Block("Domains against the annotation", text, tables=(table,))]


def _further_metrics() -> dict[str, str]:
    return {m.summary_name: m.heading for m in METRICS.records() if m.summary_name not in CORRELATIONS}


def _preset_table(scores: Scores, columns: Mapping[str, str], caption: str, *, kinds: bool = False) -> Table:
    rows = [
        (
            preset,
            *(_spread(scores.values(preset, metric), metric) for metric in columns),
            *([CONTROL_KINDS.get(preset) or scores.kinds.get(preset, MODEL)] if kinds else []),
        )
        for preset in _by_score(scores)
    ]
    header = ("preset", *columns.values(), *(["what it is"] if kinds else []))
    return Table(header, tuple(rows), caption, frozenset({*CONTROLS, *scores.oracles}))


def _variants(scores: Scores) -> list[str]:
    """Return the variants of the published code, in the order asked for."""
    # By what was measured, not by name: only ablations report a figure of their own.
    return [name for name in scores.presets if len(scores.values(name, "as_reported"))]


def _ablation_block(scores: Scores) -> Block:
    names = _variants(scores)
    rows = [(name, *(_spread(scores.values(name, metric), metric) for metric in ABLATION)) for name in names]
    table = Table(
        ("published code", *ABLATION.values()),
        tuple(rows),
        f"Held out by {scores.split}. paper_all_spots is no held-out figure. Noise: the same on random embeddings,"
        f" {counted(len(scores.seeds), 'draw')}.",
    )
    metrics = ("pearson_mean", "paper_all_spots", "pearson_mean_on_noise", "paper_all_spots_on_noise")
    defects = [Defect(name, *(_mean(scores, name, metric) for metric in metrics)) for name in names]
    picture = Picture(
        to_svg(defect_plot(defects)),
        "Held-out Pearson of the published code with each defect, beside the score that includes training spots",
        "Filled: the sections' embeddings. Hollow: random embeddings, which carry no information but the positions of"
        " spots.",
    )
    on_noise = _mean(scores, names[0], "paper_all_spots_on_noise")
    reach = "" if np.isnan(on_noise) else f"; random embeddings reach {on_noise:.2f} by it"
    text = (
        "The published network with none of the released code's defects, with each alone, and with all. The score"
        f" that the code reports, paper_all_spots, includes training spots{reach}."
    )
    parts = dict.fromkeys(part for name in names for part in scores.plain_name(name).split("+")[1:])
    points = tuple(f"{part}: {DEFECTS[part]}." for part in parts if part in DEFECTS)
    return Block("What the published code's defects do", text, (picture,), (table,), points)


def _difference_block(scores: Scores) -> list[Block]:
    """Return nothing where there is nothing to compare."""
    rows = [] if scores.differences is None else scores.differences.rows(named=True)
    if not rows:
        return []
    # In an ablation, against the variant without a defect: that is what each switch changes.
    base = next((p for p in scores.presets if scores.plain_name(p) == "paper+spots"), scores.default_preset)
    differences, cells = [], []
    for row in rows:
        pair = [_entry_name(scores, row, side) for side in "ab"]
        if base not in pair:
            continue
        sign = 1 if pair[0] == base else -1
        other = pair[1] if sign == 1 else pair[0]
        # Turning a difference round swaps the ends of its interval.
        low, high = sorted((sign * row["low"], sign * row["high"]))
        gap = Difference(f"{base} - {other}", sign * row["difference"], low, high)
        if row["metric"] == "pearson_mean":
            differences.append(gap)
        cells.append((gap.name, _TITLES[row["metric"]], f"{gap.value:+.3f}", f"{low:+.3f} to {high:+.3f}"))
    about = f"Paired bootstrap over genes and held-out spots, {rows[0]['draws']} draws, {rows[0]['confidence']:.0%} interval"
    picture = Picture(
        to_svg(
            difference_plot(
                differences, f"difference in held-out Pearson, {rows[0]['confidence']:.0%} interval"
            )
        ),
        f"Differences of {base} from every other preset with their intervals",
        "Grey: the interval includes 0, so the difference is not significant.",
    )
    text = (
        f"{about}: both presets are scored on the same resampled spots and genes. The interval does not include the"
        " variation between sections or donors."
    )
    table = Table(("difference", "metric", "value", "interval"), tuple(cells), f"{about}.", folded=True)
    return [Block("Differences between presets", text, (picture,), (table,))]


def _entry_name(scores: Scores, row: Mapping[str, object], side: str) -> str:
    """Return the name in `Scores.presets` of one side of a difference."""
    preset = str(row[f"preset_{side}"])
    return f"{preset} on {row[f'encoder_{side}']}" if scores.entries else preset


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
    return Table(("preset", *folds), tuple(rows), caption, frozenset({*CONTROLS, *scores.oracles}))


def _spread_block(scores: Scores) -> Block:
    # Means over folds and seeds first: one dot a gene, else seeds would pass for more genes.
    values = {
        preset: scores.rows_of(scores.genes, preset)
        .group_by("gene")
        .agg(pl.col("pearson").mean())
        .sort("gene")["pearson"]
        .to_numpy()
        for preset in _by_score(scores)
    }
    picture = Picture(
        to_svg(score_distributions(values)),
        "Box plots of the held-out Pearson of every gene, one row per preset",
        "One dot per gene: its mean over folds and seeds.",
    )
    return Block("Spread over genes", pictures=(picture,))


def _limitation_block(scores: Scores, notes: Sequence[str]) -> Block:
    counts = scores.folds
    dropped = sum(count.n_dropped for count in counts)
    undefined = scores.mean(scores.default_preset, "n_nan_genes")
    points = [
        f"Split {scores.split}: {HELD_OUT[scores.split]}.",
        f"Genes: {scores.gene_rule}.",
        f"NaN genes: {undefined:.1f} per fold are constant in truth or in {scores.default_preset}; they count as 0.",
        "Top 50: the 50 genes that vary most over the training spots; held-out spots are not used to choose them.",
        "Correlations are computed within sections, so differences between sections do not raise them.",
        *scores.left_out,
        *scores.notes,
        *notes,
    ]
    if scores.oracles:
        points.append(
            "depth is an oracle: it uses the total counts of each held-out spot, which no image shows. A model with a"
            " similar score may predict little more than total counts; compare the depth-adjusted column."
        )
    if scores.split == "block":
        points.insert(
            1,
            f"Buffer: training spots nearer than {scores.buffer_um:.0f} µm to a held-out spot were dropped"
            f" ({dropped} of {sum(c.n_train + c.n_test + c.n_dropped for c in counts)} over all folds).",
        )
    if scores.split == "random":
        points.append(
            "paper_all_spots is the published code's score: half of its spots are training spots, and NaN genes are"
            " left out. A model that memorises scores high; use it only to compare with the publication."
        )
    table = Table(
        ("fold", "seed", "training spots", "held-out spots", "dropped"),
        tuple((c.name, *(str(n) for n in (c.seed, c.n_train, c.n_test, c.n_dropped))) for c in counts),
        "Training and held-out spots of each fold",
        folded=True,
    )
    return Block("Limitations", tables=(table,), points=tuple(points))


def _by_score(scores: Scores) -> list[str]:
    """Return the presets, best first, and the controls last."""
    # Controls last, whatever they score: they are no competitors.
    return [*sorted(scores.presets, key=lambda name: -scores.mean(name, "pearson_mean")), *scores.controls]


def _spread(values: NDArray[np.float64], metric: str) -> str:
    if not len(values):
        return "-"
    digits = 1 if metric == "n_nan_genes" else 3
    # z: a mean of -0.0001 is shown as 0.000, without a sign.
    mean = f"{values.mean():z.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"
