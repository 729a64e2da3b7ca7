"""What calibration leaves out in turn: whole donors, else whole sections, else blocks of a lone section.

Never more is shared between training and held-out spots than there will be in use: a donor is never split where there are
several, and patches of held-out blocks are hidden from training, as in an evaluation by blocks.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.data.sections import TrainingSection
from histosge.heldout.leakage import PatchSplit, select_patches, window_buffer_um
from histosge.heldout.splits import N_BLOCKS, cut_into_blocks

MAX_FOLDS = 4
"""Fits that calibration costs, at most: more sections or donors are left out several at a time."""
MANY_SPOTS = 10_000
"""Beyond, two folds are enough: two fits on half the sections each are cheap, and the errors hardly larger."""
DONOR, SECTION, BLOCK = "donor", "section", "block"


@dataclass(frozen=True)
class HeldOutPart:
    """One fold.

    Parameters
    ----------
    training, held_out
        Sections, or parts of a lone one with the patches that this part may see.
    donors
        Number of each held-out section's donor.
    """

    training: list[TrainingSection]
    held_out: list[TrainingSection]
    donors: list[int]


def what_is_held_out(sections: Sequence[object], donors: Sequence[str]) -> str:
    """Return `DONOR`, `SECTION` or `BLOCK`."""
    if len(set(donors)) > 1:
        return DONOR
    return SECTION if len(sections) > 1 else BLOCK


def held_out_parts(
    sections: Sequence[TrainingSection], spot_um: float, donors: Sequence[str]
) -> Iterator[HeldOutPart]:
    """Yield the folds.

    Parameters
    ----------
    spot_um
        Diameter of a spot in microns, for the buffer within a lone section.
    donors
        Of each section.
    """
    if what_is_held_out(sections, donors) == BLOCK:
        yield from _blocks(sections[0], spot_um)
        return
    donor = number_donors(donors)
    fold = fold_sections(donors, sum(len(s.target) for s in sections))
    for k in np.unique(fold):
        yield HeldOutPart(
            [s for s, f in zip(sections, fold, strict=True) if f != k],
            [s for s, f in zip(sections, fold, strict=True) if f == k],
            donor[fold == k].tolist(),
        )


def number_donors(donors: Sequence[str]) -> NDArray[np.int64]:
    """Return the number of each section's donor, in the order in which donors first come, ``(n_sections,)``."""
    names = {name: number for number, name in enumerate(dict.fromkeys(donors))}
    return np.array([names[name] for name in donors], np.int64)


def fold_sections(donors: Sequence[str], n_spots: int) -> NDArray[np.int64]:
    """Return the fold that each of several sections is held out in, ``(n_sections,)``.

    Parameters
    ----------
    donors
        Of each section: donors are held out whole where there are several.
    n_spots
        Of all sections.
    """
    donor = number_donors(donors)
    # Donor by donor, not section by section: one that gave five sections would be in every fold otherwise.
    unit = donor if len(set(donors)) > 1 else np.arange(len(donors))
    return np.asarray(unit % (MAX_FOLDS if n_spots <= MANY_SPOTS else 2))


def _blocks(section: TrainingSection, spot_um: float) -> Iterator[HeldOutPart]:
    patches, xy_um = section.patches, section.spot_xy_um
    buffer_um = window_buffer_um(spot_um, patches.receptive_um, patches.stride_um)
    block = cut_into_blocks(xy_um, min(N_BLOCKS, max(1, len(xy_um))))
    for k in np.unique(block):
        held_out = block == k
        distance = np.asarray(cKDTree(xy_um[held_out]).query(xy_um)[0])
        training = ~held_out & (distance >= buffer_um)
        # A small section may lie within the buffer altogether.
        if training.sum() > 1:
            split = PatchSplit.from_positions(patches, xy_um, training, held_out)
            parts = ((split.train, training), (split.test, held_out))
            seen, tested = (_cut(section, *part) for part in parts)
            yield HeldOutPart([seen], [tested], [0])


def _cut(section: TrainingSection, patches: NDArray[np.bool_], spots: NDArray[np.bool_]) -> TrainingSection:
    return select_patches(section, patches).subset(spots)
