"""Fits of a cohort are solved side by side: each reads sums from disk and decomposes matrices of its own.

Between passes the workers of a training have nothing to do, and a fit is solved on one thread: without this, one core of
many would be at work for as long as reading takes some ten sections.
"""

from collections.abc import Callable
from typing import TypeVar

from histosge.threads import prefetch
from histosge.training.streaming.cohort import Cohort, Fit

MATRICES = 9
"""Matrices as large as one of sums that a solution holds: sums of all groups, of one, their difference, the same with
standardised inputs, and what LAPACK copies and works in."""
MAX_BYTES = 2**30
"""Of all solutions at once: six of 1,536 inputs, two of 2,560."""

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
    # Products with the outputs are held as often as sums are.
    bytes_each = 8 * n_inputs * (MATRICES * n_inputs + n_outputs * MATRICES // 2)
    threads = max(1, min(cohort.tasks.threads, MAX_BYTES // max(bytes_each, 1), len(cohort.fits)))
    return list(prefetch(lambda numbered: solve(*numbered), enumerate(cohort.fits), threads))
