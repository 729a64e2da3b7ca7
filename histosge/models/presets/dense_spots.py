"""`dense` conditioned on the spots of the slide itself: embeddings, plus their residuals interpolated in space.

Two routes to the same end are averaged, none selected: `dense` with residual kriging, and one Gaussian process over
position and features together.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.dense import DenseModel
from histosge.models.low_rank_targets import soft_floor
from histosge.models.nested_state import nest, read_config, unnest
from histosge.models.presets.gp import GaussianProcessModel
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord
from histosge.models.residual_kriging import STORED_NAME, ResidualKriging


@dataclass(frozen=True)
class DenseSpotsModel:
    """log1p(CP10k) = (soft_floor(dense + residual) + gp) / 2; on slides without training spots, `dense` alone.

    Parameters
    ----------
    dense
        Fitted on all spots.
    residual
        Of `dense`, from out-of-fold predictions.
    gp
        A Gaussian process over position and features.
    """

    name: ClassVar[str] = "dense+spots"
    needs_position_on_slide: ClassVar[bool] = True
    dense: DenseModel
    residual: ResidualKriging
    gp: GaussianProcessModel

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return self.dense.halo_um

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Solve in closed form; the seed draws the folds of the out-of-fold predictions."""
        # Residuals of a fit that saw the spot would be too small, and too little would be added between spots.
        out_of_fold = DenseModel.out_of_fold(sections, seed=seed)
        return cls(
            DenseModel.fit(sections, seed=seed),
            ResidualKriging.fit(sections, out_of_fold),
            GaussianProcessModel.fit(sections, seed=seed),
        )

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        predicted = self.dense.predict(patches)
        if patches.slide_id not in self.residual.slides:
            return predicted
        # A residual may take a value below zero: the floor holds for the sum again.
        predicted = soft_floor(predicted + self.residual(patches), self.dense.targets.floor)
        return np.asarray((predicted + self.gp.predict(patches)) / 2)

    def config(self) -> dict[str, Any]:
        """Return what was chosen, under the names that model files have always had."""
        return {
            "image": self.dense.config(),
            STORED_NAME: self.residual.config(),
            "joint": self.gp.config(),
        }

    def state(self) -> State:
        """Return the learned arrays."""
        return nest("image", self.dense.state()) | nest("joint", self.gp.state()) | self.residual.state()

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        parts = read_config(config, dict[str, dict[str, Any]])
        return cls(
            DenseModel.from_state(parts["image"], unnest("image", state)),
            ResidualKriging.from_state(parts[STORED_NAME], state),
            GaussianProcessModel.from_state(parts["joint"], unnest("joint", state)),
        )


RECORD = ModelRecord(
    "dense+spots",
    "dense, plus kriging of its residual between the spots of slides that it was trained on",
    lambda: DenseSpotsModel,
)
