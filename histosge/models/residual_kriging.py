"""What an image model leaves over at measured spots, interpolated in space and blended in.

The leftover is taken from predictions that did not see the spot, reduced to patterns, and interpolated by a
Gaussian process over position and views. How much of it is added is decided pattern by pattern on spots
left out in turn: 0 where that does not help.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.models.kriging import EXACT, Kriging, Measured, left_out
from histosge.models.linear_algebra import Floats, Standardiser
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import Surroundings
from histosge.models.protocol import State

PATTERNS = 10
PARTS = 5
"""Beyond `EXACT` spots the blend is validated on this many parts instead of single spots."""


@dataclass(frozen=True)
class Leftover:
    """From patches of measured slides to what must be added to an image model's log1p(CP10k).

    Parameters
    ----------
    surroundings, standardiser
        Embeddings -> features.
    targets
        Patterns of what is left -> genes.
    process, blend
        Features and position -> patterns, and the share of each that is added, 0..1, ``(n_patterns,)``.
    slides, means
        Slide ids in the order of the process, and what is left on average on each, ``(n_slides, n_genes)``.
    """

    surroundings: Surroundings
    standardiser: Standardiser
    targets: LowRankTargets
    process: Kriging
    blend: Floats
    slides: tuple[str, ...]
    means: Floats

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], predicted: Sequence[NDArray[np.float32]]) -> Self:
        """Learn from spots; see `fit_unseen`."""
        return cls.fit_unseen(sections, predicted)[0]

    @classmethod
    def fit_unseen(
        cls, sections: Sequence[TrainingSection], predicted: Sequence[NDArray[np.float32]]
    ) -> tuple[Self, list[NDArray[np.float32]]]:
        """Learn from spots and from what the image model says of each without having seen it.

        Parameters
        ----------
        predicted
            log1p(CP10k) per section, ``(n_spots, n_genes)``.

        Returns
        -------
        tuple
            The leftover, and per section what must be added at each spot, learned from the other spots.
        """
        left = [replace(s, target=s.target - p) for s, p in zip(sections, predicted, strict=True)]
        surroundings, targets = Surroundings.of(sections), LowRankTargets.of(left, PATTERNS)
        views = np.concatenate([surroundings.describe_spots(s) for s in sections])
        standardiser = Standardiser.of(views)
        slide = np.repeat(np.arange(len(sections)), [len(s.spot_xy_um) for s in sections])
        xy_um = np.concatenate([s.spot_xy_um for s in sections])
        spots = Measured(slide, xy_um, standardiser.apply(views))
        patterns = np.concatenate([targets.patterns(s) for s in left])
        process = Kriging.fit(spots, patterns)
        unseen = _unseen(spots, patterns, process)
        means = np.stack([s.target.mean(axis=0, dtype=np.float64) for s in left])
        blend = choose_blend(patterns, unseen)
        ids = tuple(s.patches.slide_id for s in sections)
        fitted = cls(surroundings, standardiser, targets, process, blend, ids, means)
        return fitted, [fitted._genes(unseen[slide == i], i) for i in range(len(sections))]

    def __call__(self, patches: Patches) -> NDArray[np.float32]:
        """Return what to add to log1p(CP10k), ``(n_patches, n_genes)``; 0 on other slides."""
        if patches.slide_id not in self.slides:
            return np.zeros((len(patches), len(self.targets.mean)), np.float32)
        number = self.slides.index(patches.slide_id)
        patterns = self.surroundings.project(patches, self.process.affine().after(self.standardiser))
        patterns += self.process.by_position(number, patches.xy_um)
        return self._genes(patterns, number)

    def _genes(self, patterns: Floats, number: int) -> NDArray[np.float32]:
        weight = (self.targets.axes * self.targets.sd[:, None]).T.astype(np.float32)
        added = (patterns * self.blend).astype(np.float32) @ weight
        return np.asarray(added + self.means[number].astype(np.float32))

    def config(self) -> dict[str, Any]:
        """Return the choices."""
        kernels = [[k.length_um, k.share, k.noise] for k in self.process.kernels]
        return {"slides": list(self.slides), "blend": self.blend.tolist(), "kernels": kernels}

    def state(self) -> State:
        """Return the arrays."""
        arrays = {
            **self.surroundings.state(),
            **self.targets.state(),
            **self.process.state(),
            "features.mean": self.standardiser.mean,
            "features.scale": self.standardiser.scale,
            "blend": self.blend,
            "means": self.means,
        }
        return {f"leftover.{name}": array for name, array in arrays.items()}

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        own = {k.removeprefix("leftover."): v for k, v in state.items() if k.startswith("leftover.")}
        return cls(
            Surroundings.from_state(own),
            Standardiser(own["features.mean"], own["features.scale"]),
            LowRankTargets.from_state(own),
            Kriging.from_state(own),
            own["blend"],
            tuple(config["slides"]),
            own["means"],
        )


def choose_blend(truth: Floats, unseen: Floats) -> Floats:
    """Return the share of each column of `unseen` that predicts `truth` best: 0 to 1, 0 if none helps."""
    square = np.maximum((unseen**2).sum(axis=0), 1e-300)
    share = np.clip((unseen * truth).sum(axis=0) / square, 0.0, 1.0)
    helps = ((truth - share * unseen) ** 2).sum(axis=0) < (truth**2).sum(axis=0)
    return np.asarray(np.where(helps, share, 0.0))


def _unseen(spots: Measured, patterns: Floats, process: Kriging) -> Floats:
    """Predict each spot from others: all others, or beyond `EXACT` spots those of the other parts."""
    if len(spots) <= EXACT:
        return left_out(spots, patterns, process.kernels)
    out, part = np.empty_like(patterns), np.random.default_rng(0).permutation(len(spots)) % PARTS
    for k in range(PARTS):
        kept, gone = np.flatnonzero(part != k), np.flatnonzero(part == k)
        out[gone] = Kriging.fit(spots.take(kept), patterns[kept], process.kernels)(spots.take(gone))
    return out
