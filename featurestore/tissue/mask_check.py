"""Does a mask lie on the tissue of its slide? Seen where the mask covers glass, and the same mask read otherwise does not.

A mask that is mirrored, inverted, or written in microns is read without an error and ends in embeddings of glass. Nothing
in the file tells. What tells is the slide: `texture` finds most tissue on most slides, so the share of the mask that it
calls tissue is compared with that of the mask in other readings.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import MaskError
from featurestore.tissue.annotation import Annotation, Frame, Selection
from featurestore.tissue.outlines import Outlines

# Chosen, not measured: a coarse outline of the right tissue still lies mostly on it. Between the limits stand faint and
# fatty tissue, where `texture` may be what is wrong.
REFUSED = (0.25, 0.75)
"""Share of the mask on tissue up to which it is refused, if another reading reaches the second."""
DOUBTED = (0.5, 0.3)
"""Share below which there is a remark, if another reading is better by the second."""
OVERLAP_DOUBTED = (0.5, 0.8)
"""The same for Dice's overlap of mask and tissue: a mask of all tissue in too small a scale may lie on tissue by chance."""
MOSTLY_ON = (0.8, 0.95)
"""The same for the share, where the other reading lies wholly on tissue: a mirrored section may cover most of itself."""
SCALES = (2, 4, 8, 16, 32, 64)
"""Downsamplings of a slide's levels: coordinates of a coarser one lie in the slide's top-left corner. Tried for a remark
only, since with so many readings one may lie on tissue by chance."""
_SAME_UNIT = 0.05
"""Where a pixel is a micron to within this share, the two units cannot be told apart, and need not be."""


@dataclass(frozen=True)
class _Reading:
    name: str
    fix: str
    mask: NDArray[np.bool_]


def check_mask(
    mask: NDArray[np.bool_],
    tissue: NDArray[np.bool_],
    annotation: Annotation,
    selection: Selection,
    frame: Frame,
    label: str,
) -> str:
    """Compare a mask with the tissue that `texture` finds.

    Parameters
    ----------
    mask, tissue
        ``(height, width)``, on the overview.

    Returns
    -------
    str
        What the user should know; empty if there is nothing.

    Raises
    ------
    MaskError
        If the mask lies on glass, and in another reading on tissue.
    """
    if not tissue.any():
        return ""
    share, overlap = _share(mask, tissue), _dice(mask, tissue)
    # Before the mask is drawn again: with 100,000 outlines each reading takes seconds.
    if share >= MOSTLY_ON[0] and overlap >= OVERLAP_DOUBTED[0]:
        return ""
    said = f"{label} lies on tissue by {share:.0%} of its area"
    readings = [r for r in _readings(mask, annotation, selection, frame) if r.mask.any()]
    best = max(readings, key=lambda r: _share(r.mask, tissue), default=None)
    if best is not None:
        other = _share(best.mask, tissue)
        if share <= REFUSED[0] and other >= REFUSED[1]:
            raise MaskError(
                f"{said}, and {best.name} by {other:.0%}: {best.fix}, or if it is right as it is, use it with --tissue none "
                "and --within"
            )
        if (share < DOUBTED[0] and other >= share + DOUBTED[1]) or (
            share < MOSTLY_ON[0] and other >= MOSTLY_ON[1]
        ):
            return f"{said}, and {best.name} by {other:.0%}; is it right?"
    best = max(readings, key=lambda r: _dice(r.mask, tissue), default=None)
    if best is not None:
        other = _dice(best.mask, tissue)
        if overlap < OVERLAP_DOUBTED[0] and other >= OVERLAP_DOUBTED[1]:
            return f"{label} overlaps tissue by {overlap:.2f} (Dice), and {best.name} by {other:.2f}; is it right?"
    if share > REFUSED[0]:
        return ""
    for reading in _scaled(annotation, selection, frame):
        if reading.mask.any() and (other := _share(reading.mask, tissue)) >= REFUSED[1]:
            return f"{said}, and {reading.name} by {other:.0%}: {reading.fix}; is it right?"
    return f"{said}; is it right?"


def _scaled(annotation: Annotation, selection: Selection, frame: Frame) -> Iterator[_Reading]:
    """Yield a mask as it is if its coordinates are pixels of a coarser level, the finest first."""
    if not isinstance(annotation, Outlines):
        return
    for factor in SCALES:
        read = _draw(annotation, selection, frame, px_per_unit=float(factor))
        yield _Reading(f"multiplied by {factor}", "coordinates are level-0 pixels", read)


def _draw(
    annotation: Outlines,
    selection: Selection,
    frame: Frame,
    px_per_unit: float = 1.0,
    *,
    swapped: bool = False,
) -> NDArray[np.bool_]:
    read = annotation.draw(selection.taken, frame, px_per_unit, swapped=swapped)
    if selection.left_out:
        read &= ~annotation.draw(selection.left_out, frame, px_per_unit, swapped=swapped)
    return read


def _readings(
    mask: NDArray[np.bool_], annotation: Annotation, selection: Selection, frame: Frame
) -> list[_Reading]:
    readings = [
        _Reading("mirrored left to right", "mirror it", mask[:, ::-1]),
        _Reading("mirrored top to bottom", "mirror it", mask[::-1]),
        _Reading("turned by 180 degrees", "turn it", mask[::-1, ::-1]),
    ]
    if isinstance(annotation, Outlines):
        read = _draw(annotation, selection, frame, swapped=True)
        readings.append(_Reading("with x and y swapped", "write x before y", read))
        if abs(frame.slide_mpp - 1) > _SAME_UNIT:
            read = _draw(annotation, selection, frame, 1 / frame.slide_mpp)
            fix = f"coordinates are level-0 pixels, so divide them by {frame.slide_mpp:.4g}"
            readings.append(_Reading("read in microns", fix, read))
    else:
        readings.append(_Reading("inverted", "write 0 for what is left out", ~mask))
    return readings


def _share(mask: NDArray[np.bool_], tissue: NDArray[np.bool_]) -> float:
    return float((mask & tissue).sum() / mask.sum())


def _dice(mask: NDArray[np.bool_], tissue: NDArray[np.bool_]) -> float:
    return float(2 * (mask & tissue).sum() / (mask.sum() + tissue.sum()))
