"""Regression kriging: a Gaussian process over position and multiscale features, on patterns of genes.

The strongest plain baseline within a section: neighbouring measurements and embeddings, weighted by marginal
likelihood. On a slide without training spots only the part of the embeddings is left.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.kriging import Kriging
from histosge.models.linear_algebra import Floats, Standardiser
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import HALO_UM, MOMENTS, MultiscaleFeatures, standardised_spot_features
from histosge.models.nested_state import KnownSlides, read_config, take
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord

# Of the numbers tried on the public sections, 3 to 5 patterns gave the most.
N_PATTERNS = 5


@dataclass(frozen=True)
class GaussianProcessModel:
    """log1p(CP10k) = soft_floor(mean of the slide + sd * axes @ process(position, features)).

    Parameters
    ----------
    features, standardiser, targets
        Embeddings -> features -> standardised features, and patterns -> genes.
    process
        Over positions and features.
    slides
        Slide id -> its number in `process` and its own mean per gene, ``(n_genes,)``.
    """

    name: ClassVar[str] = "gp"
    needs_position_on_slide: ClassVar[bool] = True
    features: MultiscaleFeatures
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
        features, targets = MultiscaleFeatures.fit(sections), LowRankTargets.fit(sections, N_PATTERNS)
        spots, standardiser = standardised_spot_features(sections, features)
        process = Kriging.fit(spots, np.concatenate([targets.to_patterns(s) for s in sections]))
        slides = {
            s.patches.slide_id: (i, s.target.mean(axis=0, dtype=np.float64)) for i, s in enumerate(sections)
        }
        return cls(features, standardiser, targets, process, slides)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        patterns = self.features.project(patches, self.process.feature_part().after(self.standardiser))
        # A slide without training spots has no number in the process, and takes the mean of all.
        number, mean = self.slides.get(patches.slide_id, (-1, self.targets.mean))
        return self.targets.to_genes(patterns + self.process.spatial_part(number, patches.xy_um), mean)

    def config(self) -> dict[str, Any]:
        """Return which slides it knows, and the kernel of each pattern."""
        return {"slides": list(self.slides), "kernels": self.process.kernel_table()}

    def state(self) -> State:
        """Return the learned arrays."""
        return {
            **self.features.state(),
            **self.targets.state(),
            **self.process.state(),
            "features.mean": self.standardiser.mean,
            "features.scale": self.standardiser.scale,
            "slides.mean": np.stack([mean for _, mean in self.slides.values()]),
        }

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        features, targets = MultiscaleFeatures.from_state(state), LowRankTargets.from_state(state)
        slides = read_config(config, KnownSlides).slides
        n_genes, n_patterns = targets.axes.shape
        take(state, "kriging.slides", len(slides))
        take(state, "kriging.linear", len(features.centre) * len(MOMENTS), n_patterns)
        means = take(state, "slides.mean", len(slides), n_genes)
        return cls(
            features,
            Standardiser.from_state(state, "features"),
            targets,
            Kriging.from_state(state),
            {name: (i, means[i]) for i, name in enumerate(slides)},
        )


RECORD = ModelRecord(
    "gp",
    "a Gaussian process over position and multiscale features; knows the slides that it was trained on",
    lambda: GaussianProcessModel,
)
