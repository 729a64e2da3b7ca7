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
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.records import find, records
from featurestore.errors import EncoderError, FeatureStoreError

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
    """How to load an encoder. `weights` and `precision` change what the vectors mean, and so the fingerprint.

    Parameters
    ----------
    weights
        A local file, or None for the published weights.
    random_weights
        Use seeded random weights: for tests and dry runs only.
    device
        ``auto``, ``cpu`` or ``cuda``.
    precision
        ``fp32``, ``fp16``, ``bf16``, or ``auto``: as the encoder's authors advise, where the device can.
    compile
        Compile the network with torch: minutes at the start, faster after.
    engine
        ``torch``, or ``openvino`` on a CPU.
    """

    weights: str | None = None
    random_weights: bool = False
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    engine: str = "torch"


def _load_morphology(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.handcrafted.morphology import MorphologyEncoder

    return MorphologyEncoder(options)


def _load_colour(key: str, options: EncoderOptions) -> Encoder:
    from featurestore.encoders.handcrafted.colour import ColourEncoder

    return ColourEncoder(options)


HANDCRAFTED: dict[str, tuple[Callable[[str, EncoderOptions], Encoder], int, str]] = {
    "morphology": (
        _load_morphology,
        164,
        "handcrafted: stain statistics, oriented filters, nuclei; no weights, no network",
    ),
    "colour": (_load_colour, 6, "mean and standard deviation of R, G, B: the floor that texture has to beat"),
}
"""Key -> (loader, width, one line about it)."""

TIMM_PREFIX = "timm:"
ENTRY_POINTS = "histosge.encoders"
"""Group under which other packages offer encoders: key = a callable ``(key, options) -> Encoder``."""


def third_party() -> dict[str, EntryPoint]:
    """Return the encoders that installed packages offer, by key; nothing is imported."""
    return {point.name: point for point in entry_points(group=ENTRY_POINTS)}


def load_encoder(key: str, options: EncoderOptions | None = None) -> Encoder:
    """Load an encoder by its key.

    Raises
    ------
    EncoderError
        If the key is unknown (the nearest names are given), the weights cannot be had or they do not fit.
    """
    options = options or EncoderOptions()
    if key in HANDCRAFTED:
        return HANDCRAFTED[key][0](key, options)
    record = find(key)
    if record is not None:
        from featurestore.encoders.vision import load_record

        return load_record(record, options)
    if key.startswith(TIMM_PREFIX):
        from featurestore.encoders.vision import load_timm

        return load_timm(key, options)
    others = third_party()
    if key in others:
        return _load_third_party(key, others[key], options)
    known = [*HANDCRAFTED, *records(), *others]
    near = get_close_matches(key.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else "see: histosge encoders"
    raise EncoderError(f"unknown encoder {key!r}: {hint}")


def _load_third_party(key: str, point: EntryPoint, options: EncoderOptions) -> Encoder:
    try:
        encoder: Encoder = point.load()(key, options)
    except FeatureStoreError:
        raise
    except Exception as error:
        raise EncoderError(
            f"encoder {key!r} of {point.value} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    if encoder.identity.key != key:
        raise EncoderError(
            f"encoder {key!r} of {point.value} calls itself {encoder.identity.key!r}; its author has to mend that"
        )
    return encoder


def canonical_key(key: str) -> str:
    """Return the key that a store records: ``uni@cls`` and ``uni`` are one encoder."""
    record = find(key)
    return key if record is None else record.key
