"""Pass 3 of a streamed training: what fits without a section predict of it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.calibration.trust import OutOfFold
from histosge.data.block_bands import SpotPatches, stream_bands
from histosge.data.embedded_slide import EmbeddedSlide
from histosge.data.gaussian_pooling import RIM_SHARE, TRUNCATE, Moment, Precision, pool_moments
from histosge.data.sections import Patches
from histosge.models.linear_algebra import Affine, Floats, Indices
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.target_sums import gene_slices
from histosge.training.streaming.cohort import Cohort, SectionInput
from histosge.training.streaming.section_tasks import OnStep

MAX_VALUES = 400_000_000
"""Spots times genes that intervals and trust are measured on exactly: two arrays of 1.6 GB on disk. Of a larger cohort
every second, third ... spot of each section counts: of 100,000 spots, a 90 % quantile is off by 0.1 percentage points."""

Values = NDArray[np.float32]


@dataclass(frozen=True)
class ScaleOutputs:
    """Outputs of one ridge for each scale, as predicted for a section.

    Parameters
    ----------
    at_spots
        Pooled around each patch, then over the disc, ``(n_scales, n_spots, n_outputs)``.
    at_patches
        Of the patches under spots, as a map has them, ``(n_scales, n_patches, n_outputs)``.
    """

    at_spots: Floats
    at_patches: Floats


def predict_section(
    slide: EmbeddedSlide,
    under: SpotPatches,
    sigmas_um: Sequence[float],
    ridges: Sequence[Affine],
    precision: Precision = "float32",
) -> ScaleOutputs:
    """Predict a section by one ridge for each scale; each block is read once.

    Parameters
    ----------
    under
        Patches under its spots.
    ridges
        From embeddings pooled at each of the scales to outputs.
    precision
        Of what is pooled. That of a map is enough for intervals; what a further fit is made of takes double precision, as
        the ridges of differences of scales are large numbers that cancel.
    """
    weight = np.hstack([ridge.weight for ridge in ridges])
    n, n_scales = ridges[0].weight.shape[1], len(sigmas_um)

    def project(embedding: NDArray[np.floating]) -> NDArray[Any]:
        return (embedding.astype(np.float64) @ weight).astype(precision)

    at_spots = np.zeros((n_scales, under.overlap.shape[0], n))
    at_patches = np.zeros((n_scales, len(under.rows), n))
    for band in stream_bands(slide, TRUNCATE * max(sigmas_um), project):
        own, at = under.in_band(band, slide.slide_id)
        if len(own) == 0:
            continue
        overlap = under.overlap[:, own]
        for scale, sigma_um in enumerate(sigmas_um):
            columns = slice(scale * n, (scale + 1) * n)
            pooled = _pool(band.patches, columns, sigma_um, at, precision)
            at_spots[scale] += overlap @ pooled
            if sigma_um == 0:
                pooled = _rim_pooled(band.patches, columns, sigmas_um, at, pooled, precision)
            at_patches[scale, own] = pooled
    offset = np.stack([ridge.offset for ridge in ridges])[:, None, :]
    return ScaleOutputs(at_spots + offset, at_patches + offset)


def _pool(patches: Patches, columns: slice, sigma_um: float, at: Indices, precision: Precision) -> Floats:
    some = patches.with_embedding(patches.embedding[:, columns])
    found = np.empty((len(at), some.embedding.shape[1]))
    for _, features, values in pool_moments(some, [Moment(sigma_um, "mean")], at, precision=precision):
        found[:, features] = values
    return found


def _rim_pooled(
    patches: Patches,
    columns: slice,
    sigmas_um: Sequence[float],
    at: Indices,
    own: Floats,
    precision: Precision,
) -> Floats:
    """Return the patches' own values, but at the rim of the tissue those around them, as `sum_pooled` takes them."""
    wider = [sigma_um for sigma_um in sigmas_um if sigma_um > 0]
    rim = np.zeros(len(at), bool) if patches.tissue_share is None else patches.tissue_share[at] < RIM_SHARE
    if not rim.any() or not wider:
        return own
    found = own.copy()
    found[rim] = _pool(patches, columns, min(wider), at[rim], precision)
    return found


