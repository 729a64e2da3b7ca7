"""The page that people read: one HTML file with everything inside, pictures included.

`render_report` lays out any list of blocks. `evaluation_blocks` says what an evaluation found, in
the order in which a reader should meet it: maps, then scores beside the noise control, then spread,
then caveats. It computes no score: all its numbers are means of rows of scores.csv and genes.csv.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from numpy.typing import NDArray

from histosge.plots import gene_map, score_distributions
from histosge.scores import NOISE, NOISE_LIMIT, Scores

CORRELATIONS = {
    "pearson_mean": "Pearson",
    "pearson_depth_adjusted": "depth-adjusted",
    "pearson_median": "median gene",
    "pearson_top50": "top 50",
    "spearman_mean": "Spearman",
    "n_nan_genes": "NaN genes",
}
"""Metric -> its column."""
ERRORS = {"mse": "MSE", "mae": "MAE", "r2": "R²"}
PAPER = {"paper_all_spots": "paper_all_spots (half of them trained on)"}
"""Exists for the random split only."""

HELD_OUT = {
    "block": "spatial blocks of every section: straight cuts at an angle drawn from the seed",
    "section": "one whole section at a time",
    "donor": "all sections of one donor at a time",
    "random": "a random half of every section's spots",
}


@dataclass(frozen=True)
class Picture:
    """A PNG with what it shows, for those who see it and those who do not.

    Parameters
    ----------
    png, alt, caption
        The picture, the same in words, and what stands under it.
    name
        Printed bold before the caption.
    """

    png: bytes
    alt: str
    caption: str
    name: str = ""

    @property
    def base64(self) -> str:
        """Return the PNG as text for a data URL."""
        return base64.b64encode(self.png).decode("ascii")


@dataclass(frozen=True)
class Table:
    """Text in rows; the first entry of a row names it.

    Parameters
    ----------
    header, rows
        All rows are as long as the header.
    caption
        What the numbers are.
    controls
        Names of rows that are controls, set apart from the rest.
    folded
        Show only the caption until the reader opens it.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    controls: frozenset[str] = frozenset()
    folded: bool = False


@dataclass(frozen=True)
class Block:
    """One part of a page, under its own title; all parts are optional.

    Parameters
    ----------
    title, text
        Headline and one paragraph.
    pictures, points, tables
        Shown in this order; points are a list of sentences.
    status, status_text
        ``good`` or ``bad`` and one sentence; a bad one is repeated at the top of the page, in red.
    """

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()
    status: str = ""
    status_text: str = ""


def render_report(title: str, blocks: Sequence[Block], *, subtitle: str = "", footer: str = "") -> str:
    """Lay out blocks as one self-contained HTML page, readable on light and dark screens.

    Everything is escaped; nothing is loaded from anywhere.
    """
    environment = Environment(
        loader=PackageLoader("histosge", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(title=title, blocks=list(blocks), subtitle=subtitle, footer=footer)


def evaluation_blocks(scores: Scores, notes: Sequence[str] = ()) -> list[Block]:
    """Return what an evaluation found: maps, scores, spread over genes, caveats.

    Parameters
    ----------
    scores
        From `histosge.scoring.evaluate_sections`.
    notes
        Further caveats, such as how many spots fell under the floor on counts.
    """
    return [_map_block(scores), _score_block(scores), _spread_block(scores), _caveat_block(scores, notes)]


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
        f"Correlation over {n_genes:.0f} genes, split {scores.split}, {_plural(len(scores.seeds), 'seed')}."
    )
    tables = [
        _preset_table(scores, columns, caption),
        _preset_table(
            scores, ERRORS, "Error of log1p(CP10k), and share of the variance within sections explained."
        ),
    ]
    if len({count.name for count in scores.folds}) > 1:
        tables.insert(1, _fold_table(scores))
    return Block("Scores on held-out spots", text, tables=tuple(tables), status=status, status_text=verdict)


def _preset_table(scores: Scores, columns: Mapping[str, str], caption: str) -> Table:
    rows = [
        (preset, *(_spread(scores.values(preset, metric), metric) for metric in columns))
        for preset in _by_score(scores)
    ]
    return Table(("preset", *columns.values()), tuple(rows), caption, frozenset({NOISE}))


def _fold_table(scores: Scores) -> Table:
    folds = tuple(dict.fromkeys(count.name for count in scores.folds))
    rows = [
        (preset, *(_spread(scores.values(preset, "pearson_mean", fold), "pearson_mean") for fold in folds))
        for preset in _by_score(scores)
    ]
    caption = "Pearson per fold, named by what is held out."
    if scores.split == "block":
        caption += " Blocks differ from seed to seed."
    return Table(("preset", *folds), tuple(rows), caption, frozenset({NOISE}))


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
        *scores.notes,
        *notes,
    ]
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
    digits = 1 if metric == "n_nan_genes" else 3
    mean = f"{values.mean():z.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {values.std(ddof=1):.{digits}f}"


def _plural(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
