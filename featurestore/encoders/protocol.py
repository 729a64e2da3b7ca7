"""What an encoder is, and what one declares to be found by its key.

An encoder is exact: its identity covers weights, pooling, every preprocessing step and the
arithmetic's dtype, and is hashed into a fingerprint that travels with the embeddings. Two encoders
with one fingerprint give the same vectors; a store never mixes two.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featurestore.grid import TokenGridSpec

BATCH = 64
"""Patches that are passed to an encoder at once, unless it asks for more; encoders split or pad as they need."""


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
    # Facts, not code: two versions of a program that compute the same have one fingerprint.
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """sha256 over `dim` and `facts`; the key is a label and does not count."""
        # Sorted and without spaces: one text for one set of facts, on any machine and in any version.
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
            Embeddings, shape ``(n, dim)``, or ``(n, K, K, dim)`` of an encoder that was loaded for a token grid. A
            patch's row does not depend on the others in the batch.
        """
        ...


PendingVectors = Callable[[], NDArray[np.float32]]
"""Waits for the embeddings of a batch that was given to a device, and returns them."""


def start_encoding(encoder: Encoder, patches: NDArray[np.uint8]) -> PendingVectors:
    """Give a batch to an encoder without waiting for its device, if it has a method ``start``; else encode it now."""
    start: Callable[[NDArray[np.uint8]], PendingVectors] | None = getattr(encoder, "start", None)
    if start is not None:
        return start(patches)
    vectors = encoder.encode(patches)
    return lambda: vectors


def patches_at_once(encoders: Iterable[Encoder]) -> int:
    """Return how many patches to hand over in one batch: the most that any of the encoders asks for by ``batch``."""
    return max((int(getattr(encoder, "batch", BATCH)) for encoder in encoders), default=BATCH)


@dataclass(frozen=True)
class EncoderOptions:
    """How to load an encoder. `weights`, `precision`, `tokens` change what the vectors mean, and so the fingerprint.

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
    batch
        Patches in one pass of a network; None for 16 on a CPU, and on a GPU as many as its free memory allows. It is no
        part of the identity: vectors of two batch sizes differ in their last bits.
    tokens
        Give the K x K vectors of each patch that this grid has; None for one vector a patch.
    """

    weights: str | None = None
    random_weights: bool = False
    device: str = "auto"
    precision: str = "auto"
    compile: bool = False
    engine: str = "torch"
    batch: int | None = None
    tokens: TokenGridSpec | None = None


@dataclass(frozen=True)
class EncoderExtension:
    """What an encoder declares: a module's ``RECORD``, in our folder ``handcrafted`` or in any installed package.

    A package names its record under the entry-point group ``histosge.encoders``. The value may also be a plain
    callable ``(key, options) -> Encoder``.

    Parameters
    ----------
    name
        The key that a user types, and that a store records.
    help
        One line for help and documentation.
    dim
        Length of one embedding; None if only loading tells.
    load
        Called with the key and the options.
    takes_weights
        Whether ``--weights`` can be meant for it.
    """

    name: str
    help: str
    dim: int | None
    load: Callable[[str, EncoderOptions], Encoder]
    takes_weights: bool = True
