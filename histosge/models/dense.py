"""The default preset: dense maps from each patch and its neighbourhood, linear in multiscale features.

From the features of a window of patches to a few patterns of genes, and from those to all genes: on a few hundred
spots that is as good as anything deeper, and it is solved in a second.

Terms
    features  multiscale features of a patch, see `multiscale`
    pattern   a principal component of the genes, see `low_rank_targets`
    stack     the weighted mean of several linear models, see `stacking`
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import Reduce
from histosge.data.sections import Patches, TrainingSection
from histosge.models.count_loss import LOSSES, CountHead
from histosge.models.kriging import SpotFeatures
from histosge.models.linear_algebra import Affine, Floats, Indices, spatial_groups
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import HALO_UM, MOMENTS, MultiscaleFeatures, spot_features
from histosge.models.nested_state import nest, read_config, take, unnest
from histosge.models.protocol import State
from histosge.models.stacking import StackedFit, fit_ridge, fit_stack
from histosge.models.stain_invariance import STRENGTH, stain_covariance

Number = TypeVar("Number", bound=np.generic)

# 3, 5, 10 and 30 score .373, .375, .376 and .377 on the public sections: each has its own penalty, so one that cannot
# be predicted costs nothing.
N_PATTERNS = 10
N_FOLDS = 5
"""Folds of spots that are left out in turn by `out_of_fold`."""


@dataclass(frozen=True)
class DenseModel:
    """log1p(CP10k) = soft_floor(mean + sd * axes @ affine(features)).

    Parameters
    ----------
    features, affine, targets
        Embeddings -> features -> patterns -> genes.
    penalties, weights
        As chosen: per ridge and pattern, and per model of the stack.
    depth
        Features -> log of a spot's total counts, one output; None if no counts were given in training.
    count_head
        Patterns -> genes fitted by a count likelihood, in place of `targets`; None for squared error.
    stain_penalty
        Strength of the penalty along stain shifts; 0 without one.
    """

    name: ClassVar[str] = "dense"
    losses: ClassVar[tuple[str, ...]] = LOSSES
    takes_stain_pairs: ClassVar[bool] = True
    features: MultiscaleFeatures
    affine: Affine
    targets: LowRankTargets
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] = ()
    depth: Affine | None = None
    count_head: CountHead | None = None
    stain_penalty: float = 0.0

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return HALO_UM

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        loss: str = "mse",
    ) -> Self:
        """Solve in closed form; epochs have no effect, and the seed only draws the folds for a count loss."""
        return cls.from_linear_fit(LinearFit.fit(sections), sections, seed=seed, loss=loss)

    @classmethod
    def from_linear_fit(
        cls, linear: "LinearFit", sections: Sequence[TrainingSection], *, seed: int = 0, loss: str = "mse"
    ) -> Self:
        """Fit depth, and the last step for a count loss, to a linear part that is fitted already."""
        stack, head = linear.stack, None
        depth = fit_depth(linear.spots, sections, linear.groups, stack.nuisance)
        if loss != "mse":
            # Out of fold: patterns of a fit that saw the spot are nearer to its counts than on new tissue.
            patterns = linear.out_of_fold(_random_folds(linear, seed))
            head = CountHead.fit(loss, sections, linear.by_section(patterns))
        return cls(
            linear.features,
            stack.affine,
            linear.targets,
            stack.penalties,
            stack.weights,
            depth,
            head,
            0.0 if stack.nuisance is None else STRENGTH,
        )

    @classmethod
    def out_of_fold(cls, sections: Sequence[TrainingSection], *, seed: int = 0) -> list[NDArray[np.float32]]:
        """Predict each training spot by a linear part that was fitted without it, log1p(CP10k) per section."""
        linear = LinearFit.fit(sections)
        patterns = linear.out_of_fold(_random_folds(linear, seed))
        return [linear.targets.to_genes(part) for part in linear.by_section(patterns)]

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what `predict` does for some of the patches; the others are only their neighbourhood."""
        return self.to_genes(self.features.project(patches, self.affine, of))

    def split(self) -> tuple[Reduce | None, "DenseModel"]:
        """Return the reduction of embeddings to components, and the model that takes those."""
        reduce, features = self.features.split()
        # A patch lies in the windows of several blocks: its components are computed once.
        return reduce, replace(self, features=features)

    def to_genes(self, patterns: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k), ``(n, n_genes)``, from ``(n, n_patterns)``."""
        return self.targets.to_genes(patterns) if self.count_head is None else self.count_head(patterns)

    def predict_with_depth(
        self, patches: Patches, of: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return `predict_some`, and the log of the total counts that a spot there would have, ``(len(of),)``.

        Depth is no part of log1p(CP10k). It is None where the model was trained without total counts.
        """
        patterns, depth = self.patterns_with_depth(patches, of)
        return self.to_genes(patterns), depth

    def patterns_with_depth(
        self, patches: Patches, of: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.float32] | None]:
        """Return patterns, ``(len(of), n_patterns)``, and depth as `predict_with_depth` does."""
        if self.depth is None:
            return self.features.project(patches, self.affine, of), None
        # One more output of the same projection: pooling, which costs most, is done once for both.
        both = Affine(
            np.hstack([self.affine.weight, self.depth.weight]),
            np.concatenate([self.affine.offset, self.depth.offset]),
        )
        projected = self.features.project(patches, both, of)
        return projected[:, :-1], projected[:, -1].astype(np.float32)

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        return {
            "patterns": self.targets.axes.shape[1],
            "views": [list(moment) for moment in MOMENTS],
            "penalties": [list(per_pattern) for per_pattern in self.penalties],
            "weights": list(self.weights),
            "stain_penalty": self.stain_penalty,
        }

    def state(self) -> State:
        """Return the learned arrays."""
        arrays = nest("linear", self.affine.state())
        if self.depth is not None:
            arrays |= nest("depth", self.depth.state())
        if self.count_head is not None:
            arrays |= self.count_head.state()
        return {**self.features.state(), **arrays, **self.targets.state()}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        chosen, depth = read_config(config, _Config), unnest("depth", state)
        features, targets = MultiscaleFeatures.from_state(state), LowRankTargets.from_state(state)
        n_features = len(features.centre) * len(MOMENTS)
        n_genes, n_patterns = targets.axes.shape
        take(state, "linear.weight", n_features, n_patterns)
        if depth:
            take(state, "depth.weight", n_features, 1)
        if "counts.weight" in state:
            take(state, "counts.weight", n_patterns, n_genes)
        return cls(
            features,
            Affine.from_state(unnest("linear", state)),
            targets,
            chosen.penalties,
            chosen.weights,
            Affine.from_state(depth) if depth else None,
            CountHead.from_state(state) if "counts.weight" in state else None,
            chosen.stain_penalty,
        )


