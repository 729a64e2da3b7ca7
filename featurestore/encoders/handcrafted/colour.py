"""Mean and standard deviation of R, G and B: the floor that texture has to beat."""

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.protocol import Encoder, EncoderExtension, EncoderIdentity, EncoderOptions
from featurestore.errors import EncoderError

VERSION = 1
COLOURS = ("red", "green", "blue")
EXACT_ROWS = 256
"""Rows of pixels that are added up at once: 256 x 255 fits into 16 bits, and 256 x 255 x 255 is exact in float32."""


def feature_names() -> tuple[str, ...]:
    """Return the name of each number of the vector, in order."""
    return tuple(f"{colour}.{stat}" for stat in ("mean", "sd") for colour in COLOURS)


class ColourEncoder:
    """Six numbers a patch, each in [0, 1]; always on the CPU, where it costs less than the way to a GPU.

    Parameters
    ----------
    options
        There are no weights to name; a device that is not there is refused all the same.

    Raises
    ------
    EncoderError
        If weights are named, or the device is not there.
    """

    def __init__(self, options: EncoderOptions) -> None:
        from featurestore.encoders.device import pick_device

        if options.weights is not None:
            raise EncoderError(
                f"colour has no weights, so {options.weights} cannot be loaded: leave --weights out"
            )
        pick_device(options.device)  # only to refuse what the other encoders of a run would refuse
        facts = {"algorithm": "mean and sd of RGB / 255", "version": VERSION, "dtype": "float32"}
        self._identity = EncoderIdentity("colour", len(feature_names()), facts)

    @property
    def identity(self) -> EncoderIdentity:
        """What this encoder is."""
        return self._identity

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch, ``(n, height, width, 3)`` -> ``(n, 6)``; n may be 0."""
        n, height, width = patches.shape[:3]
        sums, squares = (np.zeros((n, width * len(COLOURS))) for _ in range(2))
        # Patch by patch: a whole batch of 224 px would leave the processor's caches.
        for i, patch in enumerate(patches.reshape(n, height, width * len(COLOURS))):
            for top in range(0, height, EXACT_ROWS):
                values = patch[top : top + EXACT_ROWS].astype(np.uint16)
                # Whole rows are added up, whose dtype is wide enough: numpy does that with vector instructions, while
                # means of three columns of floats, with which this began, took thirty times as long.
                sums[i] += np.add.reduce(values, 0, dtype=np.uint16)
                np.multiply(values, values, out=values)
                squares[i] += np.add.reduce(values.astype(np.float32), 0)
        sums, squares = (found.reshape(n, width, len(COLOURS)).sum(1) for found in (sums, squares))
        pixels = height * width
        mean = sums / pixels
        # No digits are lost in the difference: both terms are whole numbers divided by the pixels, in float64.
        variance = np.maximum(squares / pixels - mean * mean, 0)
        return (np.concatenate([mean, np.sqrt(variance)], axis=1) / 255).astype(np.float32)


def _load(key: str, options: EncoderOptions) -> Encoder:
    return ColourEncoder(options)


RECORD = EncoderExtension(
    "colour",
    "mean and standard deviation of R, G, B: the floor that texture has to beat",
    6,
    _load,
    takes_weights=False,
)
