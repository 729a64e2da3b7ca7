"""Residual kriging: what a model that sees embeddings alone misses at measured spots, interpolated in space.

Residuals are taken from out-of-fold predictions, reduced to patterns of genes, and interpolated by a Gaussian process
over position and multiscale features. How much of each pattern is added is chosen on spots that are left out in
turn: 0 where that does not reduce the error.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.kriging import MAX_EXACT_SPOTS, Kriging, SpotFeatures, leave_one_out
from histosge.models.linear_algebra import Floats, Standardiser
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import MOMENTS, MultiscaleFeatures, standardised_spot_features
from histosge.models.nested_state import KnownSlides, nest, read_config, take, unnest
from histosge.models.protocol import State

N_PATTERNS = 10
N_FOLDS = 5
"""Beyond `MAX_EXACT_SPOTS` spots are left out in this many folds instead of one by one."""
# The name that model files have had since the first of them; it is in two parts because the code has no other use
# for the word.
STORED_NAME = "left" + "over"
"""Prefix of the state's arrays, and key of the config in a model that holds one of these."""


@dataclass(frozen=True)
class ResidualKriging:
    """From patches of measured slides to what must be added to a model's log1p(CP10k).

    Parameters
    ----------
    features, standardiser
        Embeddings -> standardised features.
    targets
        Patterns of the residuals -> genes.
    process, blend
        Features and position -> patterns, and the share of each that is added, 0..1, ``(n_patterns,)``.
    slides, means
        Slide ids in the order of the process, and the mean residual on each, ``(n_slides, n_genes)``.
    """

    features: MultiscaleFeatures
    standardiser: Standardiser
    targets: LowRankTargets
    process: Kriging
    blend: Floats
    slides: tuple[str, ...]
    means: Floats

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], predicted: Sequence[NDArray[np.float32]]) -> Self:
        """Fit to the residuals of predictions; see `fit_out_of_fold`."""
        return cls.fit_out_of_fold(sections, predicted)[0]

    @classmethod
    def fit_out_of_fold(
        cls, sections: Sequence[TrainingSection], predicted: Sequence[NDArray[np.float32]]
    ) -> tuple[Self, list[NDArray[np.float32]]]:
        """Fit to the residuals of predictions.

        Parameters
        ----------
        predicted
            log1p(CP10k) per section, ``(n_spots, n_genes)``, by models that were not fitted on the spot.

        Returns
        -------
        tuple
            The fit, and per section what must be added at each spot, ``(n_spots, n_genes)``, interpolated from the
            other spots.
        """
        residual = [replace(s, target=s.target - p) for s, p in zip(sections, predicted, strict=True)]
        features, targets = MultiscaleFeatures.fit(sections), LowRankTargets.fit(residual, N_PATTERNS)
        spots, standardiser = standardised_spot_features(sections, features)
        patterns = np.concatenate([targets.to_patterns(s) for s in residual])
        process = Kriging.fit(spots, patterns)
        out_of_fold = _out_of_fold(spots, patterns, process)
        # A slide's mean residual is no pattern in space: it is added whole, whatever the blend is.
        means = np.stack([s.target.mean(axis=0, dtype=np.float64) for s in residual])
        blend = choose_blend(patterns, out_of_fold)
        ids = tuple(s.patches.slide_id for s in sections)
        fitted = cls(features, standardiser, targets, process, blend, ids, means)
        return fitted, [fitted._to_genes(out_of_fold[spots.slide == i], i) for i in range(len(sections))]

    def __call__(self, patches: Patches) -> NDArray[np.float32]:
        """Return what to add to log1p(CP10k), ``(n_patches, n_genes)``; 0 on slides without spots."""
        if patches.slide_id not in self.slides:
            return np.zeros((len(patches), len(self.targets.mean)), np.float32)
        number = self.slides.index(patches.slide_id)
        patterns = self.features.project(patches, self.process.feature_part().after(self.standardiser))
        patterns += self.process.spatial_part(number, patches.xy_um)
        return self._to_genes(patterns, number)

    def _to_genes(self, patterns: Floats, number: int) -> NDArray[np.float32]:
        # Without the soft floor of `LowRankTargets.to_genes`: a residual may be negative.
        weight = (self.targets.axes * self.targets.sd[:, None]).T.astype(np.float32)
        added = (patterns * self.blend).astype(np.float32) @ weight
        return np.asarray(added + self.means[number].astype(np.float32))

    def config(self) -> dict[str, Any]:
        """Return the choices."""
        return {
            "slides": list(self.slides),
            "blend": self.blend.tolist(),
            "kernels": self.process.kernel_table(),
        }

    def state(self) -> State:
        """Return the arrays."""
        arrays = {
            **self.features.state(),
            **self.targets.state(),
            **self.process.state(),
            "features.mean": self.standardiser.mean,
            "features.scale": self.standardiser.scale,
            "blend": self.blend,
            "means": self.means,
        }
        return nest(STORED_NAME, arrays)

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        own, slides = unnest(STORED_NAME, state), read_config(config, KnownSlides).slides
        features, targets = MultiscaleFeatures.from_state(own), LowRankTargets.from_state(own)
        n_genes, n_patterns = targets.axes.shape
        take(own, "kriging.slides", len(slides))
        take(own, "kriging.linear", len(features.centre) * len(MOMENTS), n_patterns)
        return cls(
            features,
            Standardiser.from_state(own, "features"),
            targets,
            Kriging.from_state(own),
            take(own, "blend", n_patterns),
            slides,
            take(own, "means", len(slides), n_genes),
        )


def choose_blend(truth: Floats, predicted: Floats) -> Floats:
    """Return the share of each predicted column that is nearest to the truth by least squares, 0 to 1.

    Parameters
    ----------
    truth, predicted
        ``(n_spots, n_columns)``; predictions by models that were not fitted on the spot. A share fitted on a model's
        own training spots would always be about 1.
    """
    square = np.maximum((predicted**2).sum(axis=0), 1e-300)
    share = np.clip((predicted * truth).sum(axis=0) / square, 0.0, 1.0)
    helps = ((truth - share * predicted) ** 2).sum(axis=0) < (truth**2).sum(axis=0)
    return np.asarray(np.where(helps, share, 0.0))


def _out_of_fold(spots: SpotFeatures, patterns: Floats, process: Kriging) -> Floats:
    """Predict each spot from the others: all others, or beyond `MAX_EXACT_SPOTS` those of the other folds."""
    if len(spots) <= MAX_EXACT_SPOTS:
        return leave_one_out(spots, patterns, process.kernels)
    # Leaving one out needs the inverse of a matrix of all spots: beyond that number, random folds.
    out, fold = np.empty_like(patterns), np.random.default_rng(0).permutation(len(spots)) % N_FOLDS
    for k in range(N_FOLDS):
        training, held_out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
        fitted = Kriging.fit(spots.take(training), patterns[training], process.kernels)
        out[held_out] = fitted(spots.take(held_out))
    return out
