"""Inverse-distance mean of the nearest measured spots: how much position alone predicts.

It uses no embedding. Slides without training spots get the training mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from histosge.data.sections import Patches, TrainingSection
from histosge.models.nested_state import KnownSlides, read_config, take
from histosge.models.presets.mean import MeanModel
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord

NEIGHBOURS = 8
MIN_DISTANCE_UM = 1.0
"""Distances below count as this one: a patch on a spot takes that spot's value, without a division by zero."""


@dataclass(frozen=True)
class NeighbourModel:
    """Mean of the nearest training spots of the same slide, weighted by 1 / distance.

    Parameters
    ----------
    mean
        Of all training spots, ``(n_genes,)``.
    spots
        Slide id -> spot centres ``(n_spots, 2)`` in microns, and targets ``(n_spots, n_genes)``.
    """

    name: ClassVar[str] = "knn"
    baseline: ClassVar[str] = "measured neighbours"
    needs_position_on_slide: ClassVar[bool] = True
    mean: NDArray[np.float32]
    spots: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float32]]]

    @property
    def halo_um(self) -> float:
        """Return 0: no neighbouring patch is needed."""
        return 0.0

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Store the spots; seed and epochs have no effect."""
        return cls(
            MeanModel.fit(sections).mean, {s.patches.slide_id: (s.spot_xy_um, s.target) for s in sections}
        )

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        if patches.slide_id not in self.spots or len(patches) == 0:
            return np.tile(self.mean, (len(patches), 1))
        xy_um, target = self.spots[patches.slide_id]
        k = min(NEIGHBOURS, len(xy_um))
        # Given as a list, k makes the result two-dimensional for k = 1 as well.
        distance, nearest = cKDTree(xy_um).query(patches.xy_um, k=list(range(1, k + 1)))
        weight = 1 / np.maximum(distance, MIN_DISTANCE_UM)
        weight /= weight.sum(axis=1, keepdims=True)
        patch = np.repeat(np.arange(len(patches)), k)
        # As a sparse product: an array of (patches, neighbours, genes) would not fit in memory.
        mix = sparse.csr_matrix((weight.ravel(), (patch, nearest.ravel())), shape=(len(patches), len(xy_um)))
        return np.asarray(mix.astype(np.float32) @ target)

    def config(self) -> dict[str, Any]:
        """Return which slides it knows, in the order of the state's arrays."""
        return {"slides": list(self.spots), "neighbours": NEIGHBOURS}

    def state(self) -> State:
        """Return the spots of each slide, and the mean."""
        arrays: State = {"mean": self.mean}
        for i, (xy_um, target) in enumerate(self.spots.values()):
            arrays[f"xy_um.{i}"], arrays[f"target.{i}"] = xy_um, target
        return arrays

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        mean, slides = take(state, "mean", None), {}
        for i, name in enumerate(read_config(config, KnownSlides).slides):
            xy_um = take(state, f"xy_um.{i}", None, 2)
            slides[name] = xy_um, take(state, f"target.{i}", len(xy_um), len(mean))
        return cls(mean, slides)


RECORD = ModelRecord(
    "knn",
    "baseline: inverse-distance mean of the nearest measured spots, without the image",
    lambda: NeighbourModel,
)
