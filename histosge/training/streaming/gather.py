"""Pass 2 of a streamed training: Gram matrices of what is pooled around spots, per scale and cell of sections.

After those of the scales come those of the differences of scales, where a model has a ridge on them.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from histosge.data.block_bands import pool_spots_by_band
from histosge.models.linear_algebra import Floats, Indices
from histosge.models.ridge_sums import LazySums, RidgeSums
from histosge.models.scale_differences import ScaleDifferences
from histosge.training.kept_sums import KeptSums
from histosge.training.streaming.cohort import Cell, Cohort, Fit, SectionInput, SectionSource
from histosge.training.streaming.section_tasks import OnStep
from histosge.training.streaming.work_folder import WorkFolder

SECONDS_BETWEEN_SAVES = 20.0
"""A cell of 1,536 numbers at five scales takes 50 MB: written after each section it would double the time of small ones."""


class SpotOutputs(Protocol):
    """What a model's ridges are fitted to; it pickles."""

    @property
    def n_outputs(self) -> int:
        """Return how many outputs a spot has."""
        ...

    def of_section(self, section: SectionInput) -> Callable[[Indices], Floats]:
        """Return what gives the outputs of some spots of a section, ``(n, n_outputs)``."""
        ...


@dataclass(frozen=True)
class _Gathering:
    """What is added up of every section; see `gather_sums`."""

    source: SectionSource
    sigmas_um: tuple[float, ...]
    outputs: SpotOutputs
    reference: Floats
    differences: ScaleDifferences | None


def _section_sums(how: _Gathering, section: SectionInput) -> list[RidgeSums]:
    """Return the sums of one section at each scale, and those of the differences."""
    dims = [len(how.reference) for _ in how.sigmas_um]
    if how.differences is not None:
        dims.append(how.differences.n_inputs)
    sums = [RidgeSums.zeros(dim, how.outputs.n_outputs) for dim in dims]
    outputs = how.outputs.of_section(section)
    slide, inputs = how.source.open(section.slide_id), np.empty((0, dims[-1]))
    for pooled in pool_spots_by_band(slide, section.under, how.sigmas_um):
        values, scale = pooled.values, pooled.scale
        values -= how.reference
        sums[scale] = sums[scale].add_rows(values, outputs(pooled.spots))
        if how.differences is None:
            continue
        # The scales of a band come one after another with the same spots: no more than a band of them is held.
        if scale == 0:
            inputs = np.empty((len(values), how.differences.n_inputs))
        how.differences.add_scale(inputs, scale, values)
        if scale == len(how.sigmas_um) - 1:
            sums[-1] = sums[-1].add_rows(inputs, outputs(pooled.spots))
    return sums


def gather_sums(
    cohort: Cohort,
    sigmas_um: Sequence[float],
    outputs: SpotOutputs,
    reference: Floats,
    on_step: OnStep,
    differences: ScaleDifferences | None = None,
) -> None:
    """Add up the sums of every cell in the work folder; what is there already is not read again.

    Each section is added up by itself, and to the cell in the order of sections: one order, whoever adds up.

    Parameters
    ----------
    sigmas_um
        Of the Gaussians.
    outputs
        Of the spots.
    reference
        Subtracted from all inputs, ``(dim,)``.
    differences
        Of the scales, whose sums are wanted, too.
    """

    def items() -> Iterator[tuple[str, SectionInput | None]]:
        for cell in cohort.cells:
            done = _sections_done(cohort.folder, cell)
            for index in cell.sections.tolist():
                yield cohort.sections[index].slide_id, None if index in done else cohort.input(index)

    how = _Gathering(cohort.source, tuple(sigmas_um), outputs, reference, differences)
    n_ridges = len(sigmas_um) + (differences is not None)
    found = cohort.tasks.run(_section_sums, how, items(), on_step)
    for cell in cohort.cells:
        _gather_cell(cohort, cell, n_ridges, found)
    # To its end, where it lets go of what it holds.
    assert next(found, None) is None


def _gather_cell(cohort: Cohort, cell: Cell, n_ridges: int, found: Iterator[list[RidgeSums] | None]) -> None:
    done, sums, saved = _sections_done(cohort.folder, cell), None, time.monotonic()
    if 0 < len(done) < len(cell.sections):
        sums = [load_sums(cohort.folder, cell, scale) for scale in range(n_ridges)]
    for index in cell.sections.tolist():
        added = next(found)
        if added is None:
            continue
        sums = added if sums is None else [a.add_sums(b) for a, b in zip(sums, added, strict=True)]
        done.add(index)
        if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or len(done) == len(cell.sections):
            _save_cell(cohort.folder, cell, sums, done)
            saved = time.monotonic()


def _sections_done(folder: WorkFolder, cell: Cell) -> set[int]:
    return set(folder.load_one(cell.name, "sections").tolist()) if folder.has(cell.name) else set()


def _save_cell(folder: WorkFolder, cell: Cell, sums: Sequence[RidgeSums], done: set[int]) -> None:
    arrays = {f"{scale}.{name}": a for scale, part in enumerate(sums) for name, a in part.arrays().items()}
    folder.save(cell.name, {**arrays, "sections": np.array(sorted(done), np.int64)})


def load_sums(folder: WorkFolder, cell: Cell, scale: int) -> RidgeSums:
    """Read the sums of one cell at one scale."""
    names = ("n", "x", "y", "xx", "xy", "yy")
    return RidgeSums.from_arrays({name: folder.load_one(cell.name, f"{scale}.{name}") for name in names})


@dataclass(frozen=True)
class GroupSums(LazySums):
    """Sums of the groups of a fit at one scale, read from disk whenever one is looked at.

    Parameters
    ----------
    cohort
        Whose work folder they are in.
    fit
        Which sections count.
    scale
        Which Gaussian; after the last of them, the differences.
    columns
        Outputs that are wanted.
    kept
        Of an earlier model, to which those of the cohort are added.
    """

    cohort: Cohort
    fit: Fit
    scale: int
    columns: Indices
    kept: KeptSums | None = None

    @property
    def groups(self) -> list[int]:
        """Return the numbers of the groups that have sections in the fit."""
        earlier = () if self.kept is None else self.kept.groups
        return sorted({*self.cohort.group[self.fit.sections].tolist(), *earlier})

    def __len__(self) -> int:
        return len(self.groups)

    def make(self, index: int) -> RidgeSums:
        """Return the sums of one group, by its place."""
        group, found = self.groups[index], None
        if self.kept is not None and group in self.kept.groups:
            found = self.kept.sums(group, self.scale)
        for cell in self.cohort.cells:
            if cell.group == group and cell.fold != self.fit.fold:
                sums = load_sums(self.cohort.folder, cell, self.scale).outputs(self.columns)
                found = sums if found is None else found + sums
        assert found is not None
        return found
