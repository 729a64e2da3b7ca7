"""Gaussian-process regression over positions and features: interpolation between measured spots.

Arithmetic on matrices: it knows positions, features and outputs, not patches or genes. Exact up to
`MAX_EXACT_SPOTS`; beyond, positions are represented by inducing points (a Nystroem approximation), so that cost
grows linearly with the spots.

    f(x) ~ GP(0, (1 - w) exp(-|p - p'|^2 / 2 l^2) [same slide] + w <z, z'> / c),    y = f + noise

Terms
    position  p in microns; slides do not know each other's positions
    feature   z, shared by all slides; c scales the mean square norm of the training features to 1
    centre    a position that carries weights: every spot, or an inducing point
    share     w, how much of the signal's variance the features explain
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve
from scipy.spatial.distance import cdist

from histosge.data.spot_overlap import spot_pitch_um
from histosge.errors import ModelError
from histosge.models.linear_algebra import Affine, Floats, symmetric_eigen
from histosge.models.nested_state import take
from histosge.models.protocol import State
from histosge.threads import one_blas_thread

MAX_EXACT_SPOTS = 3000
"""Spots that are solved exactly; 3,000 need some 200 MB and seconds."""
N_INDUCING = 1500
"""Inducing points over all slides, beyond `MAX_EXACT_SPOTS`."""
MAX_SPOTS_OF_CHOICE = 400
"""Spots that the kernel is chosen on, at most: more hardly change the choice, and cost their cube."""
LENGTHS_IN_PITCHES = (1.0, 2.0, 4.0, 8.0)
"""Length scales tried, in distances between neighbouring spots."""
FEATURE_SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 0.97)
NOISES = tuple(float(v) for v in 10.0 ** np.arange(-1.5, 2.6, 0.25))
"""Noise variances tried, as multiples of the signal's."""
# Added to the diagonal of kernel matrices whose centres nearly coincide: without it they are singular in float64.
_JITTER = 1e-8
# Rows of the matrix (positions x centres) that are in memory at once.
_ROWS_AT_ONCE = 4096


@dataclass(frozen=True)
class Kernel:
    """One output's choice: length scale in microns, share of the features, noise variance over the signal's."""

    length_um: float
    share: float
    noise: float