@dataclass(frozen=True)
class HeldOutSection:
    """What a fit without a section predicts of the patches under its spots, a few genes at a time.

    Parameters
    ----------
    genes
        From a range of genes to log1p(CP10k) of the patches, ``(n_patches, n)``.
    depth
        Of the patches, ``(n_patches,)``; None without a depth model.
    """

    genes: Callable[[slice], Values]
    depth: Values | None


class SectionPredictor(Protocol):
    """Predicts the patches under a section's spots, by a fit without it; it pickles."""

    def predict(self, section: SectionInput, found: Any) -> HeldOutSection:
        """Predict.

        Parameters
        ----------
        found
            What an earlier pass left of the section, see `HeldOutFits`.
        """
        ...


class HeldOutFits(Protocol):
    """What predicts each section by the fit without its fold."""

    @property
    def predictor(self) -> SectionPredictor:
        """Return what predicts all sections."""
        ...

    def held_out_input(self, index: int) -> Any:
        """Return what the predictor needs of a section beside its `SectionInput`."""
        ...


@dataclass(frozen=True)
class _Scoring:
    predictor: SectionPredictor
    every: int


def _held_out_values(how: _Scoring, item: tuple[SectionInput, Any]) -> Iterator[NDArray[Any] | None]:
    """Yield the depth of a section's held-out spots, then their genes, a slice of them at a time."""
    section, found = item[0], how.predictor.predict(*item)
    overlap = sparse.csr_matrix(section.under.overlap[:: how.every])
    yield None if found.depth is None else np.asarray(overlap @ found.depth.astype(np.float64))
    for some in gene_slices(section.target.shape[1]):
        # The mean of rates, as `spots_from_patches` takes it.
        rates = np.expm1(found.genes(some).astype(np.float64))
        yield np.log1p(overlap @ rates).astype(np.float32)


def collect_held_out(cohort: Cohort, n_genes: int, fits: HeldOutFits, on_step: OnStep) -> OutOfFold:
    """Write truth and prediction of all held-out spots to the work folder, gene after gene."""
    every = -(-cohort.n_spots * n_genes // MAX_VALUES)
    # In the order of `histosge.calibration.conformal`, so that trust draws the same spots.
    order = np.lexsort((np.arange(len(cohort.sections)), cohort.fold)).tolist()
    counts = [len(range(0, cohort.sections[index].n_spots, every)) for index in order]
    shape = (sum(counts), n_genes)
    truth, predicted = (cohort.folder.new_columns(name, shape) for name in ("truth", "predicted"))
    depths, places, start = list[Floats](), list[Floats](), 0
    items = (
        (cohort.sections[index].slide_id, (cohort.input(index), fits.held_out_input(index)))
        for index in order
    )
    found = cohort.tasks.run(_held_out_values, _Scoring(fits.predictor, every), items, on_step)
    for index, count, of_section in zip(order, counts, found, strict=True):
        assert of_section is not None
        values, target = iter(of_section), cohort.target(index)
        if (depth := next(values)) is not None:
            depths.append(np.asarray(depth, np.float64))
        for some, of_genes in zip(gene_slices(n_genes), values, strict=True):
            columns = range(n_genes)[some]
            truth.write(start, columns, target[::every, some].toarray())
            predicted.write(start, columns, np.asarray(of_genes, np.float32))
        places.append(cohort.survey(index).xy_um[::every])
        start += count
    sections = np.repeat(order, counts)
    return OutOfFold(
        truth,
        predicted,
        np.concatenate(places),
        cohort.fold[sections] * len(cohort.sections) + sections,
        cohort.fold[sections],
        cohort.donor_numbers[sections],
        np.concatenate(depths) if len(depths) == len(order) else None,
    )


def take_genes(targets: LowRankTargets, some: slice) -> LowRankTargets:
    """Return the targets of some genes."""
    highest = None if targets.highest is None else targets.highest[some]
    return LowRankTargets(targets.mean[some], targets.sd[some], targets.axes[some], highest)
