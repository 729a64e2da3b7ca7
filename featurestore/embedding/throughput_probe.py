"""A dry run measures on the first slide how long a patch takes."""

import time
from collections.abc import Sequence
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.embedding.positions import patches_to_read
from featurestore.encoders.protocol import Encoder, patches_at_once
from featurestore.slides.patch_reader import read_batches
from featurestore.slides.protocol import Slide
from featurestore.storage.store import StoredGrid

PROBE_BATCHES = 3
"""Batches that are timed for a dry run's estimate, besides a first one that is not counted."""


class ThroughputProbe:
    """Measures seconds per patch of reading and encoding, once, on the first slide that has tissue.

    Parameters
    ----------
    encoders
        All that a patch goes through.
    """

    def __init__(self, encoders: dict[str, Encoder]) -> None:
        self._encoders = encoders
        self._seconds: float | None = None

    def seconds_per_patch(self, slide: Slide, stored: StoredGrid, blocks: Sequence[Block]) -> float:
        """Return the measured value, measuring it first if necessary; 0 as long as no slide had tissue."""
        if self._seconds is None and blocks:
            middle = blocks[len(blocks) // 2]  # the first one may hold little but the edge of the tissue
            grid = stored.grid
            wanted = patches_to_read(stored.is_tissue[middle.slices], grid)
            size = patches_at_once(self._encoders.values())
            batches = read_batches(slide, grid.encoded, middle.coarser(grid.tokens), wanted, size)
            self._encode(next(batches).pixels)  # not timed: buffers and kernels are set up here
            begun, patches = time.perf_counter(), 0
            for batch in islice(batches, PROBE_BATCHES):
                self._encode(batch.pixels)
                patches += len(batch.pixels)
            if patches:
                self._seconds = (time.perf_counter() - begun) / patches
        return self._seconds or 0.0

    def _encode(self, pixels: NDArray[np.uint8]) -> None:
        for encoder in self._encoders.values():
            encoder.encode(pixels)
