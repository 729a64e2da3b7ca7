"""`dense` and `ridge` from sums: what the fits of `scale_ridges` and `presets.ridge` come to without the spots' rows.

Sums of groups of sections lie on disk and are read one after another. They are of inputs about a reference that is near
their mean, so that differences of large sums lose nothing.

Terms
    group   sections that are left out together when penalties and weights are chosen
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from histosge.models.linear_algebra import PENALTIES as RIDGE_PENALTIES
from histosge.models.linear_algebra import (
    Affine,
    Floats,
    RidgePath,
    Standardiser,
    fix_signs,
    symmetric_eigen,
)
from histosge.models.presets.ridge import MAX_DIM, RidgeModel
from histosge.models.ridge_sums import (
    LazySums,
    RidgeSolver,
    RidgeSums,
    choose_penalties,
    standardiser_from_sums,
    total,
)
from histosge.models.scale_ridges import stack


@dataclass(frozen=True)
class Standardised(LazySums):
    """Sums of groups with standardised inputs, made as they are read."""

    groups: Sequence[RidgeSums]
    shift: Floats
    by: Floats

    def __len__(self) -> int:
        return len(self.groups)

    def make(self, index: int) -> RidgeSums:
        """Return the sums of one group, by its place."""
        return self.groups[index].mapped(self.shift, self.by)


@dataclass(frozen=True)
class ScaleSolution:
    """The ridge of one scale or of the differences of scales, and those without each group.

    Parameters
    ----------
    ridge
        From pooled embeddings, or their differences, to all outputs.
    without
        Per group, to the stacked outputs; empty where there is one group.
    penalties
        Of the stacked outputs and of each further one.
    input_mean
        ``(dim,)``.
    """

    ridge: Affine
    without: list[Affine]
    penalties: tuple[float, ...]
    input_mean: Floats


def solve_scale(
    groups: Sequence[RidgeSums],
    reference: Floats,
    n_stacked: int,
    adjust: Callable[[Standardiser], Standardiser] = lambda found: found,
) -> ScaleSolution:
    """Fit the ridge of one scale as `fit_scale_ridges` does.

    Parameters
    ----------
    groups
        Sums of each, of pooled embeddings less the reference; read anew whenever they are iterated over.
    n_stacked
        The first outputs, which have one penalty together; each further one has its own.
    adjust
        From mean and standard deviation of the inputs to how they are standardised.
    """
    whole = total(groups)
    standardiser = adjust(standardiser_from_sums(whole, reference))
    shift, by = standardiser.mean - reference, 1 / standardiser.scale
    shared = [slice(0, n_stacked), *(slice(i, i + 1) for i in range(n_stacked, len(whole.y)))]
    whole = whole.mapped(shift, by)
    chosen = choose_penalties(Standardised(groups, shift, by), shared, whole=whole)
    ridge = RidgeSolver.from_sums(whole).solve(chosen.penalties)
    stacked = [Affine(fit.weight[:, :n_stacked], fit.offset[:n_stacked]) for fit in chosen.without]
    return ScaleSolution(
        ridge.after(standardiser),
        [fit.after(standardiser) for fit in stacked],
        tuple(float(chosen.penalties[part.start]) for part in shared),
        standardiser.mean,
    )


@dataclass
class StackingSums:
    """Products of the ridges' held-out predictions with each other and with the outputs, per group.

    Parameters
    ----------
    n
        Spots of each group.
    predicted, outputs
        Sums over spots, ``(n_groups, n_ridges, n_outputs)`` and ``(n_groups, n_outputs)``.
    products, with_outputs
        Sums over spots and outputs, ``(n_groups, n_ridges, n_ridges)`` and ``(n_groups, n_ridges)``.
    square
        Of all outputs of all spots.
    """

    n: Floats
    predicted: Floats
    outputs: Floats
    products: Floats
    with_outputs: Floats
    square: float = field(default=0.0)

    @classmethod
    def zeros(cls, n_groups: int, n_outputs: int, n_ridges: int) -> Self:
        """Return the sums of no spots."""
        return cls(
            np.zeros(n_groups),
            np.zeros((n_groups, n_ridges, n_outputs)),
            np.zeros((n_groups, n_outputs)),
            np.zeros((n_groups, n_ridges, n_ridges)),
            np.zeros((n_groups, n_ridges)),
        )

    def add(self, group: int, predicted: Floats, outputs: Floats) -> None:
        """Add spots of a group: held-out predictions, ``(n_ridges, n, n_outputs)``, and outputs, ``(n, n_outputs)``."""
        self.n[group] += len(outputs)
        self.predicted[group] += predicted.sum(axis=1)
        self.outputs[group] += outputs.sum(axis=0)
        flat = predicted.reshape(len(predicted), -1)
        self.products[group] += flat @ flat.T
        self.with_outputs[group] += flat @ outputs.ravel()
        self.square += float((outputs**2).sum())

    def arrays(self) -> dict[str, Floats]:
        """Return the sums as named arrays."""
        names = ("n", "predicted", "outputs", "products", "with_outputs")
        return {**{name: getattr(self, name) for name in names}, "square": np.array(self.square)}

    def add_sums(self, group: int, arrays: Mapping[str, Floats]) -> None:
        """Add the arrays of sums of one group, to the sums of a group."""
        for name in ("n", "predicted", "outputs", "products", "with_outputs"):
            getattr(self, name)[group] += arrays[name][0]
        self.square += float(arrays["square"])

    def weights(self) -> Floats:
        """Return one weight per ridge, as `fit_scale_ridges` chooses them."""
        n_ridges = self.products.shape[1]
        if len(self.n) < 2 or self.square == 0:
            return np.full(n_ridges, 1 / n_ridges)
        n = np.maximum(self.n, 1)
        means = np.einsum("gao,gbo->gab", self.predicted, self.predicted) / n[:, None, None]
        products = (self.products - means).sum(axis=0)
        with_outputs = self.with_outputs - np.einsum("gao,go->ga", self.predicted, self.outputs) / n[:, None]
        # A triangle with these products stands for the rows of all spots. Where two ridges predict the same, the last
        # eigenvalue is rounding.
        values, vectors = symmetric_eigen(products)
        roots = np.sqrt(np.maximum(values, 1e-14 * max(values[-1], 1e-300)))
        rows = roots[:, None] * vectors.T
        return stack(rows, vectors.T @ with_outputs.sum(axis=0) / roots, float(np.sqrt(self.square)))


def ridge_from_sums(
    groups: Sequence[RidgeSums], reference: Floats, penalties: Sequence[float] = RIDGE_PENALTIES
) -> RidgeModel:
    """Fit the preset `ridge` from sums of spots' embeddings, less the reference, with log1p(CP10k) of all genes.

    Parameters
    ----------
    groups
        Sums of what is left out together.
    penalties
        To choose from.
    """
    whole = total(groups)
    standardiser = standardiser_from_sums(whole, reference)
    shift, by = standardiser.mean - reference, 1 / standardiser.scale
    axes = None
    if len(reference) > MAX_DIM:
        values, vectors = symmetric_eigen(whole.mapped(shift, by).xx)
        axes = fix_signs(vectors[:, np.argsort(values)[::-1][:MAX_DIM]])
    by = by if axes is None else by[:, None] * axes
    # Components are few: the sums of all groups fit into memory.
    parts = [group.mapped(shift, by) for group in groups]
    whole = total(parts)
    error = np.zeros(len(penalties))
    if len(parts) < 2:
        error[len(error) // 2] = -1.0
    else:
        for part in parts:
            path = ridge_path(whole - part)
            error += [squared_error(part, path.solve(penalty)) for penalty in penalties]
    penalty = penalties[int(error.argmin())]
    affine = ridge_path(whole).solve(penalty)
    if axes is not None:
        affine = Affine(axes @ affine.weight, affine.offset)
    return RidgeModel(affine.after(standardiser), penalty, 0 if axes is None else axes.shape[1])


def ridge_path(sums: RidgeSums) -> RidgePath:
    """Return the solutions for every penalty from sums."""
    x_mean, y_mean = sums.x / sums.n, sums.y / sums.n
    values, vectors = symmetric_eigen(sums.xx - sums.n * np.outer(x_mean, x_mean))
    projected = vectors.T @ (sums.xy - sums.n * np.outer(x_mean, y_mean))
    return RidgePath(vectors, values, projected, x_mean, y_mean, sums.n)


def squared_error(sums: RidgeSums, affine: Affine) -> float:
    """Return the squared error of a map on the rows of sums, over all outputs."""
    W, b = affine.weight, affine.offset
    quadratic = (W * (sums.xx @ W)).sum()
    linear = (W * sums.xy).sum() + b @ (sums.y - sums.x @ W)
    return float(sums.yy.sum() - 2 * linear + quadratic + sums.n * (b @ b))