class _Config(msgspec.Struct):
    """What `DenseModel.config` wrote. Models of the first versions have neither weights nor a stain penalty."""

    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] = ()
    stain_penalty: float = 0.0


@dataclass(frozen=True)
class LinearFit:
    """The linear part, with the spots that it was fitted to.

    Parameters
    ----------
    features, targets, stack
        Embeddings -> features -> patterns -> genes.
    spots, patterns
        Of all sections: features, and patterns as measured, ``(n_spots, n_patterns)``.
    groups
        Spots that are held out together, see `spatial_groups`.
    section_ends
        Index after each section's last spot, except for the last section.
    """

    features: MultiscaleFeatures
    targets: LowRankTargets
    stack: StackedFit
    spots: SpotFeatures
    patterns: Floats
    groups: Indices
    section_ends: Indices

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection]) -> Self:
        """Solve in closed form."""
        features, targets = MultiscaleFeatures.fit(sections), LowRankTargets.fit(sections, N_PATTERNS)
        spots, groups = spot_features(sections, features), spatial_groups(sections)
        patterns = np.concatenate([targets.to_patterns(s) for s in sections])
        stack = fit_stack(spots, patterns, groups, nuisance=stain_covariance(sections, features))
        ends = np.cumsum([len(s.target) for s in sections])[:-1]
        return cls(features, targets, stack, spots, patterns, groups, ends)

    def out_of_fold(self, fold: Indices) -> Floats:
        """Predict each spot's patterns by models that were fitted without its fold, ``(n_spots, n_patterns)``.

        Kernels and weights of the stack are those of the fit to all spots: a few numbers, which hardly know one spot.
        """
        predicted = np.zeros_like(self.patterns)
        for k in np.unique(fold):
            training, held_out = np.flatnonzero(fold != k), np.flatnonzero(fold == k)
            # With a single fold there is nothing to fit to: the mean, 0, is the prediction.
            if len(training):
                fitted = fit_stack(
                    self.spots.take(training), self.patterns[training], self.groups[training], self.stack
                )
                predicted[held_out] = fitted.affine(self.spots.features[held_out])
        return predicted

    def by_section(self, values: NDArray[Number]) -> list[NDArray[Number]]:
        """Split values of all spots, ``(n_spots, ...)``, by section."""
        return np.split(values, self.section_ends)


def _random_folds(linear: LinearFit, seed: int) -> Indices:
    """Draw `N_FOLDS` folds of the spots, of equal size."""
    return np.asarray(np.random.default_rng(seed).permutation(len(linear.spots)) % N_FOLDS)


def fit_depth(
    spots: SpotFeatures, sections: Sequence[TrainingSection], groups: Indices, nuisance: Floats | None = None
) -> Affine | None:
    """Fit a ridge of the log of total counts; None where a section has no total counts.

    Each section's own mean is taken out, and the pooled one put back: how deep a section was sequenced is not in its
    embeddings.
    """
    # At least one count: the logarithm of 0 would spoil the fit.
    logs = [np.log(np.maximum(s.library, 1.0)) for s in sections if s.library is not None]
    if len(logs) < len(sections):
        return None
    Y = np.concatenate([log - log.mean() for log in logs])[:, None]
    affine = fit_ridge(spots, Y, groups, nuisance)
    return Affine(affine.weight, affine.offset + np.concatenate(logs).mean())
