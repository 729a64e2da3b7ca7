"""The training mean: the baseline that every other model must beat."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.nested_state import take
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord


@dataclass(frozen=True)
class MeanModel:
    """Predict each gene's mean log1p(CP10k) over the training spots, everywhere.

    Parameters
    ----------
    mean
        Shape ``(n_genes,)``.
    """

    name: ClassVar[str] = "mean"
    baseline: ClassVar[str] = "no picture"
    mean: NDArray[np.float32]

    @property
    def halo_um(self) -> float:
        """Return 0: no neighbouring patch is needed."""
        return 0.0

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Average; seed and epochs have no effect."""
        targets = np.concatenate([section.target for section in sections])
        # In double precision: a float32 sum over many spots would lose digits.
        return cls(targets.mean(axis=0, dtype=np.float64).astype(np.float32))

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return the mean for every patch, ``(n_patches, n_genes)``."""
        return np.tile(self.mean, (len(patches), 1))

    def config(self) -> dict[str, Any]:
        """Return nothing: all is in the state."""
        return {}

    def state(self) -> State:
        """Return the mean."""
        return {"mean": self.mean}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        return cls(take(state, "mean", None))


RECORD = ModelRecord("mean", "baseline: the mean of the training spots", lambda: MeanModel)
