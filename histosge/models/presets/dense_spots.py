"""`dense` conditioned on the spots of the slide itself: the picture, plus what it leaves over in space.

Two routes to the same end are averaged, none selected: the image model with its leftover interpolated, and
one Gaussian process over position and views together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.low_rank_targets import FLOOR, bend
from histosge.models.presets.dense import DenseModel
from histosge.models.presets.gp import GaussianProcessModel
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord
from histosge.models.residual_kriging import Leftover


@dataclass(frozen=True)
class DenseSpotsModel:
    """log1p(CP10k) = bend((dense + leftover + gp) / 2 each); on other slides, that of `dense` alone.

    Parameters
    ----------
    image
        Fitted on all spots.
    leftover
        Of the image model, from predictions that did not see the spot.
    joint
        A Gaussian process on position and views.
    """

    name: ClassVar[str] = "dense+spots"
    needs_position_on_slide: ClassVar[bool] = True
    image: DenseModel
    leftover: Leftover
    joint: GaussianProcessModel

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return self.image.halo_um

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Solve in closed form; the seed draws the parts for what the image model has not seen."""
        unseen = DenseModel.cross_fitted(sections, seed=seed)
        return cls(
            DenseModel.fit(sections, seed=seed),
            Leftover.fit(sections, unseen),
            GaussianProcessModel.fit(sections, seed=seed),
        )

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        image = self.image.predict(patches)
        if patches.slide_id not in self.leftover.slides:
            return image
        image += self.leftover(patches)
        floor = (FLOOR * self.image.targets.mean).astype(np.float32)
        return np.asarray((bend(image, floor) + self.joint.predict(patches)) / 2)

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        return {
            "image": self.image.config(),
            "leftover": self.leftover.config(),
            "joint": self.joint.config(),
        }

    def state(self) -> State:
        """Return the learned arrays."""
        arrays = {f"image.{k}": v for k, v in self.image.state().items()}
        arrays |= {f"joint.{k}": v for k, v in self.joint.state().items()}
        return arrays | self.leftover.state()

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""

        def part(name: str) -> State:
            return {k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")}

        return cls(
            DenseModel.from_state(config["image"], part("image")),
            Leftover.from_state(config["leftover"], state),
            GaussianProcessModel.from_state(config["joint"], part("joint")),
        )


RECORD = ModelRecord(
    "dense+spots",
    "dense, plus kriging of its residual between the spots of slides that it was trained on.",
    lambda: DenseSpotsModel,
)
