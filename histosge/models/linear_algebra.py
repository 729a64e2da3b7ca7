"""The linear algebra that presets share: standardise, principal axes, ridge regression with a chosen penalty.

All in float64. It knows matrices, not patches or genes.

Terms
    group    rows that are held out together when the penalty is chosen: a section, or a stripe of one
    penalty  ridge's alpha divided by the number of rows, so that it means the same on a subset of them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import TrainingSection
from histosge.models.cholesky import CholeskyFactor
from histosge.models.nested_state import take
from histosge.models.protocol import State
from histosge.threads import one_blas_thread

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

# Four a decade. The largest shrinks an output that cannot be predicted to its mean: as good as leaving it out.
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-2, 4.01, 0.25))
N_STRIPES = 4
"""Stripes that a lone section is cut into, so that a penalty is chosen on tissue apart from what was fitted."""


@dataclass(frozen=True)
class Standardiser:
    """Bring each column to mean 0 and standard deviation 1; a constant column becomes 0.

    Parameters
    ----------
    mean, scale
        Shape ``(dim,)``; `scale` is infinite where a column is constant.
    """

    mean: Floats
    scale: Floats

    @classmethod
    def fit(cls, values: Floats) -> Self:
        """Measure mean and standard deviation of ``(n, dim)`` values."""
        mean, sd = values.mean(axis=0), values.std(axis=0)
        # A spread that is only rounding would blow noise up to size 1 on the next slide.
        return cls(mean, np.where(sd > 1e-6 * np.maximum(np.abs(mean), 1e-6), sd, np.inf))

    @classmethod
    def from_state(cls, state: State, prefix: str) -> Self:
        """Rebuild from the arrays ``prefix.mean`` and ``prefix.scale``."""
        mean = take(state, f"{prefix}.mean", None)
        return cls(mean, take(state, f"{prefix}.scale", len(mean)))

    def apply(self, values: NDArray[np.floating]) -> Floats:
        """Return standardised values, of the same shape."""
        return np.asarray((values - self.mean) / self.scale, dtype=np.float64)


@dataclass(frozen=True)
class Affine:
    """``x @ weight + offset``: any chain of linear steps, multiplied out.

    Parameters
    ----------
    weight, offset
        Shapes ``(dim, n_outputs)`` and ``(n_outputs,)``, float64.
    """

    weight: Floats
    offset: Floats

    def __call__(self, values: NDArray[np.floating]) -> Floats:
        """Map ``(n, dim)`` values to ``(n, n_outputs)``."""
        return np.asarray(values.astype(np.float64) @ self.weight + self.offset)

    def after(self, standardiser: Standardiser) -> "Affine":
        """Return the composition: standardise first, then apply this map."""
        weight = self.weight / standardiser.scale[:, None]
        return Affine(weight, self.offset - standardiser.mean @ weight)

    def state(self) -> State:
        """Return both arrays."""
        return {"weight": self.weight, "offset": self.offset}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        weight = take(state, "weight", None, None)
        return cls(weight, take(state, "offset", weight.shape[1]))


def symmetric_eigen(matrix: Floats) -> tuple[Floats, Floats]:
    """Return eigenvalues, ascending, and eigenvectors of a symmetric matrix, as `numpy.linalg.eigh` does.

    On one thread: LAPACK calls small threaded products thousands of times, and at each the threads wait for cores that
    another process uses. A matrix of 1,100 x 1,100 took 9.8 s on two such cores instead of 0.8; alone it takes 0.20 s
    instead of 0.15.
    """
    with one_blas_thread():
        values, vectors = np.linalg.eigh(matrix)
    return values, vectors


def shifted_solve(matrix: Floats, shift: float, right: Floats) -> Floats:
    """Return ``(matrix + shift * identity)^-1 @ right`` of a symmetric positive semidefinite matrix.

    On one thread, as `symmetric_eigen`. Of 1,536 x 1,536 it takes a fifteenth of the time of a decomposition into
    eigenvectors.

    Parameters
    ----------
    matrix
        ``(n, n)``.
    shift
        Positive.
    right
        ``(n, n_columns)``.
    """
    shifted = matrix.copy()
    np.einsum("ii->i", shifted)[:] += shift
    with one_blas_thread():
        try:
            return CholeskyFactor.of(shifted).solve(right)
        except np.linalg.LinAlgError:
            # The shift is less than the rounding of the matrix.
            values, vectors = symmetric_eigen(matrix)
            return np.asarray(vectors @ (vectors.T @ right / (np.maximum(values, 0.0) + shift)[:, None]))


def principal_axes(values: Floats, n_axes: int) -> Floats:
    """Return the leading principal axes of ``(n, dim)`` rows, ``(dim, at most n_axes)``, orthonormal.

    Rows are centred here. Signs are fixed (the largest entry of each axis is positive), so that they do not differ
    between machines.
    """
    centred = values - values.mean(axis=0)
    n, dim = centred.shape
    # The smaller of the two Gram matrices has the same non-zero eigenvalues, and eigh costs the cube of its side.
    if n < dim:
        square, left = symmetric_eigen(centred @ centred.T)
        order = np.argsort(square)[::-1][:n_axes]
        # n centred rows have rank n - 1 at most: dividing by an eigenvalue that is only rounding gives noise axes.
        order = order[square[order] > 1e-10 * max(square[order].max(initial=0.0), 1e-300)]
        axes = centred.T @ left[:, order] / np.sqrt(square[order])
    else:
        square, right = symmetric_eigen(centred.T @ centred)
        axes = right[:, np.argsort(square)[::-1][:n_axes]]
    return fix_signs(axes)


def fix_signs(axes: Floats) -> Floats:
    """Flip each column so that its largest entry is positive."""
    return np.asarray(axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])]))


@dataclass(frozen=True)
class RidgePath:
    """Ridge solutions of one data set for every penalty, from one eigendecomposition.

    Parameters
    ----------
    basis
        Eigenvectors of the inputs' Gram matrix, in the space of the inputs, ``(dim, n_axes)``.
    eigenvalues
        Theirs, ``(n_axes,)``.
    projected
        Outputs projected on the basis, ``(n_axes, n_outputs)``.
    x_mean, y_mean
        Of inputs and outputs, ``(dim,)`` and ``(n_outputs,)``.
    n
        Rows.
    """

    basis: Floats
    eigenvalues: Floats
    projected: Floats
    x_mean: Floats
    y_mean: Floats
    n: int

    @classmethod
    def fit(cls, X: Floats, Y: Floats) -> Self:
        """Decompose ``(n, dim)`` inputs and ``(n, n_outputs)`` outputs; both are centred here."""
        x_mean, y_mean = X.mean(axis=0), Y.mean(axis=0)
        X, Y = X - x_mean, Y - y_mean
        # Dual form where there are fewer rows than columns: the matrix to decompose is the smaller one.
        if len(X) < X.shape[1]:
            eigenvalues, left = symmetric_eigen(X @ X.T)
            return cls(X.T @ left, eigenvalues, left.T @ Y, x_mean, y_mean, len(X))
        eigenvalues, right = symmetric_eigen(X.T @ X)
        return cls(right, eigenvalues, right.T @ (X.T @ Y), x_mean, y_mean, len(X))

    def shrunk(self, penalty: float | Floats) -> Floats:
        """Return the coefficients on the basis, ``(n_axes, n_outputs)``."""
        # eigh gives tiny negative values for a matrix without full rank.
        return np.asarray(
            self.projected / (np.maximum(self.eigenvalues, 0.0)[:, None] + np.asarray(penalty) * self.n)
        )

    def solve(self, penalty: float | Floats) -> Affine:
        """Return the solution for one penalty, or for one per output, ``(n_outputs,)``."""
        weight = self.basis @ self.shrunk(penalty)
        return Affine(weight, self.y_mean - self.x_mean @ weight)


def choose_penalty(X: Floats, Y: Floats, groups: Indices, penalties: Sequence[float] = PENALTIES) -> float:
    """Return the one of some penalties with the least squared error on groups left out in turn.

    With one group there is nothing to leave out: the middle one is returned.
    """
    return penalties[int(_held_out_error(X, Y, groups, penalties).sum(axis=1).argmin())]


def choose_penalties(X: Floats, Y: Floats, groups: Indices) -> Floats:
    """Return one penalty per output, ``(n_outputs,)``, chosen like `choose_penalty`.

    An output that the inputs do not predict gets the largest penalty, which is as good as leaving it out.
    """
    return np.asarray(np.array(PENALTIES)[_held_out_error(X, Y, groups, PENALTIES).argmin(axis=0)])


def _held_out_error(X: Floats, Y: Floats, groups: Indices, penalties: Sequence[float]) -> Floats:
    """Return squared errors on left-out groups, ``(n_penalties, n_outputs)``."""
    labels, error = np.unique(groups), np.zeros((len(penalties), Y.shape[1]))
    if len(labels) < 2:
        error[len(penalties) // 2] = -1.0  # the least of all, so argmin takes the middle one
        return error
    for label in labels:
        held_out = groups == label
        path = RidgePath.fit(X[~held_out], Y[~held_out])
        # The basis is shared by all penalties: project the inputs on it once.
        inputs = (X[held_out] - path.x_mean) @ path.basis
        for i, penalty in enumerate(penalties):
            predicted = inputs @ path.shrunk(penalty) + path.y_mean
            error[i] += ((predicted - Y[held_out]) ** 2).sum(axis=0)
    return error


def spatial_groups(sections: Sequence[TrainingSection], n_stripes: int = N_STRIPES) -> Indices:
    """Label spots by what is held out together: whole sections, or stripes of a lone section.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_spots of all sections,)``. Neighbouring spots see the same tissue, so leaving out
        single spots would favour penalties that are too small.
    """
    if len(sections) > 1:
        return np.repeat(np.arange(len(sections)), [len(s.spot_xy_um) for s in sections])
    xy_um = sections[0].spot_xy_um
    # Stripes across the longer side touch each other along the shortest borders; of equal counts, not widths.
    along = xy_um[:, int(np.ptp(xy_um, axis=0).argmax())] if len(xy_um) else np.empty(0)
    rank = np.argsort(np.argsort(along, kind="stable"), kind="stable")
    return np.asarray(rank * min(n_stripes, max(1, len(rank))) // max(1, len(rank)), dtype=np.int64)
