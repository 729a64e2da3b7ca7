"""Quality flags in a run: what the overview shows when a slide is planned, and focus, measured on the patches that are read.

Focus is measured as patches go to the encoders, which costs no second reading, and is written at the slide's end, in one
object. Each patch has a bit that tells whether its focus was measured. A run that was killed before the slide's end leaves
blocks whose patches lack that bit: the next run reads these patches once more when it plans the slide.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import DEFAULT_BLOCK, Block, plan_blocks, whole_patches
from featurestore.credentials import strip_credentials
from featurestore.embedding.positions import failed_positions, patches_to_read, positions_of
from featurestore.encoders.protocol import BATCH
from featurestore.grid import PatchGrid
from featurestore.slides.patch_reader import PatchBatch, read_batches
from featurestore.slides.protocol import Slide
from featurestore.storage.store import Store, StoredGrid
from featurestore.tissue.flags import Flag, bits_of, count_skipped, flag_shares, has_any
from featurestore.tissue.focus import is_blurred
from featurestore.tissue.region import TissueRequest
from featurestore.tissue.survey import Survey, survey
from featurestore.tissue.threshold import is_tissue

MARKED_SHARE = 0.5
"""Share of the tissue with marks of a pen from which on the user is told: mostly ink is embedded."""


def survey_without(slide: Slide, grid: PatchGrid, request: TissueRequest, skip: tuple[str, ...]) -> Survey:
    """Survey a slide, and leave out the tissue patches that have one of some flags.

    Parameters
    ----------
    skip
        Names of flags; with ``blur`` every tissue patch without another of them is read.

    Raises
    ------
    SlideAccessError
        If a server or disk refuses.
    """
    found = survey(slide, grid, request)
    if not skip or found.quality is None:
        return found
    tissue, quality = is_tissue(found.tissue), found.quality.copy()
    if "blur" in skip:
        # Patches that another flag leaves out are not read.
        read = tissue & ~has_any(quality, bits_of(set(skip) - {"blur"}))
        quality |= judge_focus(slide, grid, read)
    left_out = tissue & has_any(quality, bits_of(skip))
    quality[left_out] |= np.uint8(Flag.SKIPPED)
    # Background to whatever reads the store: tissue without a vector would be a patch that could not be read.
    kept = np.where(left_out, 0, found.tissue).astype(np.uint8)
    return replace(found, tissue=kept, quality=quality, skip=skip)


def skip_text(skip: Any) -> str:
    """Return the option that skips some flags, for a message; `skip` may come from a damaged store."""
    return f"--skip {','.join(map(str, skip))}" if isinstance(skip, list | tuple) and skip else "no --skip"


def quality_remark(found: Survey, source: str) -> str:
    """Return what the user should know of a slide's flags; empty if there is nothing.

    Parameters
    ----------
    source
        Path or URL of the slide.
    """
    if found.quality is None or "pen" in found.skip:
        return ""
    share = flag_shares(found.quality, is_tissue(found.tissue)).get("pen", 0.0)
    if share < MARKED_SHARE:
        return ""
    return (
        f"{share:.0%} of the tissue patches of {strip_credentials(source)} have marks of a pen; "
        "--skip pen leaves them out"
    )


def judge_focus(slide: Slide, grid: PatchGrid, wanted: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Read patches to measure their focus.

    Parameters
    ----------
    wanted
        Which positions of the grid, ``(n_rows, n_cols)``.

    Returns
    -------
    numpy.ndarray
        Bits of the wanted positions, ``(n_rows, n_cols)``; 0 elsewhere.

    Raises
    ------
    SlideAccessError
        If a server or disk refuses. A patch that cannot be read counts as known, and not as blurred.
    """
    bits = np.zeros(grid.shape, np.uint8)
    for block in plan_blocks(grid.shape, whole_patches(DEFAULT_BLOCK, grid.tokens)):
        if wanted[block.slices].any():
            patches = patches_to_read(wanted[block.slices], grid)
            for batch in read_batches(slide, grid.encoded, block.coarser(grid.tokens), patches, BATCH):
                blurred = is_blurred(batch.pixels, grid.effective_mpp)
                set_focus(bits, (0, 0), batch, blurred, wanted, grid)
    return bits


