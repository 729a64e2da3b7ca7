"""The preset `dense` with a count likelihood on a cohort that does not fit into memory: the last step, in Newton steps.

`fit_dense` makes the patterns, and leaves what the fits without a section's group predict of them at its spots. A Newton
step then is one pass over counts and patterns in the work folder: no embedding is read. The heads of the final fit and of
those without each fold take their steps together. A run that is interrupted goes on from the last step that was finished.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np

from histosge.models.count_loss import (
    CountHead,
    CountSection,
    CountState,
    Part,
    Shared,
    solve,
    start_fits,
)
from histosge.models.target_sums import GeneMoments
from histosge.training.streaming.cohort import Cohort
from histosge.training.streaming.dense_fit import StreamedDense, fit_dense
from histosge.training.streaming.progress import Passes
from histosge.training.streaming.section_tasks import OnStep

STATE = "counts"
"""The file of the state after the last step."""


def fit_counts(cohort: Cohort, moments: Sequence[GeneMoments], passes: Passes, *, loss: str) -> StreamedDense:
    """Fit `dense` with a count likelihood to a surveyed cohort whose targets are written.

    Parameters
    ----------
    loss
        ``poisson`` or ``nb``.
    """
    dense, folder = fit_dense(cohort, moments, passes, keeps_out_of_fold=True), cohort.folder
    counts = _StoredCounts(cohort, passes)
    counts.write_patterns(dense)

    def save(state: CountState) -> None:
        folder.save(STATE, state.arrays())

    if folder.has(STATE):
        state = CountState.from_arrays(folder.load(STATE))
    else:
        state = start_fits(counts, [dense.model.targets.axes.shape[1]] * len(cohort.fits))
        save(state)
    fits = solve(loss, counts, state, save).fits
    heads = {fit.fold: CountHead.from_fit(own) for fit, own in zip(cohort.fits, fits, strict=True)}
    model = replace(dense.model, count_head=heads.pop(None))
    predictor = replace(
        dense.predictor, heads={fold: head for fold, head in heads.items() if fold is not None}
    )
    # Sections cannot be added to a fit by counts: its last step needs the spots of all.
    return replace(dense, model=model, predictor=predictor, sums=None)


@dataclass
class _StoredCounts:
    """Sections of a cohort with their counts, see `histosge.models.count_loss.CountPasses`."""

    cohort: Cohort
    passes: Passes
    _begun: int = field(default=0)

    def write_patterns(self, dense: StreamedDense) -> None:
        """Write out-of-fold patterns at the spots of each section, of every fit that it is part of."""
        folder = self.cohort.folder
        for index in range(len(self.cohort.sections)):
            if folder.has(self._name(index)):
                continue
            own = {
                str(number): dense.out_of_fold(fit, index)
                for number, fit in enumerate(self.cohort.fits)
                if fit.fold != self.cohort.fold[index]
            }
            folder.save(self._name(index), {"library": self.cohort.survey(index).library, **own})

    def run(
        self,
        work: Callable[[Shared, CountSection], Iterable[Part]],
        shared: Shared,
        *,
        with_counts: bool = True,
    ) -> Iterator[Iterable[Part]]:
        """Yield ``work(shared, section)`` of every section, in order; a pass with counts is shown."""
        on_step: OnStep = _ignore
        if with_counts:
            self._begun += 1
            on_step = self.passes.begin(f"counts ({self._begun}) of", is_further=True)

        def items() -> Iterator[tuple[str, CountSection]]:
            for index, section in enumerate(self.cohort.sections):
                yield section.slide_id, self._section(index, with_counts=with_counts)

        found = self.cohort.tasks.run(work, shared, items(), on_step)
        # None stands for a section that is done, and here each pass visits all.
        return cast(Iterator[Iterable[Part]], found)

    def _section(self, index: int, *, with_counts: bool) -> CountSection:
        found = self.cohort.folder.load(self._name(index))
        library = np.asarray(found.pop("library"), np.float64)
        patterns = {int(number): values for number, values in found.items()}
        return CountSection(self.cohort.target(index) if with_counts else None, library, patterns)

    def _name(self, index: int) -> str:
        return f"patterns-{self.cohort.sections[index].slide_id}"


def _ignore(slide_id: str) -> None:
    """Show nothing: a pass over patterns alone is short."""
