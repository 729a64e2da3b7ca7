"""Ridge regression on the embedding under each spot: the baseline that the field quotes, with its penalty chosen.

Linear in log1p(CP10k). A patch's prediction depends on its own embedding alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import spot_embeddings
from histosge.models.linear_algebra import (
    Affine,
    RidgePath,
    Standardiser,
    choose_penalty,
    principal_axes,
    spatial_groups,
)
from histosge.models.nested_state import read_config
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord
from histosge.models.scale_ridges import MAX_GROUPS

MAX_DIM = 256
"""Wider embeddings are first reduced to this many principal components, as HEST-Benchmark does."""


@dataclass(frozen=True)
class RidgeModel:
    """log1p(CP10k) = max(0, embedding @ weight + offset).

    Parameters
    ----------
    affine
        From an embedding to genes: standardiser, principal components and ridge in one.
    penalty, n_components
        As chosen; 0 components if the embedding was used as it is.
    """

    name: ClassVar[str] = "ridge"
    affine: Affine
    penalty: float
    n_components: int

    @property
    def halo_um(self) -> float:
        """Return 0: no neighbouring patch is needed."""
        return 0.0

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Solve in closed form; seed and epochs have no effect.

        The penalty is the best on training sections left out in turn, or on stripes of a lone section; of more than
        `MAX_GROUPS` sections, several are left out together.
        """
        X = np.concatenate([spot_embeddings(s.overlap, s.patches) for s in sections])
        Y = np.concatenate([s.target for s in sections]).astype(np.float64)
        standardiser = Standardiser.fit(X)
        X = standardiser.apply(X)
        axes = principal_axes(X, MAX_DIM) if X.shape[1] > MAX_DIM else None
        # Components are not standardised again: ridge then shrinks the minor ones, which are mostly noise, more.
        X = X @ axes if axes is not None else X
        penalty = choose_penalty(X, Y, spatial_groups(sections) % MAX_GROUPS)
        affine = RidgePath.fit(X, Y).solve(penalty)
        # One map from embeddings to genes: prediction computes no components.
        if axes is not None:
            affine = Affine(axes @ affine.weight, affine.offset)
        n_components = axes.shape[1] if axes is not None else 0
        return cls(affine.after(standardiser), penalty, n_components)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        predicted = self.affine(patches.embedding)
        return np.maximum(predicted, 0.0, out=predicted).astype(np.float32)

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        return {"penalty": self.penalty, "n_components": self.n_components}

    def state(self) -> State:
        """Return the map."""
        return self.affine.state()

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        chosen = read_config(config, _Config)
        return cls(Affine.from_state(state), chosen.penalty, chosen.n_components)


class _Config(msgspec.Struct):
    """What `RidgeModel.config` wrote."""

    penalty: float
    n_components: int


RECORD = ModelRecord(
    "ridge", "baseline: ridge regression on the embedding under each spot", lambda: RidgeModel
)
