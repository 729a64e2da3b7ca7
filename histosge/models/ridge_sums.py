"""Ridge regression from sums over rows: counts, sums and products, which add up over sections and need no rows.

Sums of a part are subtracted from those of the whole, so a fit without some sections costs no second pass over the
others, and the error on the sections left out follows from their sums alone.

Terms
    group    rows that are held out together when the penalty is chosen
    penalty  added to the Gram matrix, as a share of the inputs' mean squared length: it means the same for inputs of any
             number and size, and for any number of rows
"""

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, Self, overload

import numpy as np

from histosge.models.linear_algebra import Affine, Floats, Indices, Standardiser, shifted_solve
from histosge.threads import blas_threads_for

# Two a decade; with four, the public sections scored the same to 0.001. The largest gives almost the mean.
PENALTIES = tuple(float(p) for p in 10.0 ** np.arange(-2, 3.01, 0.5))
LONE_GROUP_PENALTY = 1.0
"""Taken where there is one group, so nothing to choose on: about what the public sections choose."""
_STRIP = 64
"""Columns of a triangle that are mirrored at once."""


@dataclass(frozen=True)
class RidgeSums:
    """What a ridge regression needs of its rows.

    Parameters
    ----------
    n
        Rows.
    x, y
        Sums of inputs and outputs, ``(dim,)`` and ``(n_outputs,)``.
    xx, xy, yy
        Sums of products: inputs with inputs ``(dim, dim)``, inputs with outputs ``(dim, n_outputs)``, and of each
        output with itself ``(n_outputs,)``.
    """

    n: int
    x: Floats
    y: Floats
    xx: Floats
    xy: Floats
    yy: Floats

    @classmethod
    def from_rows(cls, X: Floats, Y: Floats) -> Self:
        """Add up ``(n, dim)`` inputs and ``(n, n_outputs)`` outputs."""
        # Nearly all work of a training on many spots, and one of its few large products.
        with blas_threads_for(len(X) * X.shape[1] ** 2):
            xx = X.T @ X
        return cls(len(X), X.sum(axis=0), Y.sum(axis=0), xx, X.T @ Y, (Y**2).sum(axis=0))

    def __add__(self, other: "RidgeSums") -> "RidgeSums":
        return RidgeSums(
            self.n + other.n,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            self.yy + other.yy,
        )

    def __sub__(self, other: "RidgeSums") -> "RidgeSums":
        return RidgeSums(
            self.n - other.n,
            self.x - other.x,
            self.y - other.y,
            self.xx - other.xx,
            self.xy - other.xy,
            self.yy - other.yy,
        )

    @classmethod
    def zeros(cls, dim: int, n_outputs: int) -> Self:
        """Return the sums of no rows, to be handed to `add_rows`."""
        x, y, yy = np.zeros(dim), np.zeros(n_outputs), np.zeros(n_outputs)
        return cls(0, x, y, np.zeros((dim, dim)), np.zeros((dim, n_outputs)), yy)

    def add_rows(self, X: Floats, Y: Floats) -> Self:
        """Add ``(n, dim)`` inputs and ``(n, n_outputs)`` outputs to these arrays, in place; return the new sums."""
        return self.add_sums(RidgeSums.from_rows(X, Y))

    def add_sums(self, other: "RidgeSums") -> Self:
        """Add other sums to these arrays, in place; return the new sums."""
        # In place: a Gram matrix of 1,536 numbers has 19 MB, and there are five for each row of blocks.
        for own, added in zip(
            (self.x, self.y, self.xx, self.xy, self.yy),
            (other.x, other.y, other.xx, other.xy, other.yy),
            strict=True,
        ):
            own += added
        return replace(self, n=self.n + other.n)

    def __reduce__(self) -> tuple[Any, ...]:
        # A symmetric matrix travels between processes as its triangle: half the bytes.
        return RidgeSums.from_arrays, (self.arrays(),)

    def arrays(self) -> dict[str, Floats]:
        """Return everything as named arrays; of the Gram matrix, which is symmetric, the upper triangle row by row."""
        return {
            "n": np.array([float(self.n)]),
            "x": self.x,
            "y": self.y,
            "xx": np.concatenate([np.empty(0), *(row[i:] for i, row in enumerate(self.xx))]),
            "xy": self.xy,
            "yy": self.yy,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Floats]) -> Self:
        """Rebuild."""
        dim = len(arrays["x"])
        xx, start = np.empty((dim, dim)), 0
        for i, row in enumerate(xx):
            row[i:] = arrays["xx"][start : start + dim - i]
            start += dim - i
        # The lower triangle in strips: whole columns would touch another line of the cache with every number.
        for first in range(0, dim, _STRIP):
            strip = slice(first, first + _STRIP)
            xx[strip.stop :, strip] = xx[strip, strip.stop :].T
            corner = xx[strip, strip]
            corner[:] = np.triu(corner) + np.triu(corner, 1).T
        return cls(int(arrays["n"][0]), arrays["x"], arrays["y"], xx, arrays["xy"], arrays["yy"])

    def outputs(self, columns: Indices) -> Self:
        """Return the sums of some outputs."""
        return replace(self, y=self.y[columns], xy=self.xy[:, columns], yy=self.yy[columns])

    def mapped(self, shift: Floats, by: Floats) -> "RidgeSums":
        """Return the sums of inputs less a shift, ``(dim,)``, then scaled by ``(dim,)`` or mapped by ``(dim, n)``."""
        x = self.x - self.n * shift
        # The mean of `self.x` and `x` twice, with the shift: all that the shift changes, as one symmetric product.
        between = self.x - 0.5 * self.n * shift
        xx = np.stack([between, shift], axis=1) @ np.stack([-shift, -between])
        xx += self.xx
        xy = self.xy - np.outer(shift, self.y)
        if by.ndim == 1:
            xx *= by[:, None]
            xx *= by
            return replace(self, x=x * by, xx=xx, xy=xy * by[:, None])
        return replace(self, x=x @ by, xx=by.T @ xx @ by, xy=by.T @ xy)

    def residual(self, affine: Affine) -> "RidgeSums":
        """Return the sums with the outputs less what a map predicts from the inputs."""
        W, b = affine.weight, affine.offset
        predicted, squares = self.xx @ W, b * (2 * (self.x @ W) + self.n * b)
        return replace(
            self,
            y=self.y - self.x @ W - self.n * b,
            xy=self.xy - predicted - np.outer(self.x, b),
            yy=self.yy - 2 * ((W * self.xy).sum(axis=0) + b * self.y) + (W * predicted).sum(axis=0) + squares,
        )

    def with_input_noise(self, covariance: Floats) -> "RidgeSums":
        """Return the sums as if noise of mean 0 and a covariance, ``(dim, dim)``, were added to the inputs of each row.

        That is what training on many noisy copies of each row comes to, in the limit (Bishop, 1995).
        """
        return replace(self, xx=self.xx + self.n * covariance)

    def error_within(self, affine: Affine) -> Floats:
        """Return the squared error of a map on these rows about its own mean error, ``(n_outputs,)``.

        How far a whole section lies above or below the prediction is not in its embeddings, so it should not decide how
        much weights are shrunk: with it, penalties came out larger and the public sections scored 0.010 less.
        """
        W, b = affine.weight, affine.offset
        quadratic = (W * (self.xx @ W)).sum(axis=0)
        linear = (W * self.xy).sum(axis=0) + b * (self.y - self.x @ W)
        mean_error = (self.y - self.x @ W) / max(self.n, 1) - b
        return np.asarray(self.yy - 2 * linear + quadratic + self.n * (b**2 - mean_error**2))


