"""How much memory a worker will hold, said before it starts: arithmetic on the sizes of what it keeps.

It is an upper bound for slides that are read by tiles; flat pictures and flat TIFFs are held whole besides.
"""

from collections.abc import Sequence

from featurestore.grid import PatchGrid

MB = 1_000_000
STRIPS_BYTES = 2 * 3 * 8 * MB
"""A strip of pixels, and the one that replaces it."""
SCALING_BYTES = 3 * 12 * 4 * MB
"""Source pixels as floats, and two steps of averaging."""
TILES_BYTES = 36 * MB
"""Decoded tiles that an open slide keeps."""
BATCHES = 7
"""Batches read ahead, being cut, and being encoded."""
ENCODER_BYTES = 250 * MB
"""What an encoder works in, on a CPU, besides its weights."""


def worker_bytes(
    base_bytes: int,
    grid: PatchGrid,
    dims: Sequence[int],
    *,
    threads: int,
    batch: int,
    block_shape: tuple[int, int],
    open_slides: int,
) -> int:
    """Bound the memory of one worker process.

    Parameters
    ----------
    base_bytes
        Of the process with its encoders loaded, before the first block.
    grid
        Of the widest slide.
    dims
        Of the encoders' vectors.
    threads
        Blocks at once.
    batch
        Patches in a batch.
    block_shape
        Patches in a block.
    open_slides
        Slides that stay open at once, at most.
    """
    patch_bytes = 3 * grid.spec.patch_px**2
    row_of_patches = (
        3 * 2 * grid.region_px((0, 1), (0, min(block_shape[1], grid.n_cols)))[2] * grid.spec.patch_px
    )
    block = block_shape[0] * block_shape[1] * sum(dims) * (4 + 2 + 2)
    per_thread = max(STRIPS_BYTES, row_of_patches) + SCALING_BYTES + BATCHES * batch * patch_bytes + block
    return base_bytes + threads * per_thread + open_slides * TILES_BYTES + ENCODER_BYTES