@dataclass(frozen=True)
class SpotFeatures:
    """Positions and features of spots: those that a process is fitted to, or those that it predicts.

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

    def take(self, rows: NDArray[np.int64]) -> "SpotFeatures":
        """Return some of the spots."""
        return SpotFeatures(self.slide[rows], self.xy_um[rows], self.features[rows])

    @property
    def scale(self) -> float:
        """Return c, the mean square norm of the features (1 where there are none)."""
        return max(float((self.features**2).sum(axis=1).mean()), 1e-12) if self.features.shape[1] else 1.0

    def pitch_um(self) -> float:
        """Return the median distance to the nearest spot of the same slide (100 where every spot is alone)."""
        pitch_um = spot_pitch_um([self.xy_um[self.slide == number] for number in np.unique(self.slide)])
        # Spots at one and the same position would make all length scales 0.
        return 100.0 if pitch_um is None else max(pitch_um, 1e-3)


@dataclass(frozen=True)
class Kriging:
    """A fitted process: a spatial part, as centres with weights, and a linear part of the features.

    Parameters
    ----------
    centres
        Slide number -> positions in microns, ``(n_centres, 2)``.
    weights
        Slide number -> ``(n_centres, n_outputs)``.
    kernels
        One per output.
    linear
        Features -> outputs, ``(dim, n_outputs)``.
    """

    centres: Mapping[int, Floats]
    weights: Mapping[int, Floats]
    kernels: tuple[Kernel, ...]
    linear: Floats

    @classmethod
    def fit(cls, spots: SpotFeatures, Y: Floats, kernels: Sequence[Kernel] | None = None) -> Self:
        """Fit ``(n, n_outputs)`` values of mean about 0; kernels, one per output, are chosen here unless given."""
        chosen = tuple(kernels) if kernels is not None else choose_kernels(spots, Y)
        solve = _solve_exact if len(spots) <= MAX_EXACT_SPOTS else _solve_inducing
        centres, weights, linear = solve(spots, Y, chosen)
        return cls(centres, weights, chosen, linear)

    def spatial_part(self, slide: int, xy_um: Floats) -> Floats:
        """Return the part of position, ``(n, n_outputs)``; 0 on a slide without centres."""
        out = np.zeros((len(xy_um), len(self.kernels)))
        if slide not in self.centres:
            return out
        lengths = np.array([kernel.length_um for kernel in self.kernels])
        for start in range(0, len(xy_um), _ROWS_AT_ONCE):
            square = cdist(xy_um[start : start + _ROWS_AT_ONCE], self.centres[slide], "sqeuclidean")
            # Outputs with one length share a kernel matrix: the exponentials are most of the cost.
            for length in np.unique(lengths):
                columns = lengths == length
                correlation = np.exp(square * (-0.5 / length**2))
                out[start : start + _ROWS_AT_ONCE, columns] = correlation @ self.weights[slide][:, columns]
        return out

    def feature_part(self) -> Affine:
        """Return the linear map of the features, which holds on any slide."""
        return Affine(self.linear, np.zeros(self.linear.shape[1]))

    def __call__(self, spots: SpotFeatures) -> Floats:
        """Return the process at positions and features, ``(n, n_outputs)``."""
        out = spots.features @ self.linear
        for number in np.unique(spots.slide):
            on_slide = spots.slide == number
            out[on_slide] += self.spatial_part(int(number), spots.xy_um[on_slide])
        return np.asarray(out)

    def kernel_table(self) -> list[list[float]]:
        """Return length scale, share and noise of each output, JSON-ready."""
        return [[k.length_um, k.share, k.noise] for k in self.kernels]

    def state(self) -> State:
        """Return the arrays."""
        arrays: State = {
            "kriging.linear": self.linear,
            # The shape is given, since a list of no kernels would make an array of another one.
            "kriging.kernels": np.array(self.kernel_table(), dtype=np.float64).reshape(-1, 3),
            "kriging.slides": np.array(list(self.centres), dtype=np.int64),
        }
        for number in self.centres:
            arrays[f"kriging.anchors.{number}"] = self.centres[number]
            arrays[f"kriging.weights.{number}"] = self.weights[number]
        return arrays

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        slides = [int(number) for number in take(state, "kriging.slides", None)]
        if slides != sorted(set(slides)):
            raise ModelError(f"tensor 'kriging.slides' names slides {slides[:10]}, not each once in order")
        linear = take(state, "kriging.linear", None, None)
        n_outputs = linear.shape[1]
        centres = {i: take(state, f"kriging.anchors.{i}", None, 2) for i in slides}
        return cls(
            centres,
            {i: take(state, f"kriging.weights.{i}", len(centres[i]), n_outputs) for i in slides},
            tuple(Kernel(*map(float, row)) for row in take(state, "kriging.kernels", n_outputs, 3)),
            linear,
        )


def choose_kernels(spots: SpotFeatures, Y: Floats) -> tuple[Kernel, ...]:
    """Choose kernels by marginal likelihood, over a grid; the signal's variance is profiled out.

    Up to `MAX_EXACT_SPOTS` every output has its own; beyond, all share one, so that one solution serves them.
    """
    shared, rows = len(spots) > MAX_EXACT_SPOTS, _sample(len(spots))
    spots, Y = spots.take(rows), Y[rows]
    best = np.full(Y.shape[1], -np.inf)
    chosen = [Kernel(100.0, 0.0, NOISES[-1])] * Y.shape[1]
    shares = FEATURE_SHARES if spots.features.shape[1] else (0.0,)
    linear = spots.features @ spots.features.T / spots.scale
    for length in (pitch * spots.pitch_um() for pitch in LENGTHS_IN_PITCHES):
        spatial = _correlation(spots.slide, spots.xy_um, spots.slide, spots.xy_um, length)
        for share in shares:
            # One decomposition serves all noises: they only add to the eigenvalues.
            values, vectors = symmetric_eigen((1 - share) * spatial + share * linear)
            square = (vectors.T @ Y) ** 2
            for noise in NOISES:
                variance = np.maximum(values, 0.0) + noise
                # The signal's variance that maximises the likelihood, in closed form.
                signal = np.maximum((square / variance[:, None]).mean(axis=0), 1e-300)
                likelihood = -0.5 * (len(spots) * np.log(signal) + np.log(variance).sum())
                if shared:
                    likelihood = np.full_like(likelihood, likelihood.sum())
                for output in np.nonzero(likelihood > best)[0]:
                    best[output], chosen[output] = likelihood[output], Kernel(length, share, noise)
    return tuple(chosen)


def leave_one_out(spots: SpotFeatures, Y: Floats, kernels: Sequence[Kernel]) -> Floats:
    """Return each spot's prediction from all others, ``(n, n_outputs)``; for at most `MAX_EXACT_SPOTS`."""
    out = np.empty_like(Y)
    for kernel, columns in _outputs_by_kernel(kernels):
        # Closed form: y - [K^-1 y] / diag(K^-1) (Rasmussen and Williams, 2006, eq. 5.12).
        inverse = np.linalg.inv(_kernel_matrix(spots, kernel))
        out[:, columns] = Y[:, columns] - inverse @ Y[:, columns] / np.diag(inverse)[:, None]
    return out


def _sample(n: int) -> NDArray[np.int64]:
    """Draw the spots that a kernel is chosen on; the same ones for the same number of spots."""
    if n <= MAX_SPOTS_OF_CHOICE:
        return np.arange(n)
    return np.sort(np.random.default_rng(n).choice(n, MAX_SPOTS_OF_CHOICE, replace=False))


