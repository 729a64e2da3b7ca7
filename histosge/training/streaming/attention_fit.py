"""The preset `attention` on a cohort that does not fit into memory: `dense` from sums, then blocks from the store.

The passes of `dense_fit` leave, for each section, what the fit without its fold predicts of the patches under its spots.
The network is trained on what that lacks. Its blocks are read from the store in a new order every epoch; targets and
predictions are read from the work folder. In several processes the first one makes the passes, and the others find
their files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from featurestore.byte_cache import ByteCache
from featurestore.storage.block_cache import BlockCache
from histosge.data.loader import THREADS_LOCAL, THREADS_REMOTE
from histosge.data.spot_blocks import SpotsOnGrid
from histosge.data.stored_blocks import StoredBlocks, StoredSection
from histosge.models.attention_folds import donor_groups
from histosge.models.block_attention import AttentionModel
from histosge.models.block_training import AttentionSettings, DensePatches
from histosge.models.checkpoint import Checkpoint
from histosge.models.linear_algebra import Floats, Indices, Standardiser
from histosge.models.target_sums import GeneMoments
from histosge.training.processes import is_first_process, wait_for_all
from histosge.training.streaming.cohort import Cohort
from histosge.training.streaming.dense_fit import StreamedDense, fit_dense
from histosge.training.streaming.progress import Passes

_CACHE_BYTES = 64 << 20
"""Of sections' spots, targets and predictions in memory, each: a section of 3,000 spots and 1,000 genes takes 1 to 10 MB."""


@dataclass(frozen=True)
class StreamedAttention:
    """A fitted `attention`."""

    model: AttentionModel
    # It does not follow from sums alone: `--from` cannot add to it.
    sums: None = None
    # Further fits of the network would take as long as this one.
    held_out: None = None


def fit_attention(
    cohort: Cohort,
    moments: Sequence[GeneMoments],
    passes: Passes,
    *,
    seed: int,
    epochs: int | None,
) -> StreamedAttention:
    """Fit `attention` to a surveyed cohort whose targets are written."""
    dense = fit_dense(cohort, moments, passes)
    if is_first_process():
        wait_for_all()  # the others have waited for the files of all passes
    settings = AttentionSettings() if epochs is None else AttentionSettings(epochs=epochs)
    surveys = [cohort.survey(index) for index in range(len(cohort.sections))]
    model = AttentionModel.fit_blocks(
        partial(open_blocks, cohort),
        donor_groups(cohort.donors or [""] * len(cohort.sections)),
        merge_moments([(survey.embedding_mean, survey.embedding_variance) for survey in surveys]),
        dense.model,
        lambda: _HeldOut(dense).all(),
        settings,
        seed=seed,
        # The folder is of this training alone: its record holds settings and inputs.
        checkpoint=Checkpoint(cohort.folder.path / "network", f"seed {seed}, epochs {epochs}, whitened"),
    )
    return StreamedAttention(model)


def merge_moments(moments: Sequence[tuple[Floats, Floats]]) -> Standardiser:
    """Return what standardises embeddings over sections, each of which counts the same."""
    means, variances = (np.array(values) for values in zip(*moments, strict=True))
    mean = means.mean(axis=0)
    sd = np.sqrt(np.maximum((variances + (means - mean) ** 2).mean(axis=0), 0))
    return Standardiser(mean, np.where(sd > 1e-6 * np.maximum(np.abs(mean), 1e-6), sd, np.inf))


def open_blocks(cohort: Cohort, halo_um: float) -> StoredBlocks:
    """Open the blocks under all spots of a cohort."""
    spots: ByteCache[SpotsOnGrid] = ByteCache(_CACHE_BYTES, _spots_bytes)
    targets: ByteCache[NDArray[np.float32]] = ByteCache(_CACHE_BYTES, lambda array: array.nbytes)
    sections, is_remote = [], False

    def read_spots(index: int) -> SpotsOnGrid:
        under = cohort.survey(index).under
        return SpotsOnGrid(under.rows, under.cols, under.overlap)

    def read_target(index: int) -> NDArray[np.float32]:
        return np.asarray(cohort.target(index).toarray(), np.float32)

    def target_of(index: int, some: Indices) -> NDArray[np.float32]:
        return targets.get(index, partial(read_target, index))[some]

    for index, section in enumerate(cohort.sections):
        slide = cohort.open(index)
        is_remote = not slide.array.location.is_local
        cache = BlockCache.from_environment() if is_remote else None
        # Neither tissue nor thumbnail is kept: those of a thousand slides would not fit into memory.
        sections.append(
            StoredSection(
                section.slide_id,
                slide.stored.grid,
                slide.array.reader(cache),
                partial(spots.get, index, partial(read_spots, index)),
                partial(target_of, index),
            )
        )
    return StoredBlocks(sections, halo_um, threads=THREADS_REMOTE if is_remote else THREADS_LOCAL)


def _spots_bytes(spots: SpotsOnGrid) -> int:
    overlap = spots.overlap
    arrays = (spots.rows, spots.cols, overlap.data, overlap.indices, overlap.indptr)
    return sum(int(array.nbytes) for array in arrays)


class _HeldOut:
    """Predictions of each section by the fit without its fold, read when a block needs them."""

    def __init__(self, dense: StreamedDense) -> None:
        self._dense = dense
        self._cache: ByteCache[DensePatches] = ByteCache(_CACHE_BYTES, lambda one: one.patterns.nbytes)

    def all(self) -> list["_HeldOutPatches"]:
        return [_HeldOutPatches(self, index) for index in range(len(self._dense.cohort.sections))]

    def of_section(self, index: int) -> DensePatches:
        return self._cache.get(index, partial(self._read, index))

    def _read(self, index: int) -> DensePatches:
        patterns, targets = self._dense.held_out_patterns(index)
        cohort = self._dense.cohort
        target = np.asarray(cohort.target(index).toarray(), np.float32)
        return DensePatches.from_spots(patterns, targets.to_genes, cohort.survey(index).under.overlap, target)


@dataclass(frozen=True)
class _HeldOutPatches:
    held_out: _HeldOut
    index: int

    def genes(self, at: Indices) -> NDArray[np.float32]:
        return self.held_out.of_section(self.index).genes(at)

    def offset(self) -> NDArray[np.float32]:
        return self.held_out.of_section(self.index).offset()
