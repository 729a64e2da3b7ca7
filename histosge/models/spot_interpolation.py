"""Interpolation of measured spots: what position alone gives, without the image.

The presets `nearest`, `linear` and `cubic` differ in the interpolator alone, which is scipy's. They know the slides
that they were trained on and no others: a slide without training spots is refused, where `knn` gives the mean.
Between spots all three interpolate log1p(CP10k). Outside the spots' convex hull `linear` and `cubic` have no
triangle to interpolate in, and take the value of the nearest spot.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import QhullError, cKDTree

from histosge.data.sections import Patches, TrainingSection
from histosge.errors import ModelError
from histosge.models.linear_algebra import Floats
from histosge.models.low_rank_targets import MAX_LOG
from histosge.models.nested_state import KnownSlides, read_config, take
from histosge.models.protocol import State

Interpolator = Callable[[Floats], Floats]
"""From positions ``(n, 2)`` to values ``(n, n_genes)``; NaN where it is not defined."""
# A slide of 100,000 patches and 1,000 genes would be 800 MB in the interpolator's double precision.
_PATCHES_AT_ONCE = 4096


@dataclass(frozen=True)
class SpotInterpolation(ABC):
    """Interpolate the training spots of the same slide.

    Parameters
    ----------
    spots
        Slide id -> spot centres ``(n_spots, 2)`` in microns, and targets ``(n_spots, n_genes)``.
    """

    name: ClassVar[str]
    baseline: ClassVar[str] = "measured neighbours"
    needs_position_on_slide: ClassVar[bool] = True
    # Intervals are measured on sections that are left out, which interpolation cannot predict.
    calibrated_by_default: ClassVar[bool] = False
    spots: Mapping[str, tuple[Floats, NDArray[np.float32]]]

    @staticmethod
    @abstractmethod
    def interpolate(xy_um: Floats, target: NDArray[np.float32]) -> Interpolator:
        """Return the interpolator of one slide's spots."""

    @property
    def halo_um(self) -> float:
        """Return 0: no neighbouring patch is needed."""
        return 0.0

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Store the spots; seed and epochs have no effect.

        Raises
        ------
        ModelError
            If the spots of a section form no triangle, and the preset needs one.
        """
        model = cls({s.patches.slide_id: (s.spot_xy_um, s.target) for s in sections})
        # Here and not in prediction: the message must reach whoever chose the sections.
        for slide_id in model.spots:
            model._interpolator(slide_id)
        return model

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``.

        Raises
        ------
        ModelError
            If the slide has no training spots.
        """
        if patches.slide_id not in self.spots:
            known = ", ".join(list(self.spots)[:5]) + (", ..." if len(self.spots) > 5 else "")
            raise ModelError(
                f"{self.name} interpolates between measured spots and has none of slide {patches.slide_id!r}: "
                f"predict a slide that it was trained on ({known}), or train another preset, such as ridge"
            )
        target = self.spots[patches.slide_id][1]
        out = np.empty((len(patches), target.shape[1]), np.float32)
        interpolate, xy_um = self._interpolator(patches.slide_id), patches.xy_um
        for start in range(0, len(out), _PATCHES_AT_ONCE):
            part = slice(start, start + _PATCHES_AT_ONCE)
            values = interpolate(xy_um[part])
            outside = np.isnan(values).any(axis=1)
            if outside.any():
                values[outside] = self._nearest(patches.slide_id, xy_um[part][outside])
            # A cubic overshoots: no count is negative, and no gene has more than all counts.
            out[part] = np.clip(values, 0.0, MAX_LOG)
        return out

    def _nearest(self, slide_id: str, xy_um: Floats) -> NDArray[np.float32]:
        spot_xy_um, target = self.spots[slide_id]
        return target[cKDTree(spot_xy_um).query(xy_um)[1]]

    @cached_property
    def _made(self) -> dict[str, Interpolator]:
        return {}

    def _interpolator(self, slide_id: str) -> Interpolator:
        """Return a slide's interpolator; made once, as a map is predicted block by block."""
        if slide_id not in self._made:
            xy_um, target = self.spots[slide_id]
            try:
                self._made[slide_id] = self.interpolate(xy_um, target)
            except (QhullError, ValueError) as error:
                raise ModelError(
                    f"{self.name} needs at least 3 spots that do not lie on one line, and slide {slide_id!r} has "
                    f"{len(xy_um)} spots without such a triangle: leave the slide out, or use nearest or knn"
                ) from error
        return self._made[slide_id]

    def config(self) -> dict[str, Any]:
        """Return which slides it knows, in the order of the state's arrays."""
        return {"slides": list(self.spots)}

    def state(self) -> State:
        """Return the spots of each slide."""
        arrays: State = {}
        for i, (xy_um, target) in enumerate(self.spots.values()):
            arrays[f"xy_um.{i}"], arrays[f"target.{i}"] = xy_um, target
        return arrays

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        slides: dict[str, tuple[Floats, NDArray[np.float32]]] = {}
        n_genes = take(state, "target.0", None, None).shape[1]
        for i, name in enumerate(read_config(config, KnownSlides).slides):
            xy_um = take(state, f"xy_um.{i}", None, 2)
            slides[name] = xy_um, take(state, f"target.{i}", len(xy_um), n_genes)
        return cls(slides)