def _correlation(
    slide: NDArray[np.int64],
    xy_um: Floats,
    other_slide: NDArray[np.int64],
    other_xy_um: Floats,
    length_um: float,
) -> Floats:
    """Return the squared-exponential kernel of positions, 0 between slides."""
    kernel = np.exp(cdist(xy_um, other_xy_um, "sqeuclidean") * (-0.5 / length_um**2))
    return np.asarray(kernel * (slide[:, None] == other_slide[None, :]))


def _kernel_matrix(spots: SpotFeatures, kernel: Kernel) -> Floats:
    matrix = (1 - kernel.share) * _correlation(
        spots.slide, spots.xy_um, spots.slide, spots.xy_um, kernel.length_um
    )
    matrix += kernel.share / spots.scale * (spots.features @ spots.features.T)
    matrix[np.diag_indices_from(matrix)] += kernel.noise
    return np.asarray(matrix)


def _outputs_by_kernel(kernels: Sequence[Kernel]) -> list[tuple[Kernel, list[int]]]:
    """Return the distinct kernels with the outputs that chose them: each is solved once."""
    return [
        (kernel, [i for i, other in enumerate(kernels) if other == kernel])
        for kernel in dict.fromkeys(kernels)
    ]


Solution = tuple[dict[int, Floats], dict[int, Floats], Floats]
"""Centres and weights by slide, and the weights of the features."""


def _solve_exact(spots: SpotFeatures, Y: Floats, kernels: Sequence[Kernel]) -> Solution:
    weights, linear = np.empty_like(Y), np.empty((spots.features.shape[1], Y.shape[1]))
    for kernel, columns in _outputs_by_kernel(kernels):
        # One thread, as for eigenvalues: see `symmetric_eigen`.
        with one_blas_thread():
            solved = cho_solve(cho_factor(_kernel_matrix(spots, kernel), lower=True), Y[:, columns])
        weights[:, columns] = (1 - kernel.share) * solved
        linear[:, columns] = kernel.share / spots.scale * (spots.features.T @ solved)
    numbers = [int(i) for i in np.unique(spots.slide)]
    return (
        {i: spots.xy_um[spots.slide == i] for i in numbers},
        {i: weights[spots.slide == i] for i in numbers},
        linear,
    )


def _solve_inducing(spots: SpotFeatures, Y: Floats, kernels: Sequence[Kernel]) -> Solution:
    """Solve ridge regression on the kernel's values at inducing points, which are far fewer than the spots."""
    centres = _inducing_points(spots)
    slide = np.repeat(np.array(list(centres)), [len(a) for a in centres.values()])
    xy_um = np.concatenate(list(centres.values()))
    weights, linear = np.empty((len(xy_um), Y.shape[1])), np.empty((spots.features.shape[1], Y.shape[1]))
    for kernel, columns in _outputs_by_kernel(kernels):
        among = _correlation(slide, xy_um, slide, xy_um, kernel.length_um)
        among[np.diag_indices_from(among)] += _JITTER * len(among)
        values, vectors = symmetric_eigen(among)
        # The inverse square root: products of features then are the Nystroem approximation of the kernel.
        root = vectors / np.sqrt(np.maximum(values, _JITTER))
        size = root.shape[1] + spots.features.shape[1]
        # Only sums over spots are kept, so memory does not grow with their number.
        gram, product = np.zeros((size, size)), np.zeros((size, len(columns)))
        for start in range(0, len(spots), _ROWS_AT_ONCE):
            part = spots.take(np.arange(start, min(start + _ROWS_AT_ONCE, len(spots))))
            spatial = _correlation(part.slide, part.xy_um, slide, xy_um, kernel.length_um) @ root
            design = np.hstack(
                [np.sqrt(1 - kernel.share) * spatial, np.sqrt(kernel.share / spots.scale) * part.features]
            )
            gram += design.T @ design
            product += design.T @ Y[start : start + _ROWS_AT_ONCE][:, columns]
        gram[np.diag_indices_from(gram)] += kernel.noise
        solved = cho_solve(cho_factor(gram, lower=True), product)
        weights[:, columns] = np.sqrt(1 - kernel.share) * (root @ solved[: root.shape[1]])
        linear[:, columns] = np.sqrt(kernel.share / spots.scale) * solved[root.shape[1] :]
    return centres, {i: weights[slide == i] for i in centres}, linear


def _inducing_points(spots: SpotFeatures) -> dict[int, Floats]:
    """Choose inducing points among each slide's spots: the first spot of every cell of a square lattice."""
    centres = {}
    for number in np.unique(spots.slide):
        xy_um = spots.xy_um[spots.slide == number]
        wanted = max(1, round(N_INDUCING * len(xy_um) / len(spots)))
        # As many cells as points are wanted, if the slide's bounding box were full of tissue.
        side = max(float(np.sqrt(np.prod(np.ptp(xy_um, axis=0) + 1.0) / wanted)), 1e-9)
        cell = np.floor(xy_um / side).astype(np.int64)
        _, first = np.unique(cell, axis=0, return_index=True)
        centres[int(number)] = xy_um[np.sort(first)]
    return centres
