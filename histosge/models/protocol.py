"""What every model is: the one protocol behind all presets.

A model learns from spots and predicts patches. What it is scored on is what a user gets: the map
of the patches, averaged under each spot's disc.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol, Self, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import Reduce
from histosge.data.sections import Patches, TrainingSection
from histosge.models.checkpoint import Checkpoint

State = dict[str, NDArray[Any]]
"""Named arrays: what safetensors can hold."""


class Model(Protocol):
    """Maps embeddings to expression."""

    name: ClassVar[str]
    needs_position_on_slide: ClassVar[bool]
    """True if the model only knows the slides that it was trained on (spatial interpolation)."""

    @property
    def halo_um(self) -> float:
        """Return how far beyond a patch the model looks: what a stream must read around each block."""
        ...

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Learn from sections.

        Parameters
        ----------
        sections
            At least one; all share the same genes and embedding dimension.
        seed
            Same seed, same machine: the same model, bit for bit.
        epochs
            Passes over the spots, for presets that iterate; None means the preset's own.
        """
        ...

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, shape ``(n_patches, n_genes)``."""
        ...

    def config(self) -> dict[str, Any]:
        """Return JSON-ready values that, with `state`, rebuild the model."""
        ...

    def state(self) -> State:
        """Return the learned arrays."""
        ...

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild a model that predicts bit-equal to the one that was saved."""
        ...


class ResumableModel(Model, Protocol):
    """A model that iterates, and goes on from a checkpoint where its training was interrupted."""

    resumable: ClassVar[bool]
    """True: `fit` takes a checkpoint. Models without this attribute are never given one."""

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Self:
        """Learn from sections, as `Model.fit` does.

        Parameters
        ----------
        checkpoint
            Restored before the first epoch and saved after each; None keeps nothing. A training that was
            interrupted and repeated gives the same bits as an undisturbed one.
        """
        ...


def is_resumable(model: type[Model]) -> TypeGuard[type[ResumableModel]]:
    """Tell whether a model class can be given a checkpoint."""
    return bool(getattr(model, "resumable", False))


@runtime_checkable
class PartialModel(Protocol):
    """A model that does not pay for the patches of a halo in full."""

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what `predict` does for the patches `of`, ``(len(of), n_genes)``."""
        ...


@runtime_checkable
class ReducingModel(Protocol):
    """A model that first turns each embedding into fewer numbers: of patches in several windows, once is enough."""

    def split(self) -> "tuple[Reduce | None, Model]":
        """Return what embeddings are turned into first, ``(n, dim) -> (n, fewer)``, and the model that takes those.

        None, and the model itself, where embeddings are used as they are.
        """
        ...


@runtime_checkable
class RemarkingModel(Protocol):
    """A model that decided something which its user should know."""

    @property
    def remark(self) -> str:
        """OnMessage it in one line."""
        ...


@runtime_checkable
class DepthModel(Protocol):
    """A model that predicts depth apart from composition."""

    @property
    def depth(self) -> object | None:
        """Return what predicts depth; None where training gave no total counts."""
        ...

    def predict_with_depth(
        self, patches: Patches, of: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return log1p(CP10k) of the patches `of`, ``(len(of), n_genes)``, and log of total counts, ``(len(of),)``."""
        ...
