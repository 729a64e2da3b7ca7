"""The default preset: dense maps from what lies in and around each patch.

Linear in what is seen of a window of patches at three scales, down to a few patterns of genes: on a few
hundred spots that is as good as anything deeper, and it is solved in a second.

Terms
    view      what is seen of a patch at one scale, see `surroundings`
    pattern   a combination of genes that vary together, see `low_rank`
    member    one of several linear solutions whose weighted mean the linear part is, see `members`
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import Reduce
from histosge.data.sections import Patches, TrainingSection
from histosge.models.count_loss import LOSSES, CountHead
from histosge.models.kriging import Measured
from histosge.models.linear_algebra import (
    Affine,
    Floats,
    Indices,
    spatial_groups,
)
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import HALO_UM, VIEWS, Surroundings
from histosge.models.protocol import State
from histosge.models.registry import ModelRecord
from histosge.models.stacking import Mixture, fit_members, fit_ridge
from histosge.models.stain_invariance import STRENGTH, stain_covariance

Number = TypeVar("Number", bound=np.generic)

PATTERNS = 10
"""Enough: each has its own penalty, so one that cannot be predicted costs nothing."""
PARTS = 5
"""Parts of the spots that are left out in turn by `cross_fitted`."""


@dataclass(frozen=True)
class DenseModel:
    """log1p(CP10k) = bend(mean + sd * axes @ affine(views)).

    Parameters
    ----------
    surroundings, affine, targets
        Embeddings -> views -> patterns -> genes.
    penalties, weights
        As chosen: per ridge member and pattern, and per member.
    depth
        Views -> log of a spot's total counts, one output; None if no counts were given in training.
    counts
        Patterns -> genes fitted by a count likelihood, in place of `targets`; None for squared error.
    stain_penalty
        Strength of the penalty along what stains move; 0 without one.
    """

    name: ClassVar[str] = "dense"
    losses: ClassVar[tuple[str, ...]] = LOSSES
    takes_stain_pairs: ClassVar[bool] = True
    surroundings: Surroundings
    affine: Affine
    targets: LowRankTargets
    penalties: tuple[tuple[float, ...], ...]
    weights: tuple[float, ...] = ()
    depth: Affine | None = None
    counts: CountHead | None = None
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
        """Solve in closed form; epochs have no effect, and the seed only draws parts for a count loss."""
        return cls.of(LinearFit.of(sections), sections, seed=seed, loss=loss)

    @classmethod
    def of(
        cls, linear: "LinearFit", sections: Sequence[TrainingSection], *, seed: int = 0, loss: str = "mse"
    ) -> Self:
        """Put depth and the last step beside a linear part that is fitted already."""
        mixed, head = linear.mixture, None
        depth = fit_depth(linear.spots, sections, linear.groups, mixed.moved)
        if loss != "mse":
            head = CountHead.fit(loss, sections, linear.split(linear.unseen(_parts(linear, seed))))
        strength = 0.0 if mixed.moved is None else STRENGTH
        return cls(
            linear.surroundings,
            mixed.affine,
            linear.targets,
            mixed.penalties,
            mixed.weights,
            depth,
            head,
            strength,
        )

    @classmethod
    def cross_fitted(cls, sections: Sequence[TrainingSection], *, seed: int = 0) -> list[NDArray[np.float32]]:
        """Predict each training spot by a linear part that was fitted without it, log1p(CP10k) per section."""
        linear = LinearFit.of(sections)
        unseen = linear.unseen(_parts(linear, seed))
        return [linear.targets.genes(patterns) for patterns in linear.split(unseen)]

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return what `predict` does for some of the patches; the others are only looked at."""
        return self.genes(self.surroundings.project(patches, self.affine, of))

    def split(self) -> tuple[Reduce | None, "DenseModel"]:
        """Return what reduces embeddings to components, and the model that takes those."""
        reduce, surroundings = self.surroundings.split()
        return reduce, replace(self, surroundings=surroundings)

    def genes(self, patterns: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k) from ``(n, n_patterns)``, ``(n, n_genes)``."""
        return self.counts(patterns) if self.counts is not None else self.targets.genes(patterns)

    def predict_with_depth(
        self, patches: Patches, of: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return `predict_some`, and the log of the total counts that a spot there would have, ``(len(of),)``.

        The two are apart: depth is no part of log1p(CP10k). It is None where the model learned no depth.
        """
        patterns, depth = self.patterns_with_depth(patches, of)
        return self.genes(patterns), depth

    def patterns_with_depth(
        self, patches: Patches, of: NDArray[np.int64]
    ) -> tuple[Floats, NDArray[np.float32] | None]:
        """Return patterns in place of genes, ``(len(of), n_patterns)``, and depth as `predict_with_depth` does."""
        if self.depth is None:
            return self.surroundings.project(patches, self.affine, of), None
        both = Affine(
            np.hstack([self.affine.weight, self.depth.weight]),
            np.concatenate([self.affine.offset, self.depth.offset]),
        )
        projected = self.surroundings.project(patches, both, of)
        return projected[:, :-1], projected[:, -1].astype(np.float32)

    def config(self) -> dict[str, Any]:
        """Return what was chosen."""
        return {
            "patterns": self.targets.axes.shape[1],
            "views": [list(view) for view in VIEWS],
            "penalties": [list(some) for some in self.penalties],
            "weights": list(self.weights),
            "stain_penalty": self.stain_penalty,
        }

    def state(self) -> State:
        """Return the learned arrays."""
        linear = {f"linear.{name}": array for name, array in self.affine.state().items()}
        if self.depth is not None:
            linear |= {f"depth.{name}": array for name, array in self.depth.state().items()}
        if self.counts is not None:
            linear |= self.counts.state()
        return {**self.surroundings.state(), **linear, **self.targets.state()}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        known = "depth.weight" in state
        return cls(
            Surroundings.from_state(state),
            Affine(state["linear.weight"], state["linear.offset"]),
            LowRankTargets.from_state(state),
            tuple(map(tuple, config["penalties"])),
            tuple(config.get("weights", ())),
            Affine(state["depth.weight"], state["depth.offset"]) if known else None,
            CountHead(state["counts.weight"], state["counts.offset"]) if "counts.weight" in state else None,
            config.get("stain_penalty", 0.0),
        )


