"""The default preset: low-rank targets, each predicted by the mean of ridges at several scales and on their differences.

From the embeddings around a spot to a few patterns of genes, and from those to all genes: on a few hundred spots that
is as good as anything deeper, and it is solved in a second.

Terms
    scale    the embedding around a spot, weighted by a Gaussian, see `scale_ridges`
    pattern  a principal component of the genes, see `low_rank_targets`
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import Reduce
from histosge.data.sections import Patches, TrainingSection
from histosge.models.count_loss import LOSSES, CountHead
from histosge.models.earlier_dense import MomentProjection
from histosge.models.linear_algebra import Floats, Indices, spatial_groups
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.nested_state import read_config, take
from histosge.models.protocol import SQUARED_ERROR, State
from histosge.models.scale_ridges import Outputs, ScaleRidges, fit_scale_ridges
from histosge.models.stain_invariance import STRENGTH

# 5 and 10 differ by less than 0.003 on every encoder that was tried on the public sections, and 20 loses 0.005 on some;
# with a thousand spots on one section 10 gain 0.019 over 5.
N_PATTERNS = 10
N_FOLDS = 5
"""Folds of spots that are left out in turn by `out_of_fold`."""
WHOLE_SECTIONS_FROM = 4
"""Sections from which on a count loss leaves whole ones out for its patterns, and not spots at random, which keeps their
neighbours in the fit. Held-out Pearson was 0.018 higher with seven synthetic donors, equal with four, and 0.017 lower with
two public sections, of which one alone was left to fit to."""


@dataclass(frozen=True)
class DenseModel:
    """log1p(CP10k) = soft_floor(mean + sd * axes @ patterns).

    Parameters
    ----------
    linear
        Embeddings -> patterns and, as one more output, the log of a spot's total counts.
    targets
        Patterns -> genes.
    has_depth
        Whether the last output of `linear` is depth; False if no counts were given in training.
    count_head
        Patterns -> genes fitted by a count likelihood, in place of `targets`; None for squared error.
    stain_penalty
        Strength of the penalty along stain shifts; 0 without one.
    """

    name: ClassVar[str] = "dense"
    losses: ClassVar[tuple[str, ...]] = LOSSES
    takes_stain_pairs: ClassVar[bool] = True
    linear: ScaleRidges | MomentProjection
    targets: LowRankTargets
    has_depth: bool = False
    count_head: CountHead | None = None
    stain_penalty: float = 0.0

    @property
    def halo_um(self) -> float:
        """Return how far the widest Gaussian reaches."""
        return self.linear.halo_um

    @property
    def depth(self) -> object | None:
        """Return what predicts depth; None where training gave no total counts."""
        return self.linear if self.has_depth else None

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        *,
        seed: int = 0,
        epochs: int | None = None,
        loss: str = SQUARED_ERROR,
    ) -> Self:
        """Solve in closed form; epochs have no effect, and the seed draws folds of few sections for a count loss."""
        # Out of fold: patterns of a fit that saw the spot are nearer to its counts than on new tissue. Whole sections are
        # left out at no further cost: by the fits that penalties are chosen with.
        is_drawn = loss != SQUARED_ERROR and len(sections) < WHOLE_SECTIONS_FROM
        linear = LinearFit.fit(sections, random_folds(sections, seed) if is_drawn else None)
        return cls.from_linear_fit(linear, sections, loss=loss)

    @classmethod
    def from_linear_fit(
        cls, linear: "LinearFit", sections: Sequence[TrainingSection], *, loss: str = SQUARED_ERROR
    ) -> Self:
        """Add the last step for a count loss to a linear part that is fitted already."""
        head = None
        if loss != SQUARED_ERROR:
            assert linear.out_of_fold is not None
            head = CountHead.fit(loss, sections, linear.by_section(linear.out_of_fold))
        has_stains = any(s.stain_pairs is not None for s in sections)
        return cls(linear.ridges, linear.targets, linear.has_depth, head, STRENGTH if has_stains else 0.0)

    @classmethod
    def out_of_fold(cls, sections: Sequence[TrainingSection], *, seed: int = 0) -> list[NDArray[np.float32]]:
        """Predict each training spot by a linear part that was fitted without it, log1p(CP10k) per section."""
        linear = LinearFit.fit(sections, random_folds(sections, seed))
        assert linear.out_of_fold is not None
        return [linear.targets.to_genes(part) for part in linear.by_section(linear.out_of_fold)]

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what `predict` does for some of the patches; the others are only their neighbourhood."""
        return self.predict_with_depth(patches, of)[0]

    def split(self) -> tuple[Reduce | None, "DenseModel"]:
        """Return the projection of embeddings, and the model that takes projected ones."""
        # A patch lies in the windows of several blocks: it is projected once.
        reduce, linear = self.linear.split()
        return reduce, replace(self, linear=linear)

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
        projected = self.linear.project(patches, of)
        if not self.has_depth:
            return projected, None
        return projected[:, :-1], projected[:, -1].astype(np.float32)

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        return {
            **self.linear.config(),
            "patterns": self.targets.axes.shape[1],
            "has_depth": self.has_depth,
            "stain_penalty": self.stain_penalty,
        }

    def state(self) -> State:
        """Return the learned arrays."""
        head = {} if self.count_head is None else self.count_head.state()
        return {**self.linear.state(), **head, **self.targets.state()}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        targets = LowRankTargets.from_state(state)
        n_genes, n_patterns = targets.axes.shape
        if "counts.weight" in state:
            take(state, "counts.weight", n_patterns, n_genes)
        # The key of the moments stands in the models of earlier versions alone.
        linear: ScaleRidges | MomentProjection
        if "views" in config:
            linear = MomentProjection.from_state(config, state, n_patterns)
            has_depth = linear.depth is not None
        else:
            has_depth = read_config(config, _Config).has_depth
            linear = ScaleRidges.from_state(config, state, n_patterns + has_depth)
        return cls(
            linear,
            targets,
            has_depth,
            CountHead.from_state(state) if "counts.weight" in state else None,
            read_config(config, _Config).stain_penalty,
        )


