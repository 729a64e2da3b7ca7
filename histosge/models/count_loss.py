"""A count likelihood as the last step of `dense`: patterns -> rates, with library size as an offset.

    counts ~ Poisson or negative binomial,  mean = library / 10,000 * exp(b + V z + section's own level)

z are out-of-fold predictions of the patterns, so V is not fitted to the noise that a ridge fits at its own training
spots. Each gene is a generalised linear model of its own, solved by Newton steps for all genes at once. Rates are
positive.

A step needs sums over spots alone: of each gene a gradient and a Hessian of (patterns + 1) numbers a side. They add up over
sections, so that sections are visited one after another, in memory (`CountsInMemory`) or on disk. Several fits to some of
the sections each (those that hold out a fold) are solved side by side: a section's counts are read once a step for all.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.genes import SCALE
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.empirical_bayes import dispersion_from_sums, dispersion_sums
from histosge.models.linear_algebra import Floats, Indices
from histosge.models.nested_state import take
from histosge.models.protocol import State

LOSSES = ("mse", "poisson", "nb")
MAX_STEPS = 25
SLOPE_PENALTY = 1.0
"""Ridge penalty of the slopes: that of one count's worth of information."""
# Limits of the linear predictor: exp(12) is 16 times the scale of 10,000, so no rate of a gene is cut off.
_MAX_LOG_RATE = 12.0
# Added to rates before their logarithm: a gene may have no count in a section.
_MIN_RATE = 0.01
# Largest change of a linear predictor after which a gene is done: steps converge quadratically, so its error is 1e-12.
_CONVERGED = 1e-6
# Genes solved together: each needs a row of (spots) and a small matrix of its own.
_GENES_AT_ONCE = 512
# Spots times genes worked on together: 16 MB an array, of which there are five; a section of bins has 100,000 spots.
_VALUES_AT_ONCE = 2 << 20

Shared = TypeVar("Shared")
Part = TypeVar("Part")


@dataclass(frozen=True)
class CountHead:
    """log1p(CP10k) = log1p(exp(offset + patterns @ weight)).

    Parameters
    ----------
    weight, offset
        ``(n_patterns, n_genes)`` and ``(n_genes,)``.
    """

    weight: Floats
    offset: Floats

    @classmethod
    def fit(cls, loss: str, sections: Sequence[TrainingSection], patterns: Sequence[Floats]) -> Self:
        """Fit to the sections' counts.

        Parameters
        ----------
        loss
            ``poisson`` or ``nb``.
        patterns
            Per section, out-of-fold predictions, ``(n_spots, n_patterns)``.

        Raises
        ------
        ModelError
            If the sections come without total counts.
        """
        counted = [
            CountSection(s.target, s.library, {0: own})
            for s, own in zip(sections, patterns, strict=True)
            if s.library is not None
        ]
        if len(counted) < len(sections):
            raise ModelError(
                f"--loss {loss} needs each spot's total counts, which {len(sections) - len(counted)} of "
                f"{len(sections)} sections lack; give raw counts, or train with --loss mse"
            )
        passes = CountsInMemory(counted)
        return cls.from_fit(solve(loss, passes, start_fits(passes, [patterns[0].shape[1]])).fits[0])

    @classmethod
    def from_fit(cls, fit: "CountFit") -> Self:
        """Return the head of a fit that is solved."""
        return cls(fit.beta[1:], fit.beta[0])

    def __call__(self, patterns: Floats) -> NDArray[np.float32]:
        """Return log1p(CP10k), ``(n, n_genes)``."""
        logs = patterns.astype(np.float32) @ self.weight.astype(np.float32)
        logs += self.offset.astype(np.float32)
        return np.asarray(
            np.logaddexp(np.float32(0), np.clip(logs, -_MAX_LOG_RATE, _MAX_LOG_RATE)), dtype=np.float32
        )

    def take(self, genes: slice) -> "CountHead":
        """Return the head of some genes."""
        return CountHead(self.weight[:, genes], self.offset[genes])

    def state(self) -> State:
        """Return the arrays."""
        return {"counts.weight": self.weight, "counts.offset": self.offset}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        offset = take(state, "counts.offset", None)
        return cls(take(state, "counts.weight", None, len(offset)), offset)