@dataclass(frozen=True)
class LinearFit:
    """The linear part, with what it was fitted to.

    Parameters
    ----------
    surroundings, targets, mixture
        Embeddings -> views -> patterns -> genes.
    spots, patterns
        Of all sections: views, and patterns as measured, ``(n_spots, n_patterns)``.
    groups
        What is held out together, see `spatial_groups`.
    ends
        Where each section's spots end, but for the last.
    """

    surroundings: Surroundings
    targets: LowRankTargets
    mixture: Mixture
    spots: Measured
    patterns: Floats
    groups: Indices
    ends: Indices

    @classmethod
    def of(cls, sections: Sequence[TrainingSection]) -> Self:
        """Solve in closed form."""
        surroundings, targets = Surroundings.of(sections), LowRankTargets.of(sections, PATTERNS)
        spots, groups = see_spots(sections, surroundings), spatial_groups(sections)
        patterns = np.concatenate([targets.patterns(s) for s in sections])
        mixture = fit_members(spots, patterns, groups, moved=stain_covariance(sections, surroundings))
        ends = np.cumsum([len(s.target) for s in sections])[:-1]
        return cls(surroundings, targets, mixture, spots, patterns, groups, ends)

    def unseen(self, part: Indices) -> Floats:
        """Predict each spot's patterns by members that were fitted without its part and mixed as those of all."""
        unseen = np.zeros_like(self.patterns)
        for k in np.unique(part):
            kept, gone = np.flatnonzero(part != k), np.flatnonzero(part == k)
            if len(kept):
                mixed = fit_members(
                    self.spots.take(kept), self.patterns[kept], self.groups[kept], self.mixture
                )
                unseen[gone] = mixed.affine(self.spots.features[gone])
        return unseen

    def split(self, values: NDArray[Number]) -> list[NDArray[Number]]:
        """Return values of all spots, section by section."""
        return np.split(values, self.ends)


def _parts(linear: LinearFit, seed: int) -> Indices:
    """Draw `PARTS` parts of the spots."""
    return np.asarray(np.random.default_rng(seed).permutation(len(linear.spots)) % PARTS)


def see_spots(sections: Sequence[TrainingSection], surroundings: Surroundings) -> Measured:
    """Return the spots of all sections with their views as features."""
    return Measured(
        np.repeat(np.arange(len(sections)), [len(s.spot_xy_um) for s in sections]),
        np.concatenate([s.spot_xy_um for s in sections]),
        np.concatenate([surroundings.describe_spots(s) for s in sections]),
    )


def fit_depth(
    spots: Measured, sections: Sequence[TrainingSection], groups: Indices, moved: Floats | None = None
) -> Affine | None:
    """Fit a ridge of the log of total counts; each section's own mean is taken out, the pooled one put back."""
    logs = [np.log(np.maximum(s.library, 1.0)) for s in sections if s.library is not None]
    if len(logs) < len(sections):
        return None
    Y = np.concatenate([log - log.mean() for log in logs])[:, None]
    affine = fit_ridge(spots, Y, groups, moved)
    return Affine(affine.weight, affine.offset + np.concatenate(logs).mean())


RECORD = ModelRecord(
    "dense",
    "Means of ridge regressions on Gaussian neighbourhoods of three widths, low-rank targets; the default.",
    lambda: DenseModel,
)