class LazySums(Sequence[RidgeSums]):
    """Sums of groups, each made whenever it is looked at: those of all groups would not fit into memory together."""

    @abstractmethod
    def make(self, index: int) -> RidgeSums:
        """Return the sums of one group, by its place."""

    @overload
    def __getitem__(self, index: int) -> RidgeSums: ...

    @overload
    def __getitem__(self, index: slice) -> list[RidgeSums]: ...

    def __getitem__(self, index: int | slice) -> RidgeSums | list[RidgeSums]:
        if isinstance(index, slice):
            return [self.make(i) for i in range(*index.indices(len(self)))]
        return self.make(index)

    def __iter__(self) -> Iterator[RidgeSums]:
        return (self.make(i) for i in range(len(self)))


def standardiser_from_sums(sums: RidgeSums, reference: Floats) -> Standardiser:
    """Return what `Standardiser.fit` gives for the rows, from their sums about a reference, ``(dim,)``."""
    shift = sums.x / sums.n
    mean, variance = reference + shift, np.diag(sums.xx) / sums.n - shift**2
    sd = np.sqrt(np.maximum(variance, 0.0))
    return Standardiser(mean, np.where(sd > 1e-6 * np.maximum(np.abs(mean), 1e-6), sd, np.inf))


@dataclass(frozen=True)
class RidgeSolver:
    """Solutions for every penalty.

    Parameters
    ----------
    gram, products
        Of the centred inputs: with themselves, ``(dim, dim)``, and with the outputs, ``(dim, n_outputs)``.
    x_mean, y_mean
        ``(dim,)`` and ``(n_outputs,)``.
    mean_length
        Mean squared length of the centred inputs.
    """

    gram: Floats
    products: Floats
    x_mean: Floats
    y_mean: Floats
    mean_length: float

    @classmethod
    def from_sums(cls, sums: RidgeSums) -> Self:
        """Centre the sums; without any row, all solutions are 0."""
        n = max(sums.n, 1)
        x_mean, y_mean = sums.x / n, sums.y / n
        gram = np.outer(sums.x, -x_mean)
        gram += sums.xx
        products = sums.xy - np.outer(sums.x, y_mean)
        # Of constant inputs rounding leaves a tiny length, by which nothing may be divided.
        length = max(float(np.trace(gram)), 1e-9 * float(np.trace(sums.xx)), 1e-300) / n
        return cls(gram, products, x_mean, y_mean, length)

    def solve(self, penalty: float | Floats) -> Affine:
        """Return the solution for one penalty, or for one per output, ``(n_outputs,)``."""
        return self.path([penalty])[0]

    def path(self, penalties: Sequence[float | Floats]) -> list[Affine]:
        """Return one solution for each of some penalties, or for one per output each; see `solve`."""
        wanted = np.array([np.broadcast_to(penalty, self.y_mean.shape) for penalty in penalties], np.float64)
        weights = [np.empty_like(self.products) for _ in penalties]
        # One factor for each penalty, whichever outputs have it in whichever solution.
        for penalty in np.unique(wanted).tolist():
            has_it = wanted == penalty
            columns = np.flatnonzero(has_it.any(axis=0))
            found = shifted_solve(self.gram, penalty * self.mean_length, self.products[:, columns])
            for weight, own in zip(weights, has_it, strict=True):
                weight[:, own] = found[:, own[columns]]
        return [Affine(weight, self.y_mean - self.x_mean @ weight) for weight in weights]


