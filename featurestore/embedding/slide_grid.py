"""The grid of one slide, refused where its patches or its blocks cannot be: too fine, too many, too large."""

from bisect import bisect_left
from dataclasses import replace

import psutil

from featurestore.blocks import whole_patches
from featurestore.credentials import strip_credentials
from featurestore.embedding.memory_model import memory_bytes, worker_bytes
from featurestore.encoders.protocol import BATCH
from featurestore.errors import SlideError
from featurestore.grid import GridSpec, PatchGrid, TokenGridSpec
from featurestore.slides.open_slide import mpp_difference
from featurestore.slides.protocol import Slide
from featurestore.slides.sample_sheet import Sample

MAX_GRID_PATCHES = 50_000_000
"""Patches of one slide. A process that plans holds some 15 bytes for each. A slide of 100,000 x 100,000 px at 0.25
microns has 39 million patches at --mpp 0.5 --stride 8, and with 1,024 features these are 80 GB of embeddings."""


def make_grid(slide: Slide, sample: Sample, spec: GridSpec) -> PatchGrid:
    """Return the grid of a slide.

    Raises
    ------
    SlideError
        If patches would be finer than the slide's pixels, as an encoder would see detail that is not in the file; or if
        there would be more than `MAX_GRID_PATCHES`.
    """
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, spec)
    finest = min(slide.level_mpps)
    if grid.effective_mpp < finest * (1 - 1e-6):  # mpp from metadata carries rounding errors
        raise SlideError(
            f"{strip_credentials(sample.slide)} has {finest:.4g} microns per pixel at best, which is coarser than "
            f"--mpp {spec.mpp:g}; give --mpp {finest:.4g} or more{_because(mpp_difference(slide, sample.mpp))}"
        )
    # Before anything is allocated: a stride of 1 px on a whole slide would take the machine's memory.
    if grid.n_rows * grid.n_cols > MAX_GRID_PATCHES:
        too_many = (
            f"{strip_credentials(sample.slide)} would have {grid.n_rows} x {grid.n_cols} patches, and a slide may have "
            f"{MAX_GRID_PATCHES // 10**6} million"
        )
        if isinstance(spec, TokenGridSpec):
            raise SlideError(f"{too_many}; give fewer --tokens, or a coarser --mpp")
        raise SlideError(f"{too_many}; give --stride {_least_stride(slide, spec)} or more")
    return grid


def _least_stride(slide: Slide, spec: GridSpec) -> int:
    """Return the smallest stride, in pixels, with which a slide has no more than `MAX_GRID_PATCHES` patches."""

    def fits(stride_px: int) -> bool:
        shifted = replace(spec, stride_px=stride_px)
        grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, shifted)
        return grid.n_rows * grid.n_cols <= MAX_GRID_PATCHES

    longest = spec.stride_px
    while not fits(longest):
        longest *= 2
    return bisect_left(range(longest + 1), True, lo=spec.stride_px, key=fits)


def check_block_fits(sample: Sample, grid: PatchGrid, dims: list[int], block_shape: tuple[int, int]) -> None:
    """Refuse a grid of which one block alone needs more memory than there is.

    Raises
    ------
    SlideError
        With both numbers.
    """
    block_shape = whole_patches(block_shape, grid.tokens)
    needed = worker_bytes(
        resident_bytes(), grid, dims, threads=1, batch=BATCH, block_shape=block_shape, open_slides=1
    )
    there = memory_bytes()
    if needed > there:
        rows, cols = (min(pair) // grid.tokens for pair in zip(block_shape, grid.shape, strict=True))
        patch_px = grid.encoded.spec.patch_px
        raise SlideError(
            f"{strip_credentials(sample.slide)}: a block of {rows} x {cols} patches of {patch_px} px needs about "
            f"{needed / 1e9:.1f} GB of memory, and there are {there / 1e9:.1f}; use smaller patches (--patch), or from "
            "Python a smaller block_shape"
        )


def _because(remark: str) -> str:
    """Return a remark as the end of a reason: a slide that fails has no plan to carry it."""
    return f" ({remark})" if remark else ""


def resident_bytes() -> int:
    """Return the resident memory of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)