@dataclass(frozen=True)
class CountSection:
    """Counts of one section, and its patterns as the fits that it is part of have them.

    Parameters
    ----------
    target
        log1p(CP10k), ``(n_spots, n_genes)``, an array or sparse; None where a pass needs no counts.
    library
        Total counts of each spot, ``(n_spots,)``.
    patterns
        By the number of the fit, out-of-fold predictions, ``(n_spots, n_patterns)``.
    """

    target: NDArray[np.float32] | sparse.csr_matrix | None
    library: Floats
    patterns: Mapping[int, Floats]

    @property
    def exposure(self) -> Floats:
        """Return total counts / 10,000, ``(n_spots,)``."""
        return self.library / SCALE

    def counts(self, genes: Indices) -> Floats:
        """Return the counts of some genes, ``(n_spots, n)``."""
        assert self.target is not None
        part = self.target[:, genes]
        values = part.toarray() if sparse.issparse(part) else part
        return np.asarray(np.rint(np.expm1(values.astype(np.float64)) * self.exposure[:, None]))

    def design(self, fit: int) -> Floats:
        """Return the intercept and the patterns of a fit, ``(n_spots, n_patterns + 1)``."""
        own = self.patterns[fit]
        return np.hstack([np.ones((len(own), 1)), own])

    def slices(self, genes: Indices) -> Iterator[Indices]:
        """Yield genes a few at a time, so that no dense copy of all counts is made."""
        size = int(np.clip(_VALUES_AT_ONCE // max(len(self.library), 1), 8, _GENES_AT_ONCE))
        yield from (genes[start : start + size] for start in range(0, len(genes), size))


@dataclass(frozen=True)
class CountFit:
    """Where the fit of all genes to some of the sections is.

    Parameters
    ----------
    beta
        Coefficients, the intercept first, ``(n_patterns + 1, n_genes)``.
    pooled
        Logs of the rates over the fit's sections, ``(n_genes,)``.
    overdispersion
        ``(n_genes,)``; 0 for Poisson.
    is_moving
        Genes that have not converged, ``(n_genes,)``.
    """

    beta: Floats
    pooled: Floats
    overdispersion: Floats
    is_moving: NDArray[np.bool_]

    @property
    def moving(self) -> Indices:
        """Return the columns of the genes that have not converged."""
        return np.flatnonzero(self.is_moving)


@dataclass(frozen=True)
class CountState:
    """Where all fits are; what a training that was interrupted goes on from.

    Parameters
    ----------
    fits
        By number.
    steps
        Newton steps with these dispersions.
    has_dispersion
        Whether dispersions are estimated.
    """

    fits: tuple[CountFit, ...]
    steps: int = 0
    has_dispersion: bool = False

    @property
    def is_moving(self) -> bool:
        """Whether a further step is due."""
        return self.steps < MAX_STEPS and any(fit.is_moving.any() for fit in self.fits)

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return everything as named arrays."""
        found: dict[str, NDArray[Any]] = {"state": np.array([self.steps, self.has_dispersion], np.int64)}
        for number, fit in enumerate(self.fits):
            found |= {f"{number}.{name}": getattr(fit, name) for name in _FIT_ARRAYS}
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Self:
        """Rebuild."""
        steps, has_dispersion = arrays["state"].tolist()
        n_fits = (len(arrays) - 1) // len(_FIT_ARRAYS)
        fits = (CountFit(*(arrays[f"{i}.{name}"] for name in _FIT_ARRAYS)) for i in range(n_fits))
        return cls(tuple(fits), steps, bool(has_dispersion))


_FIT_ARRAYS = ("beta", "pooled", "overdispersion", "is_moving")


class CountPasses(Protocol):
    """Visits sections, once for each call."""

    def run(
        self,
        work: Callable[[Shared, CountSection], Iterable[Part]],
        shared: Shared,
        *,
        with_counts: bool = True,
    ) -> Iterator[Iterable[Part]]:
        """Yield ``work(shared, section)`` of every section, in order.

        Parameters
        ----------
        work
            Of a module, so that it pickles.
        with_counts
            Whether it needs counts; patterns it has in any case.
        """
        ...


@dataclass(frozen=True)
class CountsInMemory:
    """Sections in memory, see `CountPasses`."""

    sections: Sequence[CountSection]

    def run(
        self,
        work: Callable[[Shared, CountSection], Iterable[Part]],
        shared: Shared,
        *,
        with_counts: bool = True,
    ) -> Iterator[Iterable[Part]]:
        """Yield what `CountPasses.run` does."""
        return (work(shared, section) for section in self.sections)


def start_fits(passes: CountPasses, n_patterns: Sequence[int]) -> CountState:
    """Return the state before the first step: the mean rate of each gene and slopes of 0.

    That is the solution of a gene that follows no pattern.

    Parameters
    ----------
    n_patterns
        Of each fit.
    """
    counts, exposure = list[Any]([0.0] * len(n_patterns)), [0.0] * len(n_patterns)
    for found in passes.run(_totals, None):
        for number, own, of_spots in found:
            counts[number] = counts[number] + own
            exposure[number] += of_spots
    fits = []
    for n, own, of_spots in zip(n_patterns, counts, exposure, strict=True):
        pooled = np.log(own / of_spots + _MIN_RATE)
        beta = np.zeros((n + 1, len(pooled)))
        beta[0] = pooled
        fits.append(CountFit(beta, pooled, np.zeros(len(pooled)), np.ones(len(pooled), bool)))
    return CountState(tuple(fits))


def _totals(_: None, section: CountSection) -> list[tuple[int, Floats, float]]:
    """Return for each fit that a section is part of its counts of each gene, ``(n_genes,)``, and its exposure."""
    assert section.target is not None
    every = np.arange(section.target.shape[1])
    counts = np.concatenate([section.counts(genes).sum(axis=0) for genes in section.slices(every)])
    return [(number, counts, float(section.exposure.sum())) for number in section.patterns]


def solve(
    loss: str,
    passes: CountPasses,
    state: CountState,
    on_state: Callable[[CountState], None] = lambda state: None,
) -> CountState:
    """Maximise the penalised likelihood of each gene.

    Parameters
    ----------
    loss
        ``poisson`` or ``nb``.
    state
        From `start_fits`, or from an earlier run.
    on_state
        Called with the state after each pass.
    """
    while True:
        while state.is_moving:
            state = _step(passes, state)
            on_state(state)
        if loss != "nb" or state.has_dispersion:
            return state
        # Moments around the Poisson fit; then one more fit with these dispersions, from there.
        state = _with_dispersion(passes, state)
        on_state(state)


@dataclass(frozen=True)
class _Genes:
    """Sums of some genes of one fit over the spots of a section, each with genes along its last axis."""

    fit: int
    genes: Indices
    sums: tuple[Floats, ...]


def _step(passes: CountPasses, state: CountState) -> CountState:
    """Move the coefficients of all genes that have not converged by one Newton step."""
    totals = _add_up(passes.run(_newton_sums, state.fits), state.fits)
    steps = [_newton_step(fit, *sums) for fit, sums in zip(state.fits, totals, strict=True)]
    # Newton overshoots where counts are few: no linear predictor changes by more than 1 in a step.
    changes = [np.zeros(step.shape[1]) for step in steps]
    for found in passes.run(_largest_changes, steps, with_counts=False):
        for number, largest in found:
            np.maximum(changes[number], largest, out=changes[number])
    fits = []
    for fit, step, change in zip(state.fits, steps, changes, strict=True):
        beta, is_moving = fit.beta.copy(), fit.is_moving.copy()
        beta[:, fit.moving] += step / np.maximum(change, 1.0)
        is_moving[fit.moving] = change >= _CONVERGED
        fits.append(replace(fit, beta=beta, is_moving=is_moving))
    return replace(state, fits=tuple(fits), steps=state.steps + 1)


def _add_up(found: Iterator[Iterable[_Genes]], fits: Sequence[CountFit]) -> list[tuple[Floats, ...]]:
    """Add up sums over sections; each has one column for each gene of a fit that has not converged."""
    totals = list[tuple[Floats, ...]]([()] * len(fits))
    places = [np.cumsum(fit.is_moving) - 1 for fit in fits]
    for parts in found:
        for part in parts:
            n = int(fits[part.fit].is_moving.sum())
            if not totals[part.fit]:
                totals[part.fit] = tuple(np.zeros((*sums.shape[:-1], n)) for sums in part.sums)
            for total, sums in zip(totals[part.fit], part.sums, strict=True):
                total[..., places[part.fit][part.genes]] += sums
    return totals


def _newton_step(fit: CountFit, *sums: Floats) -> Floats:
    """Return the Newton step of the genes that have not converged, ``(n_patterns + 1, n)``.

    Parameters
    ----------
    sums
        Of `_newton_sums`; none where all genes have converged.
    """
    k, genes = len(fit.beta), fit.moving
    if len(genes) == 0:
        return np.zeros((k, 0))
    gradient, triangle = sums
    penalty = np.full(k, SLOPE_PENALTY)
    penalty[0] = 1e-6  # the intercept is free
    hessian = np.empty((len(genes), k, k))
    rows, columns = np.triu_indices(k)
    hessian[:, rows, columns] = triangle.T
    hessian[:, columns, rows] = triangle.T
    hessian += np.diag(penalty + 1e-6)
    gradient = gradient - penalty[:, None] * fit.beta[:, genes]
    return np.asarray(np.linalg.solve(hessian, gradient.T[:, :, None])[:, :, 0].T)


def _expected(section: CountSection, fit: CountFit, genes: Indices, Z: Floats, rates: Floats) -> Floats:
    """Return the expected rates of some genes, ``(n_spots, n)``, from the section's own, ``(n,)``."""
    # A section's level of a gene is an offset: fitted as a slope it would pass for a pattern.
    level = np.log(rates + _MIN_RATE) - fit.pooled[genes]
    return np.asarray(np.exp(np.clip(Z @ fit.beta[:, genes] + level, -_MAX_LOG_RATE, _MAX_LOG_RATE)))


def _newton_sums(fits: Sequence[CountFit], section: CountSection) -> Iterator[_Genes]:
    """Yield gradients, ``(n_patterns + 1, n)``, and upper triangles of Hessians of a section, some genes at a time."""
    exposure, designs = section.exposure, {number: section.design(number) for number in section.patterns}
    pairs = {number: _pairs(Z) for number, Z in designs.items()}
    for genes, counts in _some_genes(fits, section):
        rates = counts.sum(axis=0) / exposure.sum()
        for number, Z in designs.items():
            fit = fits[number]
            is_own = fit.is_moving[genes]
            if not is_own.any():
                continue
            own = counts if is_own.all() else counts[:, is_own]
            mean = exposure[:, None] * _expected(section, fit, genes[is_own], Z, rates[is_own])
            weight = 1 / (1 + fit.overdispersion[genes[is_own]] * mean)
            gradient = Z.T @ ((own - mean) * weight)
            yield _Genes(number, genes[is_own], (gradient, pairs[number].T @ (mean * weight)))


def _pairs(Z: Floats) -> Floats:
    """Return the products of the columns with each other, the upper triangle row by row, ``(n_spots, k (k + 1) / 2)``."""
    rows, columns = np.triu_indices(Z.shape[1])
    return Z[:, rows] * Z[:, columns]


def _some_genes(fits: Sequence[CountFit], section: CountSection) -> Iterator[tuple[Indices, Floats]]:
    """Yield genes that any of a section's fits still moves, some at a time, with their counts."""
    moving = np.any([fits[number].is_moving for number in section.patterns], axis=0)
    for genes in section.slices(np.flatnonzero(moving)):
        yield genes, section.counts(genes)


def _largest_changes(steps: Sequence[Floats], section: CountSection) -> list[tuple[int, Floats]]:
    """Return for each of a section's fits the largest change of each gene's linear predictor, ``(n,)``."""
    found = []
    for number in section.patterns:
        Z, step = section.design(number), steps[number]
        parts = [np.abs(Z @ step[:, some]).max(axis=0) for some in section.slices(np.arange(step.shape[1]))]
        found.append((number, np.concatenate([np.zeros(0), *parts])))
    return found


def _with_dispersion(passes: CountPasses, state: CountState) -> CountState:
    """Estimate each gene's dispersion around its Poisson fit; all genes move again."""
    fits = [replace(fit, is_moving=np.ones(len(fit.pooled), bool)) for fit in state.fits]
    totals = _add_up(passes.run(_dispersion_sums, fits), fits)
    fits = [
        replace(fit, overdispersion=dispersion_from_sums(*sums))
        for fit, sums in zip(fits, totals, strict=True)
    ]
    return CountState(tuple(fits), 0, True)


def _dispersion_sums(fits: Sequence[CountFit], section: CountSection) -> Iterator[_Genes]:
    exposure = section.exposure
    for genes, counts in _some_genes(fits, section):
        rates = counts.sum(axis=0) / exposure.sum()
        for number in section.patterns:
            rate = _expected(section, fits[number], genes, section.design(number), rates)
            yield _Genes(number, genes, dispersion_sums(counts, exposure, rate))
