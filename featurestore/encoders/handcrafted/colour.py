"""Mean and standard deviation of R, G and B: the floor that texture has to beat."""

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.protocol import Encoder, EncoderExtension, EncoderIdentity, EncoderOptions
from featurestore.errors import EncoderError

VERSION = 1
COLOURS = ("red", "green", "blue")
MIDDLE = 128
"""Subtracted from each value, so that sums and squares need fewer bits."""
EXACT_ROWS = 256
"""Rows of pixels that are added up at once: their sums fit into 16 bits, and those of their squares into float32."""


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
        return measure_colours(patches)


def measure_colours(patches: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return mean and standard deviation of each colour, ``(n, height, width, 3)`` -> ``(n, 6)``, in [0, 1]."""
    n, height, width = patches.shape[:3]
    columns = width * len(COLOURS)
    sums, squares = (np.zeros((n, columns)) for _ in range(2))
    adder = _ColumnAdder(min(height, EXACT_ROWS), columns)
    # Patch by patch: a whole batch of 224 px would leave the processor's caches.
    for i, patch in enumerate(patches.reshape(n, height, columns)):
        for top in range(0, height, EXACT_ROWS):
            adder.add(patch[top : top + EXACT_ROWS], sums[i], squares[i])
    pixels = height * width
    mean, mean_square = (found.reshape(n, width, len(COLOURS)).sum(1) / pixels for found in (sums, squares))
    # Of whole numbers in float64: the difference loses no digit that float32 would hold.
    variance = np.maximum(mean_square - mean * mean, 0)
    return (np.concatenate([mean + MIDDLE, np.sqrt(variance)], axis=1) / 255).astype(np.float32)


class _ColumnAdder:
    """Exact sums over at most `EXACT_ROWS` rows, of ``value - MIDDLE`` and of its square, for each column.

    Whole rows are added up, in the narrowest type that holds the sums: numpy does that with vector instructions. Means
    of three columns of floats, with which this encoder began, took thirty times as long. What is computed on the way
    is kept in the same memory from patch to patch: memory that is taken anew costs more than the arithmetic.
    """

    def __init__(self, rows: int, columns: int) -> None:
        self._bytes = np.empty((rows, columns), np.uint8)
        self._centred = np.empty((rows, columns), np.int16)
        self._pairs = np.empty((rows // 2, columns), np.float32)

    def add(self, rows: NDArray[np.uint8], sums: NDArray[np.float64], squares: NDArray[np.float64]) -> None:
        """Add to the sums of each column."""
        count, half = len(rows), len(rows) // 2
        flipped, centred = self._bytes[:count], self._centred[:count]
        np.bitwise_xor(rows, np.uint8(MIDDLE), out=flipped)
        np.copyto(centred, flipped.view(np.int8))
        sums += np.add.reduce(centred, 0, dtype=np.int16)  # 256 x -128 just fits
        np.multiply(centred, centred, out=centred)
        # Two squares fit into 16 bits without a sign: with pairs, half as many numbers are left for the wider type.
        square = centred.view(np.uint16)
        pairs = square[:half]
        pairs += square[half : 2 * half]
        np.copyto(self._pairs[:half], pairs)
        squares += np.add.reduce(self._pairs[:half], 0)
        if count % 2:
            squares += square[-1]


def _load(key: str, options: EncoderOptions) -> Encoder:
    return ColourEncoder(options)


RECORD = EncoderExtension(
    "colour",
    "mean and standard deviation of R, G, B: the floor that texture has to beat",
    6,
    _load,
    takes_weights=False,
)
