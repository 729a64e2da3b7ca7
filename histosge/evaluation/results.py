"""What an evaluation found: the values that files and pages are made of.

Plain values, no arithmetic beyond means: `runner` fills them, `report` shows them.

Terms
    preset   a model's name, or a control: `noise` and `smooth_noise` are `ridge` on random embeddings
    kind     what a preset is: a model, a baseline, an oracle, or a variant of the published code
    row      one number: preset, split, fold, seed, metric, value
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.evaluation.paired_bootstrap import PairedBootstrap
from histosge.reporting.value_maps import PackedMaps

NOISE = "noise"
SMOOTH_NOISE = "smooth_noise"
"""Random embeddings that are smooth in space: what smoothness alone scores. By section it must be 0, too; where part of a
section is trained on, neighbouring tissue predicts the rest, and a model has to score more than this."""
CONTROLS = (NOISE, SMOOTH_NOISE)
MODEL, BASELINE, ORACLE, VARIANT = "model", "baseline", "oracle", "variant"
"""What the kind of a preset begins with; an oracle knows something of the held-out spots' counts."""
NOISE_LIMIT = 0.01
"""A control further from 0 than this shows that the evaluation leaks."""


@dataclass(frozen=True)
class FoldCount:
    """How many spots one fold trained on, held out, and dropped into the buffer."""

    seed: int
    name: str
    n_train: int
    n_test: int
    n_dropped: int


@dataclass(frozen=True)
class GeneMap:
    """One gene on one section: measured at held-out spots, predicted for every patch.

    Parameters
    ----------
    gene, role
        Whose map, and why it is shown: ``best``, ``median`` or ``worst``.
    pearson
        Held-out, mean over the folds that hold out spots of this section.
    slide_id
        Which section.
    spot_xy_um, measured
        Held-out spots, ``(n_spots, 2)`` microns, and log1p(CP10k), ``(n_spots,)``.
    spot_um
        Diameter of a spot in microns.
    predicted
        log1p(CP10k), ``(n_rows, n_cols)`` over the thumbnail's grid, NaN on background. Each patch
        comes from the fold that holds out its nearest spot.
    thumbnail
        Mean colour of every patch, ``(n_rows, n_cols, 3)``, uint8.
    stride_um, patch_um
        The grid's step, and the side of a patch.
    origin_um
        Corner ``(x, y)`` of patch (0, 0), from the slide's top-left.
    """

    gene: str
    role: str
    pearson: float
    slide_id: str
    spot_xy_um: NDArray[np.float64]
    measured: NDArray[np.float32]
    spot_um: float
    predicted: NDArray[np.float32]
    thumbnail: NDArray[np.uint8]
    stride_um: float
    patch_um: float
    origin_um: tuple[float, float] = (0.0, 0.0)


@dataclass(frozen=True)
class BinnedSection:
    """What a section's bins are made of.

    Parameters
    ----------
    slide_id, measured
        Which section, and in what its file counts, such as ``bins of 8 µm``.
    n_units, n_bins
        Bins, cells or molecules of the file, and bins of the stated side.
    n_few, n_uncovered
        Bins left out: too few counts, no patch.
    n_scored
        Bins scored, drawn from the others where there are very many.
    median_counts
        Of the bins with counts and a patch, over all genes.
    turned_degrees
        By which bins lie askew, where it matters; else 0.
    left_out
        Units of the file that were not pooled, in words; empty if none was left out.
    """

    slide_id: str
    measured: str
    n_units: int
    n_bins: int
    n_few: int
    n_uncovered: int
    n_scored: int
    median_counts: float
    turned_degrees: float = 0.0
    left_out: str = ""


