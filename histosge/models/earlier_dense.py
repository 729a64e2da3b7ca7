"""The linear part of `dense` as models of earlier versions hold it: read and applied, no longer fitted.

Such a model maps multiscale features, see `multiscale`, to patterns by one linear map, which was fitted as a stack of
ridge regressions and a Gaussian process.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import msgspec
import numpy as np

from histosge.data.embedded_slide import Reduce
from histosge.data.sections import Patches
from histosge.models.linear_algebra import Affine, Floats, Indices
from histosge.models.multiscale import HALO_UM, MOMENTS, MultiscaleFeatures
from histosge.models.nested_state import nest, read_config, take, unnest
from histosge.models.protocol import State


@dataclass(frozen=True)
class MomentProjection:
    """From embeddings to patterns by way of multiscale features.

    Parameters
    ----------
    features
        Embeddings -> features.
    affine
        Features -> patterns.
    depth
        Features -> log of a spot's total counts, one output; None if no counts were given in training.
    penalties, weights
        As they were chosen, for the config alone.
    """

    features: MultiscaleFeatures
    affine: Affine
    depth: Affine | None
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...]

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return HALO_UM

    def project(self, patches: Patches, of: Indices | None = None) -> Floats:
        """Return patterns, and depth last where it is predicted, ``(n, n_outputs)``."""
        if self.depth is None:
            return self.features.project(patches, self.affine, of)
        # One more output of the same projection: pooling, which costs most, is done once for both.
        both = Affine(
            np.hstack([self.affine.weight, self.depth.weight]),
            np.concatenate([self.affine.offset, self.depth.offset]),
        )
        return self.features.project(patches, both, of)

    def split(self) -> tuple[Reduce | None, Self]:
        """Return the reduction of embeddings to components, and what takes those."""
        reduce, features = self.features.split()
        return reduce, replace(self, features=features)

    def config(self) -> dict[str, Any]:
        """Return what was chosen, under the names of those versions."""
        return {
            "views": [list(moment) for moment in MOMENTS],
            "penalties": [list(per_pattern) for per_pattern in self.penalties],
            "weights": list(self.weights),
        }

    def state(self) -> State:
        """Return the arrays."""
        depth = {} if self.depth is None else nest("depth", self.depth.state())
        return {**self.features.state(), **nest("linear", self.affine.state()), **depth}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State, n_patterns: int) -> Self:
        """Rebuild, after the arrays' shapes were compared."""
        chosen, depth = read_config(config, _Config), unnest("depth", state)
        features = MultiscaleFeatures.from_state(state)
        n_features = len(features.centre) * len(MOMENTS)
        take(state, "linear.weight", n_features, n_patterns)
        if depth:
            take(state, "depth.weight", n_features, 1)
        return cls(
            features,
            Affine.from_state(unnest("linear", state)),
            Affine.from_state(depth) if depth else None,
            chosen.penalties,
            chosen.weights,
        )


class _Config(msgspec.Struct):
    """What `config` wrote. Models of the first versions have no weights."""

    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] = ()
