"""Which patches a fold's training may see, and which its held-out spots: no pixel is in both.

A model that looks beyond a patch would otherwise train on windows that reach into held-out tissue. Here every patch
is assigned to training, to the held-out spots, or to neither. A model sees only the patches of its own part and finds
background beyond them, so windows of any width stay apart. Arithmetic only.

Terms
    part    training spots or held-out spots, and the patches that belong to them
    margin  sqrt(2) x the distance from which on patches share no pixel: a patch belongs to a part if it is nearer to that
            part's spots by at least this
"""

from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.data.sections import Patches, Section, TrainingSection
from histosge.errors import SplitError

Mask = NDArray[np.bool_]
AnySection = TypeVar("AnySection", Section, TrainingSection)


def window_buffer_um(spot_um: float, patch_um: float, stride_um: float, shape: str = "disc") -> float:
    """Return how far apart training and held-out spots must be for the patches under them to share no pixel.

    A patch counts for a spot if its stride cell touches the spot: its centre lies at most half the spot's width, from
    corner to corner of a square, and half the cell's diagonal away. Squares whose centres are a patch's diagonal apart
    are disjoint.

    Parameters
    ----------
    spot_um, patch_um, stride_um
        Diameter of a spot (the side of a square one), side of a patch (on a grid of tokens, of what a token sees), and
        step of the grid.
    shape
        Of the spots: ``disc`` or ``square``, see `histosge.data.sections.Spots`.
    """
    diagonal = float(np.sqrt(2))
    widest = spot_um * diagonal if shape == "square" else spot_um
    return widest + diagonal * (stride_um + patch_um)


def section_buffer_um(section: Section) -> float:
    """Return `window_buffer_um` of a section's spots and patches."""
    spots, patches = section.spots, section.patches
    return window_buffer_um(spots.diameter_um, patches.receptive_um, patches.stride_um, spots.shape)


@dataclass(frozen=True)
class PatchSplit:
    """One section's patches as one fold sees them.

    Parameters
    ----------
    train, test
        Masks over the section's patches, ``(n_patches,)``.
    """

    train: Mask
    test: Mask

    @classmethod
    def from_spots(cls, section: Section, train: Mask, test: Mask) -> "PatchSplit":
        """Split a section's patches by the spots trained on and held out, masks ``(n_spots,)``.

        Where a part has no spot in this section the other part sees all patches.
        """
        return cls.from_positions(section.patches, section.spots.xy_um, train, test)

    @classmethod
    def from_positions(
        cls, patches: Patches, spots: NDArray[np.float64], train: Mask, test: Mask
    ) -> "PatchSplit":
        """Split patches as `from_spots` does, by the positions of spots, ``(n_spots, 2)`` microns."""
        all_patches = np.ones(len(patches), dtype=bool)
        if not train.any() or not test.any():
            return cls(
                all_patches if train.any() else ~all_patches, all_patches if test.any() else ~all_patches
            )
        at = patches.xy_um
        # From one patch to another each of these distances changes by no more than the patches are apart. So patches
        # of two parts are at least a margin apart, and squares whose centres are a diagonal apart cannot overlap.
        to_train, to_test = (cKDTree(spots[part]).query(at)[0] for part in (train, test))
        nearer = to_test - to_train
        # A little less, so that rounding takes no patch away from a spot: what must hold is checked on the squares.
        margin = np.sqrt(2) * patches.receptive_um * (1 - 1e-9)
        return cls(nearer >= margin, nearer <= -margin)


def check_windows_apart(section: Section, split: PatchSplit, train: Mask, test: Mask, fold: str) -> None:
    """Refuse a split whose parts share a pixel, or in which a spot lacks a patch under its disc.

    Raises
    ------
    SplitError
        Naming the fold, the section and what overlaps.
    """
    patches, where = section.patches, f"fold {fold!r}, section {section.slide_id!r}"
    if not train.any() or not test.any():
        return
    # The maximum norm: two squares overlap where they are less than a side apart along both axes.
    reach, _ = cKDTree(patches.xy_um[split.test]).query(patches.xy_um[split.train], p=np.inf)
    overlapping = int((np.asarray(reach) < patches.receptive_um * (1 - 1e-6)).sum())
    if overlapping:
        raise SplitError(
            f"{where}: {overlapping} patches that training sees overlap patches of held-out spots: widen the buffer"
        )
    # A spot that lost part of its disc would be trained on, or scored by, another mean than its own.
    for name, spots, own in (("training", train, split.train), ("held-out", test, split.test)):
        covered = np.asarray(section.overlap[spots][:, own].sum(axis=1)).ravel()
        whole = np.asarray(section.overlap[spots].sum(axis=1)).ravel()
        if lost := int((covered < whole - 1e-6).sum()):
            raise SplitError(
                f"{where}: {lost} {name} spots lie on patches of the other part: widen the buffer to at least "
                f"{section_buffer_um(section):.0f} um"
            )


def select_patches(section: AnySection, keep: Mask) -> AnySection:
    """Return a section with only some of its patches; the spots stay."""
    # The usual case where whole slides are held out: nothing of a slide's size is copied.
    if keep.all():
        return section
    return replace(section, patches=section.patches.take(keep), overlap=section.overlap[:, keep])


def select_spots(section: Section, keep: Mask) -> Section:
    """Return a section with only some of its spots; the patches stay."""
    if keep.all():
        return section
    spots = section.spots
    chosen = replace(spots, barcodes=spots.barcodes[keep], xy_um=spots.xy_um[keep], counts=spots.counts[keep])
    return replace(section, spots=chosen, overlap=section.overlap[keep])
