"""What an encoder is, and how one is found by its key.

An encoder is exact: its identity covers weights, pooling, every preprocessing step and the
arithmetic's dtype, and is hashed into a fingerprint that travels with the embeddings. Two encoders
with one fingerprint give the same vectors; a store never mixes two.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import EncoderError

DEFAULT_ENCODER = "morphology"


@dataclass(frozen=True)
class EncoderIdentity:
    """What makes an encoder's vectors mean what they mean.

    Parameters
    ----------
    key
        The name that a user types, such as ``morphology`` or ``timm:vit_small_patch16_224``.
    dim
        Length of one embedding.
    facts
        JSON-ready values that decide the vector: weights' sha256, pooling, steps, dtype, version.
    """

    key: str
    dim: int
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 over `dim` and `facts`; the key is a label and does not count."""
        text = json.dumps({"dim": self.dim, "facts": self.facts}, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


class Encoder(Protocol):
    """A PILM plus its exact preprocessing and pooling."""

    @property
    def identity(self) -> EncoderIdentity:
        """Return what this encoder is."""
        ...

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch.

        Parameters
        ----------
        patches
            RGB, shape ``(n, height, width, 3)``, any side; n may be 0.

        Returns
        -------
        numpy.ndarray
            Embeddings, shape ``(n, dim)``. A patch's row does not depend on the others in the batch.
        """
        ...


@dataclass(frozen=True)
class EncoderOptions:
    """How to load an encoder: none of it changes what the vectors mean, but `weights` does.

    Parameters
    ----------
    weights
        A local file, or None for the published weights.
    random_weights
        Use seeded random weights: for tests and dry runs only.
    device
        ``auto``, ``cpu`` or ``cuda``.
    """

    weights: str | None = None
    random_weights: bool = False
    device: str = "auto"


def _load_morphology(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.morphology import MorphologyEncoder

    return MorphologyEncoder(options)


def _load_colour(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.colour import ColourEncoder

    return ColourEncoder(options)


def _load_timm(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.vision import TimmEncoder

    return TimmEncoder(key, options)


ENCODERS: dict[str, tuple[Callable[[str, EncoderOptions], Encoder], str]] = {
    "morphology": (
        _load_morphology,
        "handcrafted: stain statistics, oriented filters, nuclei; no weights, no network",
    ),
    "colour": (_load_colour, "mean and standard deviation of R, G, B: the floor that texture has to beat"),
}
"""Key -> (loader, one line about it)."""

TIMM_PREFIX = "timm:"


def load_encoder(key: str, options: EncoderOptions | None = None) -> Encoder:
    """Load an encoder by its key.

    Raises
    ------
    EncoderError
        If the key is unknown (the nearest names are given) or the weights do not fit.
    """
    options = options or EncoderOptions()
    if key.startswith(TIMM_PREFIX):
        return _load_timm(key, options)
    if key not in ENCODERS:
        near = get_close_matches(key, ENCODERS, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(ENCODERS)}, timm:<name>"
        raise EncoderError(f"unknown encoder {key!r}: {hint}")
    return ENCODERS[key][0](key, options)