@dataclass(frozen=True)
class BinFacts:
    """At what an evaluation scored maps more finely than at spots.

    Parameters
    ----------
    side_um, spot_um
        Of a bin; and of the widest spot.
    sections
        Those with bins.
    maps
        Resolution of the maps, in words; one for each kind of grid.
    notes
        One sentence for each section that cannot give such bins.
    """

    side_um: float
    spot_um: float
    sections: tuple[BinnedSection, ...]
    maps: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def describe(self) -> list[str]:
        """Return one line for each section: what was measured, how many bins there are, with how many counts."""
        lines = []
        for each in self.sections:
            pooled = "" if each.n_bins == each.n_units else f" pooled from {each.n_units} {each.measured}"
            askew = f"; they lie askew by {each.turned_degrees:.0f}°" if each.turned_degrees else ""
            drawn = each.n_bins - each.n_few - each.n_uncovered
            lines.append(
                f"{each.slide_id}: {each.n_scored} of {drawn} bins of {self.side_um:g} µm scored{pooled}, median "
                f"{each.median_counts:g} counts; {each.n_few} with too few counts and {each.n_uncovered} without a patch "
                f"left out{askew}{f'; {each.left_out}' if each.left_out else ''}"
            )
        return [*lines, *self.notes]

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Rebuild it from what `dataclasses.asdict` gave.

        Raises
        ------
        TypeError, KeyError
            If it is something else.
        """
        return cls(
            float(values["side_um"]),
            float(values["spot_um"]),
            tuple(BinnedSection(**each) for each in values["sections"]),
            tuple(values["maps"]),
            tuple(values["notes"]),
        )


@dataclass(frozen=True)
class Entry:
    """A preset on one encoder's embeddings."""

    preset: str
    encoder: str