class _Config(msgspec.Struct):
    """What `DenseModel.config` wrote beside its linear part. Models of earlier versions say nothing of depth."""

    has_depth: bool = False
    stain_penalty: float = 0.0


@dataclass(frozen=True)
class LinearFit:
    """The linear part, with the spots that it was fitted to.

    Parameters
    ----------
    ridges, targets
        Embeddings -> patterns -> genes.
    has_depth
        Whether depth is the last output of `ridges`.
    patterns, out_of_fold
        Of all spots, ``(n_spots, n_patterns)``: as measured, and as predicted by fits without the spot's fold; without
        folds, of several sections by fits without the spot's section, about the section's mean, and else None.
    groups
        Spots that are held out together, see `spatial_groups`.
    section_ends
        Index after each section's last spot, except for the last section.
    """

    ridges: ScaleRidges
    targets: LowRankTargets
    has_depth: bool
    patterns: Floats
    out_of_fold: Floats | None
    groups: Indices
    section_ends: Indices

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], folds: Indices | None = None) -> Self:
        """Solve in closed form."""
        targets, groups = LowRankTargets.fit(sections, N_PATTERNS), spatial_groups(sections)
        patterns = np.concatenate([targets.to_patterns(s) for s in sections])
        depth = log_depth(sections)
        values = patterns if depth is None else np.column_stack([patterns, depth])
        fitted = fit_scale_ridges(sections, Outputs(values, groups, patterns.shape[1]), folds)
        predicted = None if fitted.out_of_fold is None else fitted.out_of_fold[:, : patterns.shape[1]]
        ends = np.cumsum([len(s.target) for s in sections])[:-1]
        if folds is None and fitted.left_out is not None and len(sections) > 1:
            # How far a section that was left out lies off as a whole is none of its patterns.
            predicted = np.concatenate([p - p.mean(axis=0) for p in np.split(fitted.left_out, ends)])
        return cls(fitted.ridges, targets, depth is not None, patterns, predicted, groups, ends)

    def by_section(self, values: NDArray[Any]) -> list[NDArray[Any]]:
        """Split values of all spots, ``(n_spots, ...)``, by section."""
        return np.split(values, self.section_ends)


def random_folds(sections: Sequence[TrainingSection], seed: int) -> Indices:
    """Draw `N_FOLDS` folds of the spots of all sections, of equal size."""
    n_spots = sum(len(s.target) for s in sections)
    return np.asarray(np.random.default_rng(seed).permutation(n_spots) % N_FOLDS)


def log_depth(sections: Sequence[TrainingSection]) -> Floats | None:
    """Return the log of each spot's total counts, ``(n_spots,)``; None where a section has no total counts.

    Each section's own mean is replaced by the pooled one: how deep a section was sequenced is not in its embeddings.
    """
    # At least one count: the logarithm of 0 would spoil the fit.
    logs = [np.log(np.maximum(s.library, 1.0)) for s in sections if s.library is not None]
    if len(logs) < len(sections):
        return None
    within = np.concatenate([log - log.mean() for log in logs])
    return np.asarray(within + np.concatenate(logs).mean())
