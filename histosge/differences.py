"""By how much one preset beats another, and how sure that is: paired bootstrap over genes and spots.

Presets are compared on the same folds, spots and genes, so what is hard for all of them cancels. A draw
gives every spot and every gene a Poisson(1) weight that is the same for all presets, folds and seeds.

Terms
    over    what is drawn anew: ``genes``, ``spots``, or ``both``
    draw 0  all weights are 1: the estimate itself
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.metrics import Floats, correlate, within_sections

DRAWS = 200
LEVEL = 0.95
OVER = ("genes", "spots", "both")
METRICS = ("pearson_mean", "pearson_depth_adjusted")
SCHEMA = {
    "preset": pl.String,
    "minus": pl.String,
    "split": pl.String,
    "metric": pl.String,
    "over": pl.String,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
}


@dataclass(frozen=True)
class Scored:
    """One preset's prediction of one fold's held-out spots.

    Parameters
    ----------
    genes
        Names of the columns.
    truth, predicted
        log1p(CP10k), ``(n_spots, n_genes)``.
    depth
        Total counts, ``(n_spots,)``.
    section, spot
        Label of each spot's section, and its place there, ``(n_spots,)`` each.
    """

    genes: tuple[str, ...]
    truth: NDArray[np.floating]
    predicted: NDArray[np.floating]
    depth: NDArray[np.float64]
    section: NDArray[np.str_]
    spot: NDArray[np.int64]


@dataclass
class Bootstrap:
    """Collects what every preset scores under every draw.

    Parameters
    ----------
    sizes
        Section -> number of its spots.
    draws
        Besides draw 0.
    """

    sizes: Mapping[str, int]
    draws: int = DRAWS
    _genes: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _found: dict[tuple[str, str, str], list[Floats]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        self._rng = np.random.default_rng(0)
        self._spots = {name: self._weights(n) for name, n in self.sizes.items()}

    def add(self, preset: str, scored: Scored) -> None:
        """Score one fold's prediction under every draw."""
        genes = self._gene_weights(scored.genes)
        for metric in METRICS:
            depth = np.log(scored.depth) if metric == "pearson_depth_adjusted" else None
            r = self._correlations(scored, depth)
            mean = genes.sum(axis=1)
            self._found[preset, metric, "genes"].append(genes @ r[0] / mean)
            self._found[preset, metric, "spots"].append(r.mean(axis=1))
            self._found[preset, metric, "both"].append((genes * r).sum(axis=1) / mean)

    def table(self, presets: Sequence[str], split: str) -> pl.DataFrame:
        """Return one row per pair of presets, metric and way of drawing; a later preset minus an earlier one."""
        rows = []
        tail = 100 * (1 - LEVEL) / 2
        for first, second in combinations(presets, 2):
            for metric in METRICS:
                for over in OVER:
                    a, b = (
                        np.stack(self._found[name, metric, over]).mean(axis=0, dtype=np.float64)
                        for name in (second, first)
                    )
                    gain: Floats = np.asarray(a - b)
                    low, high = np.percentile(gain[1:], [tail, 100 - tail])
                    rows.append((second, first, split, metric, over, float(gain[0]), float(low), float(high)))
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def _weights(self, n: int) -> NDArray[np.float32]:
        """Return ``(draws + 1, n)`` weights, the first row 1."""
        drawn = self._rng.poisson(1.0, (self.draws + 1, n)).astype(np.float32)
        drawn[0] = 1
        return drawn

    def _gene_weights(self, genes: tuple[str, ...]) -> NDArray[np.float32]:
        if new := [gene for gene in genes if gene not in self._genes]:
            drawn = self._weights(len(new))
            self._genes |= {gene: drawn[:, i] for i, gene in enumerate(new)}
        weights = np.stack([self._genes[gene] for gene in genes], axis=1)
        # With a handful of genes a draw may leave none: it counts them all then.
        weights[weights.sum(axis=1) == 0] = 1
        return weights

    def _correlations(self, scored: Scored, log_depth: Floats | None) -> NDArray[np.float32]:
        """Return weighted correlations within sections, ``(draws + 1, n_genes)``; 0 where undefined."""
        truth, guess = (np.asarray(v, np.float64) for v in (scored.truth, scored.predicted))
        _, undefined = correlate(truth, guess, scored.section, log_depth)
        x, y = (within_sections(v, scored.section, log_depth) for v in (truth, guess))
        x, y = (
            (v / np.maximum(np.sqrt((v**2).mean(axis=0)), 1e-30)).astype(np.float32)
            for v in (np.where(undefined, 0, x), np.where(undefined, 0, y))
        )
        total = np.zeros((3, self.draws + 1, x.shape[1]), dtype=np.float32)
        for label in np.unique(scored.section):
            here = scored.section == label
            w = self._spots[str(label)][:, scored.spot[here]]
            total += _moments(w, x[here], y[here])
        scale = np.sqrt(np.maximum(total[1] * total[2], 1e-12))
        return np.where(undefined, 0, np.clip(total[0] / scale, -1, 1)).astype(np.float32)


def _moments(w: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return weighted sums of squares about the weighted means: xy, xx, yy, ``(3, draws, n_genes)``."""
    n = np.maximum(w.sum(axis=1, keepdims=True), 1)
    wx, wy = w @ x, w @ y
    return np.stack([w @ (x * y) - wx * wy / n, w @ (x * x) - wx * wx / n, w @ (y * y) - wy * wy / n])
