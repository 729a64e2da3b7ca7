"""Gaussian processes over positions and features: interpolation of patterns between measured spots.

Arithmetic on matrices: it knows positions, features and outputs, not patches or genes. Exact up to
`EXACT` spots; beyond, positions are seen through inducing points (a Nystroem approximation), so that cost
grows linearly with the spots.

    f(x) ~ GP(0, (1 - w) exp(-|p - p'|^2 / 2 l^2) [same slide] + w <z, z'> / c),    y = f + noise

Terms
    position  p in microns; slides do not know each other's positions
    feature   z, shared by all slides; c scales the mean square norm of the training features to 1
    anchor    a position that carries weights: every spot, or an inducing point
    share     w, how much of the signal the features explain
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial import cKDTree
from scipy.spatial.distance import cdist

from histosge.models.linear_algebra import Affine, Floats
from histosge.models.protocol import State

EXACT = 3000
"""Spots that are solved exactly; 3,000 need some 200 MB and seconds."""
ANCHORS = 1500
"""Inducing points over all slides, beyond `EXACT` spots."""
JUDGES = 400
"""Spots that the kernel is chosen on, at most: more hardly move the choice, and cost their cube."""
PITCHES = (1.0, 2.0, 4.0, 8.0)
"""Length scales tried, in distances between neighbouring spots."""
SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.97)
NOISES = tuple(float(v) for v in 10.0 ** np.arange(-1.5, 2.6, 0.25))
"""Noise variances tried, as multiples of the signal's."""
_JITTER = 1e-8
_ROWS = 4096


@dataclass(frozen=True)
class Kernel:
    """One output's choice: length scale in microns, share of the features, noise over signal."""

    length_um: float
    share: float
    noise: float


@dataclass(frozen=True)
class Measured:
    """Spots that a process is fitted to.

    Parameters
    ----------
    slide
        Number of each spot's slide, ``(n,)``.
    xy_um
        Positions, ``(n, 2)``.
    features
        ``(n, dim)``; no columns for position alone.
    """

    slide: NDArray[np.int64]
    xy_um: Floats
    features: Floats

    def __len__(self) -> int:
        return len(self.slide)

    def take(self, rows: NDArray[np.int64]) -> "Measured":
        """Return some of the spots."""
        return Measured(self.slide[rows], self.xy_um[rows], self.features[rows])

    @property
    def scale(self) -> float:
        """Return c, the mean square norm of the features (1 where there are none)."""
        return max(float((self.features**2).sum(axis=1).mean()), 1e-12) if self.features.shape[1] else 1.0

    def pitch_um(self) -> float:
        """Return the median distance to the nearest spot of the same slide (100 where every spot is alone)."""
        near = []
        for number in np.unique(self.slide):
            xy_um = self.xy_um[self.slide == number]
            if len(xy_um) > 1:
                near.append(np.asarray(cKDTree(xy_um).query(xy_um, k=[2])[0]).ravel())
        return max(float(np.median(np.concatenate(near))), 1e-3) if near else 100.0


