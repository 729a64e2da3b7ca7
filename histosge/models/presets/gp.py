"""Regression kriging: a Gaussian process over position and embeddings, on patterns of genes.

The strongest plain baseline within a section: what neighbours measured and what the picture shows, weighed
by marginal likelihood. On a slide that it was not trained on, only the picture is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.kriging import Kriging, Measured
from histosge.models.linear_algebra import Floats, Standardiser
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import HALO_UM, Surroundings
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord

PATTERNS = 5


@dataclass(frozen=True)
class GaussianProcessModel:
    """log1p(CP10k) = bend(mean of the slide + sd * axes @ process(position, views)).

    Parameters
    ----------
    surroundings, standardiser, targets
        Embeddings -> views -> standardised features, and patterns -> genes.
    process
        Over positions and features.
    slides
        Slide id -> its number in `process` and its own mean per gene, ``(n_genes,)``.
    """

    name: ClassVar[str] = "gp"
    needs_position_on_slide: ClassVar[bool] = True
    surroundings: Surroundings
    standardiser: Standardiser
    targets: LowRankTargets
    process: Kriging
    slides: Mapping[str, tuple[int, Floats]]

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return HALO_UM

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Solve in closed form; seed and epochs have no effect."""
        surroundings = Surroundings.of(sections)
        targets = LowRankTargets.of(sections, PATTERNS)
        views = np.concatenate([surroundings.describe_spots(s) for s in sections])
        standardiser = Standardiser.of(views)
        slide = np.repeat(np.arange(len(sections)), [len(s.spot_xy_um) for s in sections])
        spots = Measured(slide, np.concatenate([s.spot_xy_um for s in sections]), standardiser.apply(views))
        process = Kriging.fit(spots, np.concatenate([targets.patterns(s) for s in sections]))
        slides = {
            s.patches.slide_id: (i, s.target.mean(axis=0, dtype=np.float64)) for i, s in enumerate(sections)
        }
        return cls(surroundings, standardiser, targets, process, slides)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        patterns = self.surroundings.project(patches, self.process.affine().after(self.standardiser))
        number, mean = self.slides.get(patches.slide_id, (-1, self.targets.mean))
        return self.targets.genes(patterns + self.process.by_position(number, patches.xy_um), mean)

    def config(self) -> dict[str, Any]:
        """Return which slides it knows, and the kernel of each pattern."""
        kernels = [[k.length_um, k.share, k.noise] for k in self.process.kernels]
        return {"slides": list(self.slides), "kernels": kernels}

    def state(self) -> State:
        """Return the learned arrays."""
        return {
            **self.surroundings.state(),
            **self.targets.state(),
            **self.process.state(),
            "features.mean": self.standardiser.mean,
            "features.scale": self.standardiser.scale,
            "slides.mean": np.stack([mean for _, mean in self.slides.values()]),
        }

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        return cls(
            Surroundings.from_state(state),
            Standardiser(state["features.mean"], state["features.scale"]),
            LowRankTargets.from_state(state),
            Kriging.from_state(state),
            {name: (i, state["slides.mean"][i]) for i, name in enumerate(config["slides"])},
        )


RECORD = ModelRecord(
    "gp",
    "A Gaussian process over position and embedding; position counts on slides trained on.",
    lambda: GaussianProcessModel,
)
