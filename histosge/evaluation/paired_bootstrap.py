"""How much better one preset is than another, and how sure that is: a paired bootstrap over genes and spots.

Both presets of a pair are scored on the same resampled spots and genes, so what they share cancels out.
Arithmetic on predictions that are handed in; it fits nothing.

Terms
    draw    one resampling: every spot of a section gets a number of times it counts (multinomial), every gene
            a weight (exponential: a bootstrap without genes that vanish)
    value   a preset's mean correlation in one draw, mean over genes, then over folds and seeds
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.heldout.metrics import CONSTANT, within_sections

Floats = NDArray[np.float64]

# The ends of a 95 % interval then lie at the 25th draw from either side.
DRAWS = 1000
CONFIDENCE = 0.95
METRICS = ("pearson_mean", "pearson_depth_adjusted")
# Bounds memory: draws x genes x 5 sums in double precision are 20 MB.
_GENES_AT_ONCE = 512

SCHEMA = {
    "preset_a": pl.String,
    "preset_b": pl.String,
    "split": pl.String,
    "metric": pl.String,
    "difference": pl.Float64,
    "low": pl.Float64,
    "high": pl.Float64,
    "confidence": pl.Float64,
    "draws": pl.Int64,
}


@dataclass(frozen=True)
class HeldOutSpots:
    """Held-out spots of one fold with what is true of them.

    Parameters
    ----------
    fold, seed
        Which.
    genes
        Names, ``(n_genes,)``.
    truth
        log1p(CP10k), ``(n_spots, n_genes)``.
    depth
        Total counts, ``(n_spots,)``.
    section
        Slide id of each spot, ``(n_spots,)``.
    place
        Number of each spot among all spots of its section, ``(n_spots,)``.
    """

    fold: str
    seed: int
    genes: tuple[str, ...]
    truth: Floats
    depth: Floats
    section: NDArray[np.str_]
    place: NDArray[np.int64]


@dataclass
class PairedBootstrap:
    """Collects presets' values in the same draws, fold by fold.

    Parameters
    ----------
    spots
        Slide id -> number of its spots.
    draws, seed
        How many, and from where.
    """

    spots: dict[str, int]
    draws: int = DRAWS
    seed: int = 0
    _values: dict[str, dict[tuple[str, int], Floats]] = field(default_factory=dict)
    _counts: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    _genes: dict[str, Floats] = field(default_factory=dict)

    def add(self, preset: str, held_out: HeldOutSpots, predicted: Floats) -> None:
        """Score a preset's prediction of a fold's held-out spots, ``(n_spots, n_genes)``, in every draw.

        Draw 0 is the data itself.
        """
        log_depth = np.log(held_out.depth)
        # Weights of genes and spots depend on their names alone, so they are the same for every preset and fold.
        weight = np.stack([self._gene_weight(gene) for gene in held_out.genes], axis=1)
        weight /= weight.sum(axis=1, keepdims=True)
        means = []
        for adjust in (None, log_depth):
            mean = np.zeros(self.draws + 1)
            for start in range(0, len(held_out.genes), _GENES_AT_ONCE):
                part = slice(start, start + _GENES_AT_ONCE)
                true, guess = (
                    _standard(v[:, part], held_out.section, adjust) for v in (held_out.truth, predicted)
                )
                mean += (self._correlate(true, guess, held_out) * weight[:, part]).sum(axis=1)
            means.append(mean)
        self._values.setdefault(preset, {})[held_out.fold, held_out.seed] = np.stack(means)

    def take(self, other: "PairedBootstrap", names: Mapping[str, str]) -> None:
        """Add the values of another bootstrap of the same sections, presets under new names.

        Draws depend on the sections, their numbers of spots and the genes' names alone, so values stay paired.

        Raises
        ------
        ValueError
            If the other one is of other sections, or of other numbers of spots or draws.
        """
        if not self._values:
            self.spots, self.draws, self.seed = dict(other.spots), other.draws, other.seed
        if (self.spots, self.draws, self.seed) != (other.spots, other.draws, other.seed):
            raise ValueError(f"draws over spots {other.spots} are not paired with draws over {self.spots}")
        self._values |= {names[preset]: values for preset, values in other._values.items()}

    def table(self, pairs: Sequence[tuple[str, str]], split: str) -> pl.DataFrame:
        """Return a row per pair ``(a, b)`` and metric: a - b with its interval."""
        tail, rows = 100 * (1 - CONFIDENCE) / 2, []
        for a, b in pairs:
            # Only folds that both were scored on: a difference of means over other folds would not be paired.
            common = sorted(self._values[a].keys() & self._values[b].keys())
            gaps = np.mean([self._values[a][key] - self._values[b][key] for key in common], axis=0)
            for metric, gap in zip(METRICS, gaps, strict=True):
                low, high = np.percentile(gap[1:], [tail, 100 - tail])
                rows.append(
                    (a, b, split, metric, float(gap[0]), float(low), float(high), CONFIDENCE, self.draws)
                )
        return pl.DataFrame(rows, schema=SCHEMA, orient="row")

    def _correlate(
        self, true: NDArray[np.float32], guess: NDArray[np.float32], held_out: HeldOutSpots
    ) -> Floats:
        """Return the correlation within sections, ``(draws + 1, n_genes)``; 0 where it is not defined."""
        # All sums that a correlation needs, for all draws by one matrix product.
        columns = np.concatenate([true, guess, true * true, guess * guess, true * guess], axis=1)
        n = true.shape[1]
        squares = np.zeros((3, self.draws + 1, n))
        for slide_id in np.unique(held_out.section):
            here = held_out.section == slide_id
            counts = self._spot_counts(str(slide_id))[:, held_out.place[here]]
            total = np.maximum(counts.sum(axis=1, keepdims=True), 1)
            sums = (counts @ columns[here]).astype(np.float64)
            t, g = sums[:, :n], sums[:, n : 2 * n]
            for i, (left, right) in enumerate(((t, t), (g, g), (t, g))):
                squares[i] += sums[:, (2 + i) * n : (3 + i) * n] - left * right / total
        scale = np.sqrt(np.maximum(squares[0], 0) * np.maximum(squares[1], 0))
        # Values have spread 1, so a scale this small is what single precision leaves of a constant.
        return np.asarray(np.divide(squares[2], scale, out=np.zeros_like(scale), where=scale > 1e-4))

    def _spot_counts(self, slide_id: str) -> NDArray[np.float32]:
        if slide_id not in self._counts:
            n = self.spots[slide_id]
            rng = np.random.default_rng([self.seed, 0, sorted(self.spots).index(slide_id)])
            # Draw 0 counts every spot once: the value itself, by the same arithmetic as the others.
            drawn = rng.multinomial(n, np.full(n, 1 / n), size=self.draws)
            self._counts[slide_id] = np.concatenate([np.ones((1, n)), drawn]).astype(np.float32)
        return self._counts[slide_id]

    def _gene_weight(self, gene: str) -> Floats:
        if gene not in self._genes:
            rng = np.random.default_rng([self.seed, 1, *gene.encode()])
            self._genes[gene] = np.concatenate([[1.0], rng.exponential(size=self.draws)])
        return self._genes[gene]


def ordered_pairs(presets: Sequence[str], first: str) -> list[tuple[str, str]]:
    """Return every pair once: `first` minus each other one, then later named ones minus earlier ones."""
    names = [*(name for name in presets if name != first), first] if first in presets else list(presets)
    return [(names[j], names[i]) for j in range(len(names) - 1, 0, -1) for i in range(j)]


def _standard(
    values: NDArray[np.floating], section: NDArray[np.str_], log_depth: Floats | None
) -> NDArray[np.float32]:
    """Return residuals within sections with spread 1, 0 where a column does not vary."""
    wide = np.asarray(values, np.float64)
    residual = within_sections(wide, section, log_depth)
    sd = residual.std(axis=0)
    varies = sd > CONSTANT * np.abs(wide).max(axis=0)
    scaled = np.divide(residual, sd, out=np.zeros_like(residual), where=varies)
    return np.asarray(scaled, dtype=np.float32)