@dataclass(frozen=True)
class ChosenRidges:
    """Penalties chosen on groups left out in turn, and the fits without each group.

    Parameters
    ----------
    penalties
        One per output, ``(n_outputs,)``.
    without
        Per group, the fit to the others with these penalties; empty where there is one group.
    """

    penalties: Floats
    without: list[Affine]


def choose_penalties(
    groups: Sequence[RidgeSums],
    shared: Sequence[slice],
    penalties: Sequence[float] = PENALTIES,
    whole: RidgeSums | None = None,
) -> ChosenRidges:
    """Choose the penalties with the least error within groups left out in turn.

    Parameters
    ----------
    groups
        Sums of each.
    shared
        Outputs that have one penalty together. One for each output is noisier: on stripes of a lone section it lost
        0.016.
    penalties
        To choose from.
    whole
        Sums of all groups, where they are added up already.
    """
    whole = total(groups) if whole is None else whole
    n_outputs = len(whole.y)
    if len(groups) < 2:
        return ChosenRidges(np.full(n_outputs, LONE_GROUP_PENALTY), [])
    error = np.zeros((len(penalties), n_outputs))
    paths = list[list[Affine]]()
    for held_out in groups:
        paths.append(RidgeSolver.from_sums(whole - held_out).path(penalties))
        error += [held_out.error_within(solution) for solution in paths[-1]]
    best = np.empty(n_outputs, np.int64)
    for part in shared:
        best[part] = error[:, part].sum(axis=1).argmin()
    return ChosenRidges(np.array(penalties)[best], [_pick(path, best) for path in paths])


def leave_out(groups: Sequence[RidgeSums], penalties: Floats) -> ChosenRidges:
    """Fit without each group with given penalties, one for each output, ``(n_outputs,)``."""
    if len(groups) < 2:
        return ChosenRidges(penalties, [])
    whole = total(groups)
    return ChosenRidges(
        penalties, [RidgeSolver.from_sums(whole - held_out).solve(penalties) for held_out in groups]
    )


def _pick(path: Sequence[Affine], best: Indices) -> Affine:
    """Return the map whose output ``i`` is that of ``path[best[i]]``."""
    weights = [path[k].weight[:, i] for i, k in enumerate(best)]
    return Affine(np.stack(weights, axis=1), np.array([path[k].offset[i] for i, k in enumerate(best)]))


def total(sums: Iterable[RidgeSums]) -> RidgeSums:
    """Add up at least one."""
    # One after another: groups may lie on disk, and be read as they are iterated over.
    return reduce(add, sums)
