"""Which spots are trained on and which are held out: arithmetic only.

No split here puts a spot into both parts, and `check_no_leak` checks that for any set of folds.

Terms
    fold     one choice of training and test spots, as masks over each section's spots
    block    spatial: a connected part of a section, held out whole
    buffer   in microns: training spots nearer than this to a held-out spot are dropped
    random   half of every section's spots: neighbours of a held-out spot are trained on, so it
             measures filling of gaps, not prediction of new tissue
    checkerboard   every second spot of the lattice is held out, then the others: the published generation task
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.data.sections import Spots
from histosge.errors import SplitError
from histosge.heldout.donors import named_donors
from histosge.heldout.lattice import lattice_parity

SPLITS = ("block", "section", "donor", "random", "checkerboard")
INTERLEAVED = ("random", "checkerboard")
"""Splits whose held-out spots lie among training spots, so that both share patches."""
WITHIN_SECTION = ("block", *INTERLEAVED)
"""Splits that leave part of every section to train on."""
N_BLOCKS = 4
"""Folds of the block split: a section falls into this many blocks of equal counts of spots."""

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Fold:
    """One choice of training and test spots.

    Parameters
    ----------
    name
        What is held out, such as ``C2`` or ``block1``.
    train, test
        Slide id -> mask over that section's spots, shape ``(n_spots,)``. Every section is in both.
    """

    name: str
    train: Mapping[str, Mask]
    test: Mapping[str, Mask]

    @property
    def n_train(self) -> int:
        """Training spots."""
        return sum(int(mask.sum()) for mask in self.train.values())

    @property
    def n_test(self) -> int:
        """Held-out spots."""
        return sum(int(mask.sum()) for mask in self.test.values())

    @property
    def n_dropped(self) -> int:
        """Spots in neither part: they lie within the buffer."""
        return sum(len(mask) for mask in self.test.values()) - self.n_train - self.n_test


def make_folds(
    split: str, spots: Sequence[Spots], *, seed: int = 0, buffer_um: float = 0.0
) -> tuple[Fold, ...]:
    """Split sections into folds, and check that nothing leaks.

    Parameters
    ----------
    split
        One of `SPLITS`.
    spots
        One per section; slide ids are unique.
    seed
        Moves the blocks, or draws the random half; without effect on sections, donors and checkerboards.
    buffer_um
        Of the block split; `histosge.heldout.leakage.window_buffer_um` gives one.

    Raises
    ------
    SplitError
        If the split is unknown, or the sections cannot give it.
    """
    _check_sections(spots)
    if split == "block":
        folds = block_folds(spots, buffer_um=buffer_um, seed=seed)
    elif split == "section":
        folds = section_folds(spots)
    elif split == "donor":
        folds = donor_folds(spots)
    elif split == "random":
        folds = random_folds(spots, seed=seed)
    elif split == "checkerboard":
        folds = checkerboard_folds(spots)
    else:
        raise SplitError(f"unknown split {split!r}: choose one of {', '.join(SPLITS)}")
    # Folds are checked as if they came from elsewhere: a mistake in a split would make every score wrong, unseen.
    check_no_leak(folds, spots, buffer_um=buffer_um if split == "block" else 0.0)
    check_apart(folds, spots, split)
    return folds


def default_buffer_um(spot_um: float, patch_um: float) -> float:
    """Return the buffer that keeps every training patch off every held-out spot's disc.

    A patch under a training spot reaches at most its own diagonal beyond that spot's disc, so two
    centres one diameter and one diagonal apart share no pixel. Where patches of both parts must not
    overlap either, `histosge.heldout.leakage.window_buffer_um` is the one.

    Parameters
    ----------
    spot_um
        Diameter of a spot, in microns.
    patch_um
        Side of a patch, in microns.
    """
    return spot_um + float(np.sqrt(2)) * patch_um


def block_folds(
    spots: Sequence[Spots], *, buffer_um: float, n_blocks: int = N_BLOCKS, seed: int = 0
) -> tuple[Fold, ...]:
    """Hold out one spatial block of every section at a time.

    Each section is cut along straight lines, at an angle drawn from `seed`, into blocks of nearly
    equal counts of spots. Training spots nearer than `buffer_um` to a held-out spot are dropped.

    Raises
    ------
    SplitError
        If a section has fewer spots than blocks, or the buffer leaves nothing to train on.
    """
    # One generator for all sections: with a generator each, sections of equal shape would be cut alike.
    rng = np.random.default_rng(seed)
    labels: dict[str, NDArray[np.int64]] = {}
    for part in spots:
        if len(part) < n_blocks:
            raise SplitError(
                f"section {part.slide_id!r} has {len(part)} spots, too few for {n_blocks} blocks:"
                " leave it out, or use the section split"
            )
        # A quarter turn brings straight cuts back onto themselves: no larger angle is needed.
        turned = part.xy_um @ _rotation(rng.uniform(0, np.pi / 2))
        # Labels are shuffled, so that one fold does not hold out the same corner of every section.
        labels[part.slide_id] = rng.permutation(n_blocks)[cut_into_blocks(turned, n_blocks)]
    folds = []
    for k in range(n_blocks):
        test = {part.slide_id: labels[part.slide_id] == k for part in spots}
        train = {part.slide_id: _beyond(part.xy_um, test[part.slide_id], buffer_um) for part in spots}
        # The buffer acts within a section: another section's spots lie in a frame of their own.
        folds.append(Fold(f"block{k}", train, test))
        if not folds[-1].n_train:
            raise SplitError(
                f"a buffer of {buffer_um:.0f} um leaves no spot to train on for block {k} of {n_blocks}:"
                " use smaller patches, or the random split"
            )
    return tuple(folds)


def section_folds(spots: Sequence[Spots]) -> tuple[Fold, ...]:
    """Hold out one section at a time.

    Raises
    ------
    SplitError
        If there are fewer than 2 sections.
    """
    ids = [part.slide_id for part in spots]
    if len(ids) < 2:
        raise SplitError(
            f"the section split needs at least 2 sections, not {len(ids)}: add one, or use --split block"
        )
    return _whole_sections(spots, {slide_id: slide_id for slide_id in ids})


def donor_folds(spots: Sequence[Spots]) -> tuple[Fold, ...]:
    """Hold out all sections of one donor at a time.

    Raises
    ------
    SplitError
        If there are fewer than 2 donors, or the sheet names none.
    """
    donors = {part.slide_id: part.donor for part in spots}
    if not named_donors(spots):
        raise SplitError(
            f"the donor split needs donors, and the sample sheet names none of its {len(donors)} sections':"
            " fill its donor column, or use --split section"
        )
    if len(set(donors.values())) < 2:
        raise SplitError(
            f"the donor split needs at least 2 donors, not {len(set(donors.values()))}:"
            " fill the sample sheet's donor column, or use --split section"
        )
    return _whole_sections(spots, donors)


def random_folds(spots: Sequence[Spots], *, seed: int = 0) -> tuple[Fold, ...]:
    """Hold out a random half of every section's spots, drawn from `seed`: one fold.

    Raises
    ------
    SplitError
        If a section has fewer than 2 spots.
    """
    rng = np.random.default_rng(seed)
    test = {}
    for part in spots:
        if len(part) < 2:
            raise SplitError(
                f"section {part.slide_id!r} has {len(part)} spots: too few to halve, leave it out"
            )
        # Of an odd number the larger half is trained on.
        test[part.slide_id] = rng.permutation(len(part)) < len(part) // 2
    return (Fold("random", {slide_id: ~mask for slide_id, mask in test.items()}, test),)


def checkerboard_folds(spots: Sequence[Spots]) -> tuple[Fold, ...]:
    """Hold out every second spot of every section's lattice, and then the others: two folds.

    On a square lattice all four nearest spots of a held-out spot are trained on, on a hexagonal one four of six.

    Raises
    ------
    SplitError
        If a section's spots lie on no lattice, or are fewer than 2.
    """
    odd = {}
    for part in spots:
        if len(part) < 2:
            raise SplitError(
                f"section {part.slide_id!r} has {len(part)} spots: no second one to hold out, leave it out"
            )
        parity = lattice_parity(part.xy_um)
        if parity is None:
            raise SplitError(
                f"the spots of section {part.slide_id!r} lie on no square or hexagonal lattice, so there is no "
                "checkerboard to hold out: use --split random, which holds out a random half"
            )
        odd[part.slide_id] = parity
    even = {slide_id: ~mask for slide_id, mask in odd.items()}
    return (Fold("checkerboard0", odd, even), Fold("checkerboard1", even, odd))


def check_no_leak(folds: Sequence[Fold], spots: Sequence[Spots], *, buffer_um: float = 0.0) -> None:
    """Refuse folds in which a held-out spot is trained on, or touched by a training spot.

    Raises
    ------
    SplitError
        If there is no fold, a fold has an empty part, masks do not fit the spots, one spot is in both
        parts, or a training spot is nearer than `buffer_um` to a held-out one.
    """
    if not folds:
        raise SplitError("nothing is held out: there is no fold; make them with make_folds()")
    for fold in folds:
        if not fold.n_test or not fold.n_train:
            raise SplitError(
                f"fold {fold.name!r} has {fold.n_train} training and {fold.n_test} held-out spots:"
                " give at least one of each"
            )
        for part in spots:
            _check_masks(fold, part, buffer_um)


def check_apart(folds: Sequence[Fold], spots: Sequence[Spots], split: str) -> None:
    """Refuse section or donor folds that train on and hold out one section, or one donor.

    Raises
    ------
    SplitError
        Naming the fold and what is in both parts.
    """
    # The other splits cut through sections and donors on purpose.
    if split not in {"section", "donor"}:
        return
    unit = {part.slide_id: part.slide_id if split == "section" else part.donor for part in spots}
    for fold in folds:
        trained = {unit[slide_id] for slide_id, mask in fold.train.items() if mask.any()}
        held_out = {unit[slide_id] for slide_id, mask in fold.test.items() if mask.any()}
        if both := sorted(trained & held_out):
            raise SplitError(
                f"fold {fold.name!r} trains on and holds out {split} {', '.join(both)}: hold it out whole"
            )


def _check_sections(spots: Sequence[Spots]) -> None:
    # Folds are keyed by slide id: a slide that is given twice would hide its first half.
    ids = [part.slide_id for part in spots]
    if not ids:
        raise SplitError("nothing to split: no section has usable spots; give a sample sheet with expression")
    if repeated := sorted({slide_id for slide_id in ids if ids.count(slide_id) > 1}):
        raise SplitError(
            f"slide {repeated[0]!r} appears {ids.count(repeated[0])} times: give each section once"
        )


def _check_masks(fold: Fold, part: Spots, buffer_um: float) -> None:
    train, test = fold.train[part.slide_id], fold.test[part.slide_id]
    if train.shape != (len(part),) or test.shape != (len(part),):
        raise SplitError(
            f"fold {fold.name!r}: masks {train.shape} and {test.shape} do not fit the {len(part)} spots"
            f" of {part.slide_id!r}"
        )
    # Counted before distances are: a spot is 0 um from itself, and the message would speak of a buffer.
    if both := int((train & test).sum()):
        raise SplitError(
            f"fold {fold.name!r} trains on {both} of its own held-out spots of {part.slide_id!r}"
        )
    if buffer_um > 0 and train.any() and test.any():
        nearest = float(np.min(cKDTree(part.xy_um[test]).query(part.xy_um[train])[0]))
        if nearest < buffer_um:
            raise SplitError(
                f"fold {fold.name!r}: a training spot of {part.slide_id!r} lies {nearest:.0f} um from a"
                f" held-out one, inside the buffer of {buffer_um:.0f} um: drop it"
            )


def _whole_sections(spots: Sequence[Spots], unit: Mapping[str, str]) -> tuple[Fold, ...]:
    folds = []
    # In the order of the sample sheet, so that reports list folds as the user knows them.
    for held_out in dict.fromkeys(unit.values()):
        test = {part.slide_id: np.full(len(part), unit[part.slide_id] == held_out) for part in spots}
        folds.append(Fold(held_out, {slide_id: ~mask for slide_id, mask in test.items()}, test))
    return tuple(folds)


def _beyond(xy_um: NDArray[np.float64], held_out: Mask, buffer_um: float) -> Mask:
    """Return the spots that are not held out and at least `buffer_um` from every one that is."""
    distance, _ = cKDTree(xy_um[held_out]).query(xy_um)
    return ~held_out & (distance >= buffer_um)


def _rotation(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def cut_into_blocks(xy: NDArray[np.float64], n_blocks: int) -> NDArray[np.int64]:
    """Label points 0..n_blocks-1 by cutting the longer side again and again, shape ``(n_points,)``.

    Blocks hold nearly equal numbers of points, and each is connected.
    """
    labels = np.zeros(len(xy), dtype=np.int64)
    if n_blocks == 1:
        return labels
    first = n_blocks // 2
    # Along the longer side, which keeps blocks compact. Stable, so that ties fall the same way on every machine.
    order = np.argsort(xy[:, int(np.argmax(np.ptp(xy, axis=0)))], kind="stable")
    cut = round(len(xy) * first / n_blocks)
    low, high = order[:cut], order[cut:]
    labels[low] = cut_into_blocks(xy[low], first)
    labels[high] = first + cut_into_blocks(xy[high], n_blocks - first)
    return labels
