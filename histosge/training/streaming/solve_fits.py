"""Ridges of a cohort are solved side by side: each reads sums from disk and factorises matrices of its own.

Between passes the workers of a training have nothing to do, and a ridge is solved on one thread: without this, one core of
many would be at work for as long as reading takes some ten sections.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol, TypeVar

from histosge.models.cohort_ridges import ScaleSolution, solve_scale
from histosge.models.linear_algebra import Floats, Standardiser
from histosge.models.ridge_sums import RidgeSums
from histosge.models.scale_differences import ScaleDifferences
from histosge.models.scale_ridges import SIGMAS_UM
from histosge.threads import prefetch
from histosge.training.streaming.cohort import Cohort, Fit
from histosge.training.streaming.gather import GroupSums

MATRICES = 9
"""Matrices as large as one of sums that a solution holds: sums of all groups, of one, their difference, the same with
standardised inputs, and the factor that is made of them."""
MAX_BYTES = 2**30
"""Of all solutions at once: six of 1,536 inputs, two of 2,560."""

Item = TypeVar("Item")
Found = TypeVar("Found")


def solve_fits(
    cohort: Cohort, n_inputs: int, n_outputs: int, solve: Callable[[int, Fit], Found]
) -> list[Found]:
    """Return ``solve(number, fit)`` of every fit of a cohort, in order.

    Parameters
    ----------
    n_inputs, n_outputs
        Of its ridges, which decide how many are solved at once.
    solve
        Of several fits at a time, so it changes nothing that they share. What it returns does not depend on that.
    """
    numbered = list(enumerate(cohort.fits))
    return _side_by_side(cohort, n_inputs, n_outputs, lambda item: solve(*item), numbered)


class SolveRidge(Protocol):
    """Fits one ridge from sums, as `solve_scale` does."""

    def __call__(
        self,
        groups: Sequence[RidgeSums],
        reference: Floats,
        n_stacked: int,
        adjust: Callable[[Standardiser], Standardiser] = ...,
    ) -> ScaleSolution:
        """Fit; parameters are those of `solve_scale`."""
        ...


def solve_ridges(
    cohort: Cohort,
    fits: Sequence[Sequence[GroupSums]],
    reference: Floats,
    n_patterns: Sequence[int],
    differences: ScaleDifferences | None,
    solve: SolveRidge = solve_scale,
) -> list[list[ScaleSolution]]:
    """Fit the ridges of every fit of a cohort: one for each scale, and one for their differences.

    Parameters
    ----------
    fits
        Of each the sums, one for each ridge.
    reference
        What was subtracted from the inputs, ``(dim,)``.
    n_patterns
        Outputs of each fit that have one penalty together.
    differences
        Of the scales; None if there is no ridge on them.
    solve
        Of several ridges at a time.
    """
    n_scales, n_outputs = len(SIGMAS_UM), len(fits[0][0].columns)
    # Not fit by fit: three fits on two threads would leave one of them idle for a quarter of the time.
    scales = [
        (sums, patterns) for own, patterns in zip(fits, n_patterns, strict=True) for sums in own[:n_scales]
    ]
    flat = _side_by_side(
        cohort, len(reference), n_outputs, lambda one: solve(one[0], reference, one[1]), scales
    )
    found = [flat[start : start + n_scales] for start in range(0, len(flat), n_scales)]
    if differences is None:
        return found
    at_reference = differences.reference(reference)

    def on_differences(number: int) -> ScaleSolution:
        adjust = partial(differences.standardiser, means=[ridge.input_mean for ridge in found[number]])
        return solve(fits[number][n_scales], at_reference, n_patterns[number], adjust)

    further = _side_by_side(cohort, differences.n_inputs, n_outputs, on_differences, range(len(fits)))
    return [[*own, last] for own, last in zip(found, further, strict=True)]


def _side_by_side(
    cohort: Cohort, n_inputs: int, n_outputs: int, solve: Callable[[Item], Found], items: Sequence[Item]
) -> list[Found]:
    """Return what `solve` finds for each item, in order."""
    # Products with the outputs are held as often as sums are.
    bytes_each = 8 * n_inputs * (MATRICES * n_inputs + n_outputs * MATRICES // 2)
    threads = max(1, min(cohort.tasks.threads, MAX_BYTES // max(bytes_each, 1), len(items)))
    return list(prefetch(solve, items, threads))
