"""The default preset: dense maps from what lies in and around each patch.

Linear in what is seen of a window of patches at three scales, down to a few patterns of genes: on a few
hundred spots that is as good as anything deeper, and it is solved in a second.

Terms
    view      what is seen of a patch at one scale, see `surroundings`
    pattern   a combination of genes that vary together, see `low_rank`
    member    a ridge on some of the views; the linear solution is the mean of all members
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosge.models.linear import Affine, RidgePath, Standardiser, choose_penalties, spatial_groups
from histosge.models.low_rank import LowRankTargets
from histosge.models.model import State
from histosge.models.surroundings import HALO_UM, VIEWS, Surroundings, view_columns
from histosge.sections import Patches, TrainingSection

PATTERNS = 10
"""Enough: each has its own penalty, so one that cannot be predicted costs nothing."""
MEMBERS = (
    ((0.0, "mean"),),
    ((80.0, "mean"), (80.0, "sd")),
    ((80.0, "mean"), (160.0, "mean"), (160.0, "sd")),
)
"""Averaged, none selected: choosing one on so few spots costs more than it gains."""


@dataclass(frozen=True)
class DenseModel:
    """log1p(CP10k) = bend(mean + sd * axes @ affine(views)).

    Parameters
    ----------
    surroundings, affine, targets
        Embeddings -> views -> patterns -> genes.
    penalties
        As chosen, per member and pattern.
    """

    name: ClassVar[str] = "dense"
    needs_position_on_slide: ClassVar[bool] = False
    surroundings: Surroundings
    affine: Affine
    targets: LowRankTargets
    penalties: tuple[tuple[float, ...], ...]

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return HALO_UM

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Solve the linear part."""
        surroundings = Surroundings.of(sections)
        targets = LowRankTargets.of(sections, PATTERNS)
        X = np.concatenate([surroundings.describe_spots(s) for s in sections])
        Y = np.concatenate([targets.patterns(s) for s in sections])
        affine, penalties = fit_members(X, Y, spatial_groups(sections))
        return cls(surroundings, affine, targets, penalties)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what `predict` does for some of the patches; the others are only looked at."""
        return self.targets.genes(self.surroundings.project(patches, self.affine, of))

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        return {
            "patterns": self.targets.axes.shape[1],
            "views": [list(view) for view in VIEWS],
            "penalties": [list(some) for some in self.penalties],
        }

    def state(self) -> State:
        """Return the learned arrays."""
        linear = {f"linear.{name}": array for name, array in self.affine.state().items()}
        return {**self.surroundings.state(), **linear, **self.targets.state()}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        affine = Affine(state["linear.weight"], state["linear.offset"])
        return cls(
            Surroundings.from_state(state),
            affine,
            LowRankTargets.from_state(state),
            tuple(map(tuple, config["penalties"])),
        )


def fit_members(
    X: NDArray[np.float64], Y: NDArray[np.float64], groups: NDArray[np.int64]
) -> tuple[Affine, tuple[tuple[float, ...], ...]]:
    """Fit one ridge per member on its views, and return their mean as one map, with their penalties."""
    weight, offset, penalties = np.zeros((X.shape[1], Y.shape[1])), np.zeros(Y.shape[1]), []
    for views in MEMBERS:
        columns = view_columns(views, X.shape[1] // len(VIEWS))
        standardiser = Standardiser.of(X[:, columns])
        inputs = standardiser.apply(X[:, columns])
        chosen = choose_penalties(inputs, Y, groups)
        member = RidgePath.of(inputs, Y).at(chosen).after(standardiser)
        penalties.append(tuple(chosen.tolist()))
        weight[columns] += member.weight / len(MEMBERS)
        offset += member.offset / len(MEMBERS)
    return Affine(weight, offset), tuple(penalties)
