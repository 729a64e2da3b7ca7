"""Prediction intervals and trust per gene, measured on held-out spots of the training sections.

The absolute errors at spots predicted by fits without them give the width around every prediction that covers 90 % of
them (`widths`). What is left out, whole donors, sections or blocks, is in `held_out_parts`; how trust is measured, in
`trust`.

This is cross-conformal prediction pooled over folds: errors are of fits to a part of the data, the interval is put
around the prediction of the fit to all. It has no finite-sample guarantee of its own (CV+, which keeps the fits of all
folds, guarantees 80 % for exchangeable spots; Barber et al., 2021), and spots are not exchangeable. What is claimed is
what was measured on held-out sections and donors.

A spot with few counts is noisier. Where the model predicts depth, and where that is better on folds left out, each
stratum of predicted depth has half widths of its own (`depth_strata`).

Terms
    half width  per gene, in log1p(CP10k): the interval is prediction +- half width, not below 0
    trust       per gene, 0..1: a lower confidence limit (99 %) of the held-out Pearson within sections, see `trust`
    trusted     trust of at least `TRUSTED`; the predictions of other genes should not be used
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from featurestore.documents import convert
from histosge.calibration.depth_strata import DepthStrata, choose_strata, gene_parts, interval_bounds
from histosge.calibration.embedding_distance import EmbeddingReference
from histosge.calibration.held_out_parts import BLOCK, held_out_parts, what_is_held_out
from histosge.calibration.neighbour_prediction import predict_from_neighbours
from histosge.calibration.trust import OutOfFold, measure_trust
from histosge.calibration.widths import coverage_by_donor, half_width, width_method
from histosge.calibration.wording import claim_text, scope_text
from histosge.data.sections import Patches, Spots, TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.models.nested_state import take
from histosge.models.protocol import DepthModel, Model, State
from histosge.threads import FEW_THREADS, prefetch

LEVEL = 0.9
TRUSTED = 0.1
"""Trust from which on a gene counts as predictable."""
PREFIX = "calibration."
MAX_GENES_OF_COVERAGE = 500
"""Genes that the coverage of single donors is measured on, at most, spread evenly over all."""

Fit = Callable[[Sequence[TrainingSection]], Model]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Intervals:
    """Half widths and trust per gene, and what they were measured on.

    Parameters
    ----------
    half_width, trust
        ``(n_genes,)``, float32.
    level
        Share of held-out spots that the intervals cover.
    n_spots
        Held-out spots that both were measured on.
    held_out
        ``donor``, ``section``, or ``block`` for blocks of a lone section.
    strata
        Half widths by predicted depth, where they are better than one; `half_width` is that one.
    method
        Of the half widths, see `widths`; empty in models of earlier versions, whose trust took spots as independent.
    donors
        Of the training sections; empty where they are not known.
    donor_coverage
        Donor -> share of its spots that one half width a gene covers which was measured on the other donors.
    reference
        Where the training sections' embeddings lie, to compare those of other slides with; None in earlier versions.
    """

    half_width: Values
    trust: Values
    level: float
    n_spots: int
    held_out: str
    strata: DepthStrata | None = None
    method: str = ""
    donors: tuple[str, ...] = ()
    donor_coverage: Mapping[str, float] = field(default_factory=dict)
    reference: EmbeddingReference | None = None

    @property
    def trusted(self) -> NDArray[np.bool_]:
        """Return which genes can be predicted, ``(n_genes,)``."""
        return np.asarray(self.trust >= TRUSTED)

    @property
    def scope(self) -> str:
        """Return what was held out, in words: the tissue that intervals and trust hold for."""
        return scope_text(self.held_out, self.method, self.donors)

    @property
    def claim(self) -> str:
        """Return for whom the intervals hold, in a few words that follow their name."""
        return claim_text(self.method, self.donors)

    def bounds(self, values: Values, depth: NDArray[np.floating] | None = None) -> tuple[Values, Values]:
        """Return lower and upper ends for ``(..., n_genes)`` predictions; NaN stays NaN.

        Parameters
        ----------
        depth
            Predicted depth, ``(...,)``, which selects the stratum. None, or no strata: one half width for all.
        """
        half_width = self.half_width
        if self.strata is not None and depth is not None:
            half_width = self.strata.half_width_at(depth)
        return interval_bounds(values, half_width)

    def take(self, columns: Sequence[int]) -> "Intervals":
        """Return the intervals of some genes."""
        index = list(columns)
        strata = self.strata.take(index) if self.strata else None
        return replace(self, half_width=self.half_width[index], trust=self.trust[index], strata=strata)

    def scores(
        self, truth: Values, predicted: Values, depth: NDArray[np.floating] | None = None
    ) -> dict[str, float]:
        """Return ``coverage_90`` (named after the level) on held-out spots, and ``trusted_share``."""
        covered = float(coverage(self, truth, predicted, depth).mean())
        return {f"coverage_{round(100 * self.level)}": covered, "trusted_share": float(self.trusted.mean())}

    def config(self) -> dict[str, Any]:
        """Return everything but the arrays, JSON-ready."""
        strata = len(self.strata.half_width) if self.strata else 1
        return {
            "level": self.level,
            "n_spots": self.n_spots,
            "held_out": self.held_out,
            "depth_strata": strata,
            "method": self.method,
            "donors": list(self.donors),
            "donor_coverage": dict(self.donor_coverage),
            "distance_among_sections": self.reference.among_sections if self.reference else None,
            # In words, for whoever reads the file; made anew from the entries above when it is loaded.
            "scope": self.scope,
        }

    def state(self) -> State:
        """Return the arrays."""
        arrays = {"half_width": self.half_width, "trust": self.trust}
        if self.strata is not None:
            arrays |= {"depth_edge": self.strata.edges, "half_width_by_depth": self.strata.half_width}
        if self.reference is not None:
            arrays |= {"embedding_mean": self.reference.mean, "embedding_sd": self.reference.sd}
        return {f"{PREFIX}{name}": array for name, array in arrays.items()}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        facts, strata = convert(config, _Config, "the configuration", at="calibration"), None
        half_width = take(state, f"{PREFIX}half_width", None)
        n_genes = len(half_width)
        if facts.depth_strata > 1:
            strata = DepthStrata(
                take(state, f"{PREFIX}depth_edge", facts.depth_strata - 1),
                take(state, f"{PREFIX}half_width_by_depth", facts.depth_strata, n_genes),
            )
        trust = take(state, f"{PREFIX}trust", n_genes)
        reference = None
        if f"{PREFIX}embedding_mean" in state:
            mean = take(state, f"{PREFIX}embedding_mean", None)
            sd = take(state, f"{PREFIX}embedding_sd", len(mean))
            reference = EmbeddingReference(mean, sd, facts.distance_among_sections)
        return cls(
            half_width,
            trust,
            facts.level,
            facts.n_spots,
            facts.held_out,
            strata,
            facts.method,
            facts.donors,
            facts.donor_coverage,
            reference,
        )


class _Config(msgspec.Struct):
    """What `Intervals.config` wrote.

    Models of the first versions name no strata: they have one width a gene. Those before version 0.1 name no method.
    """

    level: Annotated[float, msgspec.Meta(gt=0, lt=1)]
    n_spots: Annotated[int, msgspec.Meta(ge=0)]
    held_out: str
    depth_strata: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    method: str = ""
    donors: tuple[str, ...] = ()
    donor_coverage: dict[str, Annotated[float, msgspec.Meta(ge=0, le=1)]] = {}
    distance_among_sections: Annotated[float, msgspec.Meta(ge=0)] | None = None


def coverage(
    intervals: Intervals, truth: Values, predicted: Values, depth: NDArray[np.floating] | None = None
) -> NDArray[np.float64]:
    """Return per gene the share of spots whose truth lies inside the interval, ``(n_genes,)``."""
    lower, upper = intervals.bounds(predicted, depth)
    return np.asarray(((truth >= lower) & (truth <= upper)).mean(axis=0), dtype=np.float64)


def calibrate(
    fit: Fit,
    sections: Sequence[TrainingSection],
    spot_um: float,
    *,
    level: float = LEVEL,
    donors: Sequence[str] = (),
) -> Intervals | None:
    """Measure a model's errors on held-out parts of its own training sections.

    Parameters
    ----------
    fit
        Sections -> model, with the settings of the final fit.
    spot_um
        Width of a spot in microns, see `widest_spot_um`, for the buffer within a lone section.
    level
        Share of spots that the intervals must cover.
    donors
        Of each section; none where they are not known, which counts as one donor.

    Returns
    -------
    Intervals or None
        None where no part can be left out (too few spots, or the buffer leaves none to train on).
    """
    spots = _out_of_fold(fit, sections, spot_um, donors or [""] * len(sections))
    if spots is None:
        return None
    return measure_intervals(
        spots,
        what_is_held_out(sections, donors),
        tuple(dict.fromkeys(donors)),
        EmbeddingReference.fit(sections),
        level,
    )


def measure_intervals(
    spots: OutOfFold,
    held_out: str,
    names: tuple[str, ...],
    reference: EmbeddingReference,
    level: float = LEVEL,
    *,
    threads: int = 1,
) -> Intervals | None:
    """Return intervals and trust from held-out spots, predicted by fits without them.

    Arrays of the spots may lie on disk: some genes are worked on at a time.

    Parameters
    ----------
    held_out
        ``donor``, ``section`` or ``block``.
    names
        Of the donors; empty where they are not known.
    threads
        That work on genes side by side, `FEW_THREADS` at most; the result does not depend on them.

    Returns
    -------
    Intervals or None
        None where there are too few spots.
    """
    # With fewer, the conformal rank exceeds the number of errors: no width has the level.
    if len(spots.truth) < 1 / (1 - level):
        return None
    strata, threads = None, min(threads, FEW_THREADS)
    # Strata are chosen on folds left out in turn, which takes two.
    if spots.depth is not None and spots.fold.max() > spots.fold.min():
        strata = choose_strata(
            spots.truth, spots.predicted, spots.depth, spots.fold, level, spots.donor, threads=threads
        )
    n_genes = spots.truth.shape[1]
    columns = np.unique(np.linspace(0, n_genes - 1, MAX_GENES_OF_COVERAGE).round().astype(np.int64))

    def width(some: NDArray[np.int64]) -> Values:
        return half_width(np.abs(spots.truth[:, some] - spots.predicted[:, some]), spots.donor, level)

    widths = list(prefetch(width, gene_parts(np.arange(n_genes), len(spots.truth)), threads))
    shares, parts = dict[int, float](), gene_parts(columns, len(spots.truth))
    for some in parts:
        error = np.abs(spots.truth[:, some] - spots.predicted[:, some])
        for donor, share in coverage_by_donor(error, spots.donor, level).items():
            # A mean over genes: each part counts by how many it has.
            shares[donor] = shares.get(donor, 0.0) + share * len(some) / len(columns)
    return Intervals(
        np.concatenate(widths),
        measure_trust(spots, threads=threads),
        level,
        len(spots.truth),
        held_out,
        strata,
        width_method(len(names), level),
        names,
        {names[donor]: share for donor, share in shares.items()},
        reference,
    )


def widest_spot_um(spots: Sequence[Spots]) -> float:
    """Return the largest width of the spots of some sections, from corner to corner where they are squares, microns."""
    return max(s.diameter_um * (np.sqrt(2) if s.shape == "square" else 1.0) for s in spots)


def _out_of_fold(
    fit: Fit, sections: Sequence[TrainingSection], spot_um: float, donors: Sequence[str]
) -> OutOfFold | None:
    """Predict the spots of each held-out part by a fit without it; None if nothing can be held out."""
    truth, predictions, depths, at, label, fold, donor = [], [], [], [], [], [], []
    neighbours = []
    for number, part in enumerate(held_out_parts(sections, spot_um, donors)):
        model = fit(part.training)
        for place, (section, of) in enumerate(zip(part.held_out, part.donors, strict=True)):
            values, depth = predict_spots(model, section)
            n_spots = len(section.target)
            truth.append(section.target)
            predictions.append(values)
            depths.append(depth)
            at.append(section.spot_xy_um)
            # Sections have labels of their own within a fold: trust is measured within them.
            label.append(np.full(n_spots, number * len(sections) + place))
            fold.append(np.full(n_spots, number))
            donor.append(np.full(n_spots, of))
            if what_is_held_out(sections, donors) == BLOCK:
                (beside,) = part.training
                neighbours.append(
                    predict_from_neighbours(beside.spot_xy_um, beside.target, section.spot_xy_um)
                )
    if not truth:
        return None
    predicted_depths = [depth for depth in depths if depth is not None]
    return OutOfFold(
        np.concatenate(truth),
        np.concatenate(predictions),
        np.concatenate(at),
        np.concatenate(label),
        np.concatenate(fold),
        np.concatenate(donor),
        np.concatenate(predicted_depths) if len(predicted_depths) == len(depths) else None,
        [np.concatenate(parts) for parts in zip(*neighbours, strict=True)],
    )


def predict_spots(model: Model, section: TrainingSection) -> tuple[Values, NDArray[np.float64] | None]:
    """Predict a section's spots, ``(n_spots, n_genes)``, and their depth, ``(n_spots,)``; None without a depth model."""
    values, depth = predict_patches(model, section.patches)
    spots = spots_from_patches(section.overlap, values)
    return spots, None if depth is None else np.asarray(section.overlap @ depth.astype(np.float64))


def predict_patches(model: Model, patches: Patches) -> tuple[Values, Values | None]:
    """Predict all patches, ``(n_patches, n_genes)``, and their depth, ``(n_patches,)``; None without a depth model."""
    if isinstance(model, DepthModel) and model.depth is not None:
        return model.predict_with_depth(patches, np.arange(len(patches)))
    return model.predict(patches), None
