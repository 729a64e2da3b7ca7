"""Mean and standard deviation of R, G and B: the floor that texture has to beat."""

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.protocol import Encoder, EncoderExtension, EncoderIdentity, EncoderOptions
from featurestore.errors import EncoderError

VERSION = 1
COLOURS = ("red", "green", "blue")


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
        found = np.empty((len(patches), 6), dtype=np.float32)
        for row, patch in zip(found, patches, strict=True):
            # Patch by patch: the floats of a whole batch of 224 px would leave the processor's caches.
            flat = patch.reshape(-1, 3).astype(np.float32) / 255
            row[:3], row[3:] = flat.mean(0), flat.std(0)
        return found


def _load(key: str, options: EncoderOptions) -> Encoder:
    return ColourEncoder(options)


RECORD = EncoderExtension(
    "colour",
    "mean and standard deviation of R, G, B: the floor that texture has to beat",
    6,
    _load,
    takes_weights=False,
)
