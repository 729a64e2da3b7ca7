"""The embedded default encoder: stains, texture and nuclei, by arithmetic alone.

No weights, no network, nothing fitted: the same patch gives the same vector everywhere. It will not
compete with a PILM; it is what runs on any machine, and the floor that a PILM has to beat.
Every number has a name (`feature_names`); docs/morphology.md explains them.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featurestore.encoders import stain_separation
from featurestore.encoders.device import pick_device
from featurestore.encoders.handcrafted.colour import measure_colours
from featurestore.encoders.handcrafted.morphology_features import (
    moments,
    nuclei,
    oriented_filters,
    stain_statistics,
)
from featurestore.encoders.handcrafted.morphology_features.moments import halve
from featurestore.encoders.handcrafted.morphology_features.parallel_pieces import map_pieces
from featurestore.encoders.protocol import EncoderIdentity, EncoderOptions
from featurestore.errors import EncoderError

VERSION = 1
"""Part of the identity: raised with any change that moves a number by more than storing it as float16 does. Stores are
resumed by later versions of the software, so the last bits of a sum may change and a count or a percentile may not."""
MIN_SIDE = 32
"""Pixels. The coarsest octave is a sixteenth of the side: two positions, the fewest that can differ."""
CHUNK_PX = {"cpu": 1 << 19, "cuda": 1 << 23}
"""Pixels computed at once: on a CPU 8 patches of 224 px, which share the cost of calling small operations on the coarse
octaves. One patch at a time took twice as long; 16 were 4 % faster and left cores idle at the end of each batch."""
MOST = {"cpu": 16, "cuda": 1 << 12}
"""Patches computed at once, at most: a chunk is always whole, however few patches there are."""
PIECE_PX = {"cpu": 1 << 17, "cuda": 1 << 23}
"""Pixels of which maps at full scale are held at once: on a CPU two patches of 224 px; the whole chunk was 3 % slower."""


def feature_names() -> tuple[str, ...]:
    """Return the name of each number of the vector, in order."""
    return (*stain_statistics.names(), *oriented_filters.names(), *nuclei.names())


class MorphologyEncoder:
    """Handcrafted morphology behind the `Encoder` protocol.

    Parameters
    ----------
    options
        `device` counts; there are no weights to name or to draw.

    Raises
    ------
    EncoderError
        If weights are named, or the device is not there.
    """

    def __init__(self, options: EncoderOptions) -> None:
        if options.weights is not None:
            raise EncoderError(
                f"morphology has no weights, so {options.weights} cannot be loaded: leave --weights out"
            )
        self._device = pick_device(options.device)
        self._table = stain_separation.density_table().to(self._device)
        self._unmixing = stain_separation.unmixing().to(self._device)
        self._bank = oriented_filters.FilterBank.from_filters(oriented_filters.filters(), self._device)
        self._blur = nuclei.GaussianBlur(nuclei.gaussians(), self._device)
        # Hashed into the fingerprints that stores hold: names and values never change within a version.
        facts = {
            "algorithm": "morphology",
            "version": VERSION,
            "dtype": "float32",
            "moments": moments.facts(),
            "stain": stain_separation.facts(),
            "pixels": stain_statistics.facts(),
            "pyramid": oriented_filters.facts(),
            "nuclei": nuclei.facts(),
        }
        self._identity = EncoderIdentity("morphology", len(feature_names()), facts)

    @property
    def identity(self) -> EncoderIdentity:
        """What this encoder is."""
        return self._identity

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch.

        Parameters
        ----------
        patches
            RGB, shape ``(n, height, width, 3)``, sides of at least 32 px; n may be 0.

        Returns
        -------
        numpy.ndarray
            Shape ``(n, dim)``, as `feature_names` orders it.

        Raises
        ------
        EncoderError
            If the patches have another shape or dtype, or are too small.
        """
        check_patches(patches, MIN_SIDE)
        n, height, width, _ = patches.shape
        if n == 0:
            return np.empty((0, self._identity.dim), dtype=np.float32)
        fits = min(MOST[self._device.type], max(1, CHUNK_PX[self._device.type] // (height * width)))
        size = 1 << (
            fits.bit_length() - 1
        )  # a power of two, or the last chunk of each batch would be mostly padding

        def reduce_chunk(start: int) -> list[list[Tensor]]:
            chunk = patches[start : start + size]
            # Always full chunks: a row must not depend on how many patches came with it.
            full = np.zeros((size, height, width, 3), dtype=np.uint8)
            full[: len(chunk)] = chunk
            reduced = self._reduce(torch.from_numpy(full).to(self._device))
            return [[part[: len(chunk)] for part in parts] for parts in reduced]

        # One stream of work for a GPU; on a CPU every core takes a chunk.
        run = map if self._device.type == "cuda" else map_pieces
        chunks = list(run(reduce_chunk, range(0, n, size)))
        with torch.inference_mode():
            stains, texture, blobs = (
                [torch.cat(parts) for parts in zip(*kind, strict=True)] for kind in zip(*chunks, strict=True)
            )
            # Sums of bytes are fastest where the bytes are.
            colours = torch.from_numpy(measure_colours(patches)).to(self._device)
            parts = [
                stain_statistics.describe(colours, stains),
                oriented_filters.describe(texture),
                nuclei.describe(blobs),
            ]
            return torch.cat(parts, dim=1).cpu().numpy()

    # Per call, not once: inference mode belongs to a thread, and chunks are reduced in several.
    @torch.inference_mode()
    def _reduce(self, patches: Tensor) -> list[list[Tensor]]:
        halves, finest, blobs = [], [], []
        size = max(1, PIECE_PX[self._device.type] // patches[0, ..., 0].numel())
        for start in range(0, len(patches), size):
            piece = patches[start : start + size]
            stains = stain_separation.separate(piece, self._table, self._unmixing)
            halves.append(halve(stains))
            blobs.append(nuclei.respond(halves[-1], self._blur))
            finest.append(oriented_filters.filter_finest(stains, self._bank))
        half = torch.cat(halves)
        return [
            stain_statistics.reduce(half),
            oriented_filters.reduce(oriented_filters.join(finest), half, self._bank),
            nuclei.reduce(torch.cat(blobs), half),
        ]


def check_patches(patches: NDArray[np.uint8], min_side: int) -> None:
    """Refuse what is no batch of RGB patches.

    Raises
    ------
    EncoderError
        With the shape and dtype that came.
    """
    if patches.ndim != 4 or patches.shape[3] != 3 or patches.dtype != np.uint8:
        raise EncoderError(
            f"patches must be uint8 of shape (n, height, width, 3), not {patches.dtype} of shape {patches.shape}"
        )
    if min(patches.shape[1:3]) < min_side:
        raise EncoderError(
            f"patches of {patches.shape[1]} x {patches.shape[2]} px are too small: use a patch of at least {min_side} px"
        )
