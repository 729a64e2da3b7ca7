"""An estimate of the memory that a worker will hold, before it starts: arithmetic on the sizes of its buffers.

Each size is the constant of the module that keeps the memory, so the two cannot drift apart. The result is an upper
bound for slides that are read by tiles; flat pictures and flat TIFFs are held whole besides.
"""

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from featurestore.grid import PatchGrid
from featurestore.slides import patch_reader, pyramid_slide, read_ahead

RGB_BYTES = 3
WRITERS = 2
"""Blocks that are written while the next ones are encoded: a write to S3 takes as long as encoding some batches."""
ENCODER_BYTES = 250_000_000
"""What an encoder works in, on a CPU, besides its weights: a margin, held against the peak of a real run by a test."""

CONTAINER_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Where Linux states the limit of a container: version 2 of control groups, and version 1."""


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
    patches = grid.encoded  # what is read; vectors are as many as the positions of `grid`
    patch_px = patches.spec.patch_px
    rows, cols = min(block_shape[0], grid.n_rows), min(block_shape[1], grid.n_cols)
    batch = min(batch, rows * cols // grid.tokens**2)
    block_width_px = patches.region_px((0, 1), (0, cols // grid.tokens))[2]
    # A strip is at least one row of patches. It is there twice: the next one is read before the last is dropped.
    strips = 2 * RGB_BYTES * max(patch_reader.MAX_STRIP_PX, block_width_px * patch_px)
    # Source pixels as float32 RGB, and the two products of averaging them down and across.
    scaling = 3 * 4 * RGB_BYTES * pyramid_slide.MAX_SOURCE_PX
    # Beside those in the queue: one that waits for a place in it, one that is encoded, and its copy when an encoder
    # joins the batches of several threads.
    batches = (read_ahead.READ_AHEAD + 3) * batch * RGB_BYTES * patch_px**2
    # Vectors as the encoder's float32, as float16, and as the float16 of the blocks that are being written.
    vectors = rows * cols * sum(dims) * (4 + 2 + 2 * WRITERS)
    per_thread = strips + scaling + batches + vectors
    return base_bytes + threads * per_thread + open_slides * _tiles_bytes() + ENCODER_BYTES


def memory_bytes() -> int:
    """Return the memory that this process may use, at most: of the machine, or of the container."""
    found = [int(psutil.virtual_memory().total)]
    for file in CONTAINER_LIMITS:
        # Not there outside a container; "max" where it has no limit.
        with suppress(OSError, ValueError):
            found.append(int(Path(file).read_text()))
    return min(found)


def _tiles_bytes() -> int:
    """Return the bytes of decoded tiles that an open slide keeps."""
    # Here, since the reader loads OpenSlide: a process that reads no slide need not have it.
    from featurestore.slides.readers import jpeg_tile_reader

    return RGB_BYTES * jpeg_tile_reader.CACHED_PX
