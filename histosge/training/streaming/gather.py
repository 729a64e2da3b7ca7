"""Pass 2 of a streamed training: Gram matrices of what is pooled around spots, per scale and cell of sections."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

import numpy as np

from histosge.data.block_bands import pool_spots_by_band
from histosge.models.linear_algebra import Floats, Indices
from histosge.models.ridge_sums import RidgeSums
from histosge.training.kept_sums import KeptSums
from histosge.training.streaming.cohort import Cell, Cohort, Fit
from histosge.training.streaming.survey import OnStep
from histosge.training.streaming.work_folder import WorkFolder

SECONDS_BETWEEN_SAVES = 20.0
"""A cell of 1,536 numbers at five scales takes 50 MB: written after each section it would double the time of small ones."""


class SpotOutputs(Protocol):
    """What a model's ridges are fitted to."""

    @property
    def n_outputs(self) -> int:
        """Return how many outputs a spot has."""
        ...

    def of_section(self, index: int, spots: Indices) -> Floats:
        """Return the outputs of some spots of a section, ``(n, n_outputs)``."""
        ...


def gather_sums(
    cohort: Cohort, sigmas_um: Sequence[float], outputs: SpotOutputs, reference: Floats, on_step: OnStep
) -> None:
    """Add up the sums of every cell in the work folder; what is there already is not read again.

    Parameters
    ----------
    sigmas_um
        Of the Gaussians.
    outputs
        Of the spots.
    reference
        Subtracted from all inputs, ``(dim,)``.
    """
    for cell in cohort.cells:
        sums, done = _load_cell(cohort.folder, cell, len(sigmas_um)), set[int]()
        if sums is None:
            sums = [RidgeSums.zeros(len(reference), outputs.n_outputs) for _ in sigmas_um]
        else:
            done = set(cohort.folder.load_one(cell.name, "sections").tolist())
        saved = time.monotonic()
        for index in cell.sections.tolist():
            on_step(cohort.sections[index].slide_id)
            if index in done:
                continue
            under = cohort.survey(index).under
            for pooled in pool_spots_by_band(cohort.open(index), under, sigmas_um):
                values, scale = pooled.values, pooled.scale
                values -= reference
                sums[scale] = sums[scale].add_rows(values, outputs.of_section(index, pooled.spots))
            done.add(index)
            if time.monotonic() - saved > SECONDS_BETWEEN_SAVES or len(done) == len(cell.sections):
                _save_cell(cohort.folder, cell, sums, done)
                saved = time.monotonic()


def _save_cell(folder: WorkFolder, cell: Cell, sums: Sequence[RidgeSums], done: set[int]) -> None:
    arrays = {f"{scale}.{name}": a for scale, part in enumerate(sums) for name, a in part.arrays().items()}
    folder.save(cell.name, {**arrays, "sections": np.array(sorted(done), np.int64)})


def _load_cell(folder: WorkFolder, cell: Cell, n_scales: int) -> list[RidgeSums] | None:
    if not folder.has(cell.name):
        return None
    return [load_sums(folder, cell, scale) for scale in range(n_scales)]


def load_sums(folder: WorkFolder, cell: Cell, scale: int) -> RidgeSums:
    """Read the sums of one cell at one scale."""
    names = ("n", "x", "y", "xx", "xy", "yy")
    return RidgeSums.from_arrays({name: folder.load_one(cell.name, f"{scale}.{name}") for name in names})


@dataclass(frozen=True)
class GroupSums(Sequence[RidgeSums]):
    """Sums of the groups of a fit at one scale, read from disk whenever one is looked at.

    Parameters
    ----------
    cohort
        Whose work folder they are in.
    fit
        Which sections count.
    scale
        Which Gaussian.
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

    @overload
    def __getitem__(self, index: int) -> RidgeSums: ...

    @overload
    def __getitem__(self, index: slice) -> list[RidgeSums]: ...

    def __getitem__(self, index: int | slice) -> RidgeSums | list[RidgeSums]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        group, found = self.groups[index], None
        if self.kept is not None and group in self.kept.groups:
            found = self.kept.sums(group, self.scale)
        for cell in self.cohort.cells:
            if cell.group == group and cell.fold != self.fit.fold:
                sums = load_sums(self.cohort.folder, cell, self.scale).outputs(self.columns)
                found = sums if found is None else found + sums
        assert found is not None
        return found

    def __iter__(self) -> Iterator[RidgeSums]:
        return (self[i] for i in range(len(self)))