@dataclass(frozen=True)
class Scores:
    """All scores of one evaluation.

    Parameters
    ----------
    scores
        Columns ``preset, split, fold, seed, metric, value``, and ``encoder`` where the embeddings are of a store.
    genes
        Columns ``preset, split, fold, seed, gene, pearson, pearson_depth_adjusted, pearson_undefined``, one for each
        registered metric, ``top50``, and ``encoder`` as in `scores`.
    presets
        In the order asked for, without the control. With several encoders: names of `entries`.
    default_preset
        Whose maps are shown.
    split, seeds
        As asked for.
    buffer_um
        Of the block split, else 0.
    gene_rule
        One sentence: how the genes were chosen.
    folds
        Counts of spots, for every seed asked for.
    maps
        Best, median and worst gene of the section with the most held-out spots; empty if no gene is scored in all its folds.
    notes
        Further sentences for the report's caveats.
    left_out
        One sentence for each preset that was asked for and not scored.
    differences
        Columns ``preset_a, preset_b, split, metric, difference, low, high, confidence, draws``, and ``encoder_a,
        encoder_b`` as in `scores`.
    domains
        Columns ``preset, split, section, seed, kmeans_seed, ari, nmi, n_domains, n_labelled, n_unlabelled``, and ``encoder``
        as in `scores`: domains against an annotation; None where none was given.
    protocol
        ``hest``, or empty for our own.
    kinds
        Preset -> what it is, for tables: `MODEL`, or text that begins with `BASELINE`, `ORACLE` or `VARIANT`.
    encoders
        Keys of the encoders whose embeddings were scored; empty where sections came without a store.
    entries
        Name in `presets` -> preset and encoder, where there are several encoders.
    bootstrap
        Values of all presets in all draws, to compare them with those of another encoder.
    bins
        Of what size and how many the bins are at which maps were scored, too; None where none were asked for. Their rows
        have metrics such as ``pearson_mean_at_8um``, and `genes` the columns ``pearson_at_8um`` and
        ``pearson_within_spots_at_8um``. The oracle ``depth`` has such rows also where it is none of `presets`.
    section_maps
        Maps of every section and gene as the page stores them; see `histosge.evaluation.section_maps` for what is left out.
    was_there
        Whether `histosge.evaluate` found them finished, so that nothing was fitted.
    """

    scores: pl.DataFrame
    genes: pl.DataFrame
    presets: tuple[str, ...]
    default_preset: str
    split: str
    seeds: tuple[int, ...]
    buffer_um: float
    gene_rule: str
    folds: tuple[FoldCount, ...]
    maps: tuple[GeneMap, ...] = ()
    notes: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = ()
    differences: pl.DataFrame | None = None
    domains: pl.DataFrame | None = None
    protocol: str = ""
    kinds: Mapping[str, str] = field(default_factory=dict)
    encoders: tuple[str, ...] = ()
    entries: Mapping[str, Entry] = field(default_factory=dict)
    bootstrap: PairedBootstrap | None = field(default=None, repr=False, compare=False)
    bins: BinFacts | None = None
    section_maps: tuple[PackedMaps, ...] = ()
    was_there: bool = False

    @property
    def controls(self) -> tuple[str, ...]:
        """Return the controls that were scored: evaluations of version 1.0 have no `SMOOTH_NOISE`."""
        return tuple(name for name in CONTROLS if (self.scores["preset"] == name).any())

    # Named by their kind, so that whoever shows scores need know no oracle by name.
    @property
    def oracles(self) -> frozenset[str]:
        """Presets that know something of the held-out spots' counts."""
        return frozenset(name for name, kind in self.kinds.items() if kind.startswith(ORACLE))

    def plain_name(self, preset: str) -> str:
        """Return a preset's own name, without its encoder."""
        return self.entries[preset].preset if preset in self.entries else preset

    def rows_of(self, table: pl.DataFrame, preset: str) -> pl.DataFrame:
        """Return the rows of `scores` or `genes` that belong to one of `presets`, or to the control on all encoders."""
        rows = table.filter(pl.col("preset") == self.plain_name(preset))
        if preset in self.entries:
            rows = rows.filter(pl.col("encoder") == self.entries[preset].encoder)
        return rows

    def values(self, preset: str, metric: str, fold: str | None = None) -> NDArray[np.float64]:
        """Return one value per seed, mean over folds (or of one fold), in the order of the seeds."""
        rows = self.rows_of(self.scores, preset).filter(pl.col("metric") == metric)
        if fold is not None:
            rows = rows.filter(pl.col("fold") == fold)
        # Folds first: a spread over seeds must not contain that folds are unequally hard.
        return rows.group_by("seed").agg(pl.col("value").mean()).sort("seed")["value"].to_numpy()

    def mean(self, preset: str, metric: str) -> float:
        """Return the mean over folds and seeds."""
        return float(self.values(preset, metric).mean())

    def domain_means(self) -> list[tuple[str, float, float, float]]:
        """Return name, ARI, its standard deviation over seeds of k-means, and NMI of each row of the domains."""
        if self.domains is None or self.domains.is_empty():
            return []
        key = ["preset", "encoder"] if "encoder" in self.domains.columns else ["preset"]
        # Sections first: the spread is that of the rule's seeds, not of unequally hard sections.
        by_seed = self.domains.group_by(*key, "kmeans_seed", maintain_order=True).agg(
            pl.col("ari", "nmi").mean()
        )
        table = by_seed.group_by(*key, maintain_order=True).agg(
            pl.col("ari").mean(), pl.col("ari").std().alias("sd"), pl.col("nmi").mean()
        )
        several = len(self.encoders) > 1
        return [
            (
                f"{row['preset']} on {row['encoder']}" if several else row["preset"],
                row["ari"],
                row["sd"] or 0.0,
                row["nmi"],
            )
            for row in table.iter_rows(named=True)
        ]

    @property
    def noise_is_zero(self) -> bool:
        """True if the control scores within 0 +- `NOISE_LIMIT` on every encoder, as it must."""
        return all(abs(mean) <= NOISE_LIMIT for mean in self.noise_means().values())

    def noise_means(self) -> dict[str, float]:
        """Return encoder -> mean score of the control; one entry with an empty name where encoders are not named."""
        rows = self.scores.filter((pl.col("preset") == NOISE) & (pl.col("metric") == "pearson_mean"))
        if not self.encoders:
            return {"": self.mean(NOISE, "pearson_mean")}
        parts = {encoder: rows.filter(pl.col("encoder") == encoder) for encoder in self.encoders}
        # Over folds and then over draws, as all means are.
        return {
            encoder: float(part.group_by("seed").agg(pl.col("value").mean())["value"].to_numpy().mean())
            for encoder, part in parts.items()
        }