@dataclass(frozen=True)
class Kriging:
    """A fitted process: anchors with weights, and what the features give.

    Parameters
    ----------
    anchors
        Slide number -> positions ``(n_anchors, 2)``.
    weights
        Slide number -> ``(n_anchors, n_outputs)``.
    kernels
        One per output.
    linear
        Features -> outputs, ``(dim, n_outputs)``.
    """

    anchors: Mapping[int, Floats]
    weights: Mapping[int, Floats]
    kernels: tuple[Kernel, ...]
    linear: Floats

    @classmethod
    def fit(cls, spots: Measured, Y: Floats, kernels: Sequence[Kernel] | None = None) -> Self:
        """Fit ``(n, n_outputs)`` values of mean about 0; kernels are chosen here unless given."""
        chosen = tuple(kernels) if kernels is not None else choose_kernels(spots, Y)
        solve = _exact if len(spots) <= EXACT else _inducing
        anchors, weights, linear = solve(spots, Y, chosen)
        return cls(anchors, weights, chosen, linear)

    def by_position(self, slide: int, xy_um: Floats) -> Floats:
        """Return what position alone gives, ``(n, n_outputs)``; 0 on a slide without anchors."""
        out = np.zeros((len(xy_um), len(self.kernels)))
        if slide not in self.anchors:
            return out
        lengths = np.array([kernel.length_um for kernel in self.kernels])
        for start in range(0, len(xy_um), _ROWS):
            square = cdist(xy_um[start : start + _ROWS], self.anchors[slide], "sqeuclidean")
            for length in np.unique(lengths):
                own = lengths == length
                near = np.exp(square * (-0.5 / length**2))
                out[start : start + _ROWS, own] = near @ self.weights[slide][:, own]
        return out

    def affine(self) -> Affine:
        """Return the map of the features."""
        return Affine(self.linear, np.zeros(self.linear.shape[1]))

    def __call__(self, spots: Measured) -> Floats:
        """Return the process at positions and features, ``(n, n_outputs)``."""
        out = spots.features @ self.linear
        for number in np.unique(spots.slide):
            mine = spots.slide == number
            out[mine] += self.by_position(int(number), spots.xy_um[mine])
        return np.asarray(out)

    def state(self) -> State:
        """Return the arrays."""
        kernels = [[k.length_um, k.share, k.noise] for k in self.kernels]
        arrays: State = {
            "kriging.linear": self.linear,
            "kriging.kernels": np.array(kernels, dtype=np.float64).reshape(-1, 3),
            "kriging.slides": np.array(list(self.anchors), dtype=np.int64),
        }
        for number in self.anchors:
            arrays[f"kriging.anchors.{number}"] = self.anchors[number]
            arrays[f"kriging.weights.{number}"] = self.weights[number]
        return arrays

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        slides = [int(number) for number in state["kriging.slides"]]
        return cls(
            {i: state[f"kriging.anchors.{i}"] for i in slides},
            {i: state[f"kriging.weights.{i}"] for i in slides},
            tuple(Kernel(*map(float, row)) for row in state["kriging.kernels"]),
            state["kriging.linear"],
        )


def choose_kernels(spots: Measured, Y: Floats) -> tuple[Kernel, ...]:
    """Choose kernels by marginal likelihood, over a grid; the signal's size is profiled out.

    Up to `EXACT` spots every output has its own; beyond, all share one, so that one solution serves them.
    """
    together, rows = len(spots) > EXACT, _judges(len(spots))
    spots, Y = spots.take(rows), Y[rows]
    best = np.full(Y.shape[1], -np.inf)
    chosen = [Kernel(100.0, 0.0, NOISES[-1])] * Y.shape[1]
    shares = SHARES if spots.features.shape[1] else (0.0,)
    linear = spots.features @ spots.features.T / spots.scale
    for length in (pitch * spots.pitch_um() for pitch in PITCHES):
        near = _near(spots.slide, spots.xy_um, spots.slide, spots.xy_um, length)
        for share in shares:
            values, vectors = np.linalg.eigh((1 - share) * near + share * linear)
            square = (vectors.T @ Y) ** 2
            for noise in NOISES:
                spread = np.maximum(values, 0.0) + noise
                signal = np.maximum((square / spread[:, None]).mean(axis=0), 1e-300)
                likelihood = -0.5 * (len(spots) * np.log(signal) + np.log(spread).sum())
                if together:
                    likelihood = np.full_like(likelihood, likelihood.sum())
                for output in np.nonzero(likelihood > best)[0]:
                    best[output], chosen[output] = likelihood[output], Kernel(length, share, noise)
    return tuple(chosen)


def left_out(spots: Measured, Y: Floats, kernels: Sequence[Kernel]) -> Floats:
    """Return each spot's prediction from all others, ``(n, n_outputs)``, in closed form; exact spots only."""
    out = np.empty_like(Y)
    for kernel, columns in _by_kernel(kernels):
        inverse = np.linalg.inv(_gram(spots, kernel))
        out[:, columns] = Y[:, columns] - inverse @ Y[:, columns] / np.diag(inverse)[:, None]
    return out


def _judges(n: int) -> NDArray[np.int64]:
    if n <= JUDGES:
        return np.arange(n)
    return np.sort(np.random.default_rng(n).choice(n, JUDGES, replace=False))


def _near(
    slide: NDArray[np.int64],
    xy_um: Floats,
    other_slide: NDArray[np.int64],
    other_xy_um: Floats,
    length_um: float,
) -> Floats:
    near = np.exp(cdist(xy_um, other_xy_um, "sqeuclidean") * (-0.5 / length_um**2))
    return np.asarray(near * (slide[:, None] == other_slide[None, :]))