def set_focus(
    bits: NDArray[np.uint8],
    corner: tuple[int, int],
    batch: PatchBatch,
    blurred: NDArray[np.bool_],
    wanted: NDArray[np.bool_],
    grid: PatchGrid,
) -> None:
    """Set the bits of a batch's patches.

    Parameters
    ----------
    bits
        Of a part of the grid, which begins at position `corner`, ``(row, col)``; changed in place.
    blurred
        Of the batch's patches, ``(n,)``.
    wanted
        Which positions of the whole grid may be set.
    """
    rows, cols = positions_of(batch, grid)
    known = np.uint8(Flag.FOCUS_KNOWN)
    values = np.repeat(np.where(blurred, known | np.uint8(Flag.BLUR), known), grid.tokens**2)
    kept = wanted[rows, cols]
    bits[rows[kept] - corner[0], cols[kept] - corner[1]] |= values[kept]
    # Known as well, or each run of the same command would try to read these patches again.
    for row, col, _ in failed_positions(batch.failures, wanted, grid):
        bits[row - corner[0], col - corner[1]] |= known


@dataclass(frozen=True)
class QualityPlan:
    """What a run does with the quality flags of a slide's grid.

    Parameters
    ----------
    skipped
        Tissue patches that were left out.
    known
        The flags that are known before patches are read, ``(n_rows, n_cols)``; None if the run adds none.
    """

    skipped: int = 0
    known: NDArray[np.uint8] | None = None

    @property
    def judging_focus(self) -> bool:
        """Whether to measure the focus of the patches that are read."""
        return self.known is not None


def plan_quality(
    store: Store, slide: Slide, stored: StoredGrid, to_compute: Iterable[Block], *, retried: bool
) -> QualityPlan:
    """Decide whether a run measures focus; measure it now where the run will read no pixels.

    Parameters
    ----------
    to_compute
        The blocks of this run, whose patches are read for the encoders.
    retried
        Whether they hold patches that could not be read before, whose focus counts as known.

    Raises
    ------
    SlideAccessError, StoreError
        If pixels or flags cannot be read.
    """
    grid = stored.grid
    quality = store.quality(stored.slide_id, grid.spec.key, grid.shape)
    if quality is None:
        return QualityPlan()
    unknown = stored.is_tissue & ~has_any(quality, Flag.FOCUS_KNOWN)
    will_be_read = np.zeros(grid.shape, bool)
    for block in to_compute:
        will_be_read[block.slices] = True
    # An earlier run wrote these blocks and was killed before it wrote the flags.
    late = unknown & ~will_be_read
    if late.any():
        quality = quality | judge_focus(slide, grid, late)
    judging = bool(will_be_read.any()) and (retried or bool((unknown & will_be_read).any()))
    if late.any() and not judging:
        store.write_quality(stored.slide_id, grid.spec.key, quality)
    return QualityPlan(count_skipped(quality), quality if judging else None)


def write_focus(
    store: Store, slide_id: str, grid_key: str, plan: QualityPlan, judged: Iterable[tuple[Block, bytes]]
) -> None:
    """Write the focus of the patches that a run has read, in one object; nothing is done where none was measured.

    Parameters
    ----------
    judged
        Blocks with their bits, as `featurestore.embedding.block_task.BlockResult` holds them: all blocks of the run.

    Raises
    ------
    StoreError
        If the flags cannot be written.
    """
    if plan.known is None:
        return
    # Not read again: two runs of the same command may be at the same slide, and between reading and writing one would lose
    # what the other wrote. Each run knows the flags of all patches at its end, so whichever writes last writes all.
    quality = plan.known.copy()
    for block, bits in judged:
        quality[block.slices] |= np.frombuffer(bits, np.uint8).reshape(block.shape)
    store.write_quality(slide_id, grid_key, quality)
