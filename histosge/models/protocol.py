"""What every model is: the protocol behind all presets, and behind a model of your own.

A model learns from spots and predicts patches. What it is scored on is what a user gets: the map
of the patches, averaged under each spot's disc.

A class needs the attributes and methods of `Model` and nothing else. What it can do beyond that is given by attributes
of the class, each with a default (`Capabilities`), and by further methods (the protocols at the end). Training,
prediction and evaluation read these and know no preset by its name.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeGuard, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from histosge.data.embedded_slide import Reduce

State = dict[str, NDArray[Any]]
"""Named arrays: what safetensors can hold."""
SQUARED_ERROR = "mse"
"""The loss that every model has: for it, `fit` gets no ``loss`` argument."""


@dataclass(frozen=True)
class Capabilities:
    """What a model class can do beyond the protocol: one attribute of the class each, these values where it has none.

    Parameters
    ----------
    needs_position_on_slide
        True if it only knows the slides that it was trained on (spatial interpolation). It is left out where an
        evaluation holds out whole slides.
    losses
        What `fit` takes as ``loss``, ``mse`` included. `fit` of a class with ``mse`` alone gets no such argument.
    takes_stain_pairs
        Whether it uses `TrainingSection.stain_pairs`; only then are patches encoded in other stains for it.
    resumable
        Whether its training goes on from a checkpoint.
    calibrated_by_default
        Whether training also measures intervals, which costs up to four more fits. False suits slow models.
    baseline
        What a baseline works with, in a few words for reports; empty for a model that is meant to be used.
    """

    # Defaults are those of a simple, fast model of the image: what most classes are need not be said.
    needs_position_on_slide: bool = False
    losses: tuple[str, ...] = (SQUARED_ERROR,)
    takes_stain_pairs: bool = False
    resumable: bool = False
    calibrated_by_default: bool = True
    baseline: str = ""


def capabilities(model: object) -> Capabilities:
    """Read what a model class, or an object that fits models, can do."""
    # Attributes, not a base class: a third party's class need import nothing of ours.
    offered: dict[str, Any] = {
        field.name: getattr(model, field.name) for field in fields(Capabilities) if hasattr(model, field.name)
    }
    return Capabilities(**offered)


class Model(Protocol):
    """Maps embeddings to expression."""

    name: ClassVar[str]
    """Under which it is shown in tables."""

    # Asked of the fitted model, not of the class: it may depend on what was fitted.
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
            Passes over the spots, for models that iterate; None means the model's own. Others ignore it.
        """
        ...

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, shape ``(n_patches, n_genes)``."""
        ...

    # JSON and safetensors, never pickle: a model folder from elsewhere must be able to hold data alone.
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
class Estimator(Protocol):
    """What fits a model: a model class, or an object whose `fit` returns a fitted model."""

    def fit(self, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Model:
        """Fit a model, see `Model.fit`."""
        ...


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
        """Return it in one line."""
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