def _gram(spots: Measured, kernel: Kernel) -> Floats:
    gram = (1 - kernel.share) * _near(spots.slide, spots.xy_um, spots.slide, spots.xy_um, kernel.length_um)
    gram += kernel.share / spots.scale * (spots.features @ spots.features.T)
    gram[np.diag_indices_from(gram)] += kernel.noise
    return np.asarray(gram)


def _by_kernel(kernels: Sequence[Kernel]) -> list[tuple[Kernel, list[int]]]:
    """Return the distinct kernels with the outputs that chose them: each is solved once."""
    return [
        (kernel, [i for i, other in enumerate(kernels) if other == kernel])
        for kernel in dict.fromkeys(kernels)
    ]


Solution = tuple[dict[int, Floats], dict[int, Floats], Floats]


def _exact(spots: Measured, Y: Floats, kernels: Sequence[Kernel]) -> Solution:
    weights, linear = np.empty_like(Y), np.empty((spots.features.shape[1], Y.shape[1]))
    for kernel, columns in _by_kernel(kernels):
        solved = cho_solve(cho_factor(_gram(spots, kernel), lower=True), Y[:, columns])
        weights[:, columns] = (1 - kernel.share) * solved
        linear[:, columns] = kernel.share / spots.scale * (spots.features.T @ solved)
    numbers = [int(i) for i in np.unique(spots.slide)]
    return (
        {i: spots.xy_um[spots.slide == i] for i in numbers},
        {i: weights[spots.slide == i] for i in numbers},
        linear,
    )


def _inducing(spots: Measured, Y: Floats, kernels: Sequence[Kernel]) -> Solution:
    """Solve in the weights of the anchors' features, which are far fewer than the spots."""
    anchors = _spread_out(spots)
    slide = np.repeat(np.array(list(anchors)), [len(a) for a in anchors.values()])
    xy_um = np.concatenate(list(anchors.values()))
    weights, linear = np.empty((len(xy_um), Y.shape[1])), np.empty((spots.features.shape[1], Y.shape[1]))
    for kernel, columns in _by_kernel(kernels):
        among = _near(slide, xy_um, slide, xy_um, kernel.length_um)
        among[np.diag_indices_from(among)] += _JITTER * len(among)
        values, vectors = np.linalg.eigh(among)
        half = vectors / np.sqrt(np.maximum(values, _JITTER))
        size = half.shape[1] + spots.features.shape[1]
        square, product = np.zeros((size, size)), np.zeros((size, len(columns)))
        for start in range(0, len(spots), _ROWS):
            part = spots.take(np.arange(start, min(start + _ROWS, len(spots))))
            near = _near(part.slide, part.xy_um, slide, xy_um, kernel.length_um) @ half
            design = np.hstack(
                [np.sqrt(1 - kernel.share) * near, np.sqrt(kernel.share / spots.scale) * part.features]
            )
            square += design.T @ design
            product += design.T @ Y[start : start + _ROWS][:, columns]
        square[np.diag_indices_from(square)] += kernel.noise
        solved = cho_solve(cho_factor(square, lower=True), product)
        weights[:, columns] = np.sqrt(1 - kernel.share) * (half @ solved[: half.shape[1]])
        linear[:, columns] = np.sqrt(kernel.share / spots.scale) * solved[half.shape[1] :]
    return anchors, {i: weights[slide == i] for i in anchors}, linear


def _spread_out(spots: Measured) -> dict[int, Floats]:
    """Choose anchors among each slide's spots, evenly: every k-th along a space-filling order."""
    anchors = {}
    for number in np.unique(spots.slide):
        xy_um = spots.xy_um[spots.slide == number]
        wanted = max(1, round(ANCHORS * len(xy_um) / len(spots)))
        pitch = max(float(np.sqrt(np.prod(np.ptp(xy_um, axis=0) + 1.0) / wanted)), 1e-9)
        cell = np.floor(xy_um / pitch).astype(np.int64)
        _, first = np.unique(cell, axis=0, return_index=True)
        anchors[int(number)] = xy_um[np.sort(first)]
    return anchors
