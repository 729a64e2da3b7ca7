"""Do these spots lie on this slide? Evidence, not trust: how many are on tissue, and what would fit better.

The usual mistakes each leave a mark: coordinates of the downsampled picture crowd into the top-left
corner, swapped axes mirror the section, another mpp scales it. Each is tried, and the one that puts the
spots on tissue is named with its share.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Spots

TISSUE = 26
"""Share of a patch, 0..255, from which on it is tissue: the feature store's rule."""
REFUSE_BELOW, WARN_BELOW, CONVINCING = 0.5, 0.8, 0.9
SPREAD = (0.5, 2.0)
"""Spots whose extent is within these factors of the tissue's may be scaled as they are."""
SAME_MPP = 0.05
"""Two statements of microns per pixel this far apart, as a share, are of one scale."""


@dataclass(frozen=True)
class AlignmentReport:
    """How well spots and slide fit.

    Parameters
    ----------
    share_inside, share_on_tissue
        Of the spots, 0..1.
    verdict
        ``ok``, ``warn`` or ``refuse``.
    message
        One line: the evidence, and the mend if one would fit; empty when ok.
    """

    n_spots: int
    share_inside: float
    share_on_tissue: float
    verdict: str
    message: str = ""


@dataclass(frozen=True)
class TissueMap:
    """Tissue per patch, and where the patches are.

    Parameters
    ----------
    tissue
        0..255, ``(n_rows, n_cols)``.
    y_um, x_um
        Centres, in microns.
    size_um
        The slide's ``(width, height)``.
    """

    tissue: NDArray[np.uint8]
    y_um: NDArray[np.float64]
    x_um: NDArray[np.float64]
    size_um: tuple[float, float]

    def share_inside(self, xy_um: NDArray[np.float64]) -> float:
        """Share of positions on the slide."""
        return float(((xy_um >= 0) & (xy_um <= np.asarray(self.size_um))).all(axis=1).mean())

    def share_on_tissue(self, xy_um: NDArray[np.float64]) -> float:
        """Share of positions whose nearest patch is tissue; positions off the slide are not."""
        inside = ((xy_um >= 0) & (xy_um <= np.asarray(self.size_um))).all(axis=1)
        rows, cols = _nearest(self.y_um, xy_um[:, 1]), _nearest(self.x_um, xy_um[:, 0])
        return float((inside & (self.tissue[rows, cols] >= TISSUE)).mean())

    def extent_um(self) -> NDArray[np.float64]:
        """``(x, y)`` extent of the tissue; 0 if there is none."""
        rows, cols = np.nonzero(self.tissue >= TISSUE)
        if len(rows) == 0:
            return np.zeros(2)
        return np.array([np.ptp(self.x_um[cols]), np.ptp(self.y_um[rows])])


def _nearest(centres: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    step = centres[1] - centres[0] if len(centres) > 1 else 1.0
    nearest = np.rint((values - centres[0]) / step)
    return np.asarray(np.clip(nearest, 0, len(centres) - 1), dtype=np.int64)


def check_alignment(spots: Spots, tissue: TissueMap) -> AlignmentReport:
    """Compare spots with the slide that they are said to lie on.

    Returns
    -------
    AlignmentReport
        ``refuse`` where the spots are clearly elsewhere, ``warn`` where fewer than 80 % are on tissue.
    """
    inside, on = tissue.share_inside(spots.xy_um), tissue.share_on_tissue(spots.xy_um)
    label, fit = _best_transformation(spots.xy_um, tissue)
    crowded = _crowded(spots.xy_um, tissue)
    evidence = f"section {spots.slide_id!r}: {on:.0%} of {len(spots)} spots lie on tissue and {inside:.0%} on the slide"
    mend = f"; {label} would put {fit:.0%} on tissue" if fit > max(on + 0.1, WARN_BELOW) else ""
    if crowded and fit >= on - 0.1:
        mend = (
            f"; they fill a corner of the slide; {label} would put {fit:.0%} on tissue over its whole extent"
        )
    wrong = (
        inside < REFUSE_BELOW or (on < REFUSE_BELOW and fit > CONVINCING) or (crowded and fit > CONVINCING)
    )
    if wrong:
        return AlignmentReport(
            len(spots), inside, on, "refuse", evidence + (mend or "; are they of this slide?")
        )
    if on < WARN_BELOW:
        return AlignmentReport(len(spots), inside, on, "warn", evidence + mend)
    return AlignmentReport(len(spots), inside, on, "ok")


def check_scale(
    fit: AlignmentReport, slide_id: str, slide_mpp: float, implied_mpp: float | None
) -> AlignmentReport:
    """Compare the slide's mpp with the one that the expression's own files imply.

    Positions in pixels lie on tissue whatever the mpp is, so `check_alignment` cannot see a wrong one.

    Returns
    -------
    AlignmentReport
        ``warn`` with both values where they differ by more than `SAME_MPP`.
    """
    if implied_mpp is None or abs(implied_mpp / slide_mpp - 1) <= SAME_MPP:
        return fit
    message = (
        f"section {slide_id!r}: the slide is said to have {slide_mpp:.4g} µm/px, its expression's files imply "
        f"{implied_mpp:.4g}; if these are right, set mpp {implied_mpp:.4g} in the sample sheet and embed again"
    )
    return replace(fit, verdict="warn", message="; ".join(filter(None, [fit.message, message])))


def _crowded(xy_um: NDArray[np.float64], tissue: TissueMap) -> bool:
    """Tell whether all spots sit in the top-left quarter, far smaller than the tissue: hires coordinates."""
    extent = tissue.extent_um()
    if not (extent > 0).all():
        return False
    in_corner = (xy_um.max(axis=0) < np.asarray(tissue.size_um) / 3).all()
    return bool(in_corner and (np.ptp(xy_um, axis=0) < extent / 3).all())


def _best_transformation(xy_um: NDArray[np.float64], tissue: TissueMap) -> tuple[str, float]:
    """Try swapped axes, scales and both; return the best one in words, and its share on tissue."""
    extent = tissue.extent_um()
    candidates = [("swapping the columns of obsm['spatial']", xy_um[:, ::-1])]
    for swapped in (False, True):
        points = xy_um[:, ::-1] if swapped else xy_um
        spread = np.ptp(points, axis=0)
        if not (spread > 0).all() or not (extent > 0).all():
            continue
        guess = float(np.exp(np.log(extent / spread).mean()))
        for scale in guess * np.exp(np.linspace(-0.25, 0.25, 21)):
            if abs(scale - 1) > 0.08:
                words = f"scaling the coordinates (or the mpp) by {scale:.3g}"
                candidates.append((words + (" and swapping x and y" if swapped else ""), points * scale))
    best = max(candidates, key=lambda item: round(tissue.share_on_tissue(item[1]), 3))
    return best[0], tissue.share_on_tissue(best[1])
