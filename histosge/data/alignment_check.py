"""Do these spots lie on this slide? How many are on tissue, and which transformation would put more of them there.

The usual mistakes are tried one by one: coordinates of the downsampled image crowd into the top-left corner, swapped
axes mirror the section, another mpp scales it. The one that puts most spots on tissue is named with its share.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Spots

# Shares of spots. Below the first, too few lie on the slide or on tissue; below the second, a warning is due; above the
# third, another transformation is better evidence than the coordinates as they are.
REFUSE_BELOW, WARN_BELOW, CONVINCING = 0.5, 0.8, 0.9
# A transformation is only named if it puts this much more of the spots on tissue: some always does a little better.
CLEARLY_BETTER = 0.1
SAME_MPP = 0.05
"""Two values of microns per pixel are taken as one scale up to this relative difference."""
# Tried around the ratio of extents, 0.78 to 1.28 of it: spots seldom cover the whole tissue, so the ratio is a rough guess.
SCALES = np.exp(np.linspace(-0.25, 0.25, 21))
# Factors this close to 1 are not tried: a shift explains as much, and no other magnification is so near.
UNSCALED = 0.08
# Spots within 1 / 3 of the slide's and of the tissue's extent crowd a corner: Space Ranger's hires image, from which such
# coordinates come, is only 2,000 pixels a side.
CROWDED = 3


@dataclass(frozen=True)
class AlignmentReport:
    """How well spots and slide agree.

    Parameters
    ----------
    share_inside, share_on_tissue
        Of the spots, 0..1: on the slide, and on tissue.
    verdict
        ``ok``, ``warn`` or ``refuse``.
    message
        One line: the shares, and the transformation that would put more spots on tissue, if any; empty when ok.
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
    is_tissue
        ``(n_rows, n_cols)``.
    y_um, x_um
        Centres of patches, in microns.
    size_um
        The slide's ``(width, height)``.
    """

    is_tissue: NDArray[np.bool_]
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
        return float((inside & self.is_tissue[rows, cols]).mean())

    def extent_um(self) -> NDArray[np.float64]:
        """``(x, y)`` extent of the tissue; 0 if there is none."""
        rows, cols = np.nonzero(self.is_tissue)
        if len(rows) == 0:
            return np.zeros(2)
        return np.array([np.ptp(self.x_um[cols]), np.ptp(self.y_um[rows])])


def _nearest(centres: NDArray[np.float64], values: NDArray[np.float64]) -> NDArray[np.int64]:
    step = centres[1] - centres[0] if len(centres) > 1 else 1.0
    nearest = np.rint((values - centres[0]) / step)
    return np.asarray(np.clip(nearest, 0, len(centres) - 1), dtype=np.int64)


def check_alignment(spots: Spots, tissue: TissueMap) -> AlignmentReport:
    """Compare spots with the slide that a sample sheet puts them on.

    Returns
    -------
    AlignmentReport
        ``refuse`` where the spots are clearly elsewhere, ``warn`` where fewer than 80 % are on tissue.
    """
    inside, on = tissue.share_inside(spots.xy_um), tissue.share_on_tissue(spots.xy_um)
    transformation, best = _best_transformation(spots.xy_um, tissue)
    crowded = _crowded(spots.xy_um, tissue)
    shares = f"section {spots.slide_id!r}: {on:.0%} of {len(spots)} spots lie on tissue and {inside:.0%} on the slide"
    remedy = ""
    if best > max(on + CLEARLY_BETTER, WARN_BELOW):
        remedy = f"; {transformation} would put {best:.0%} on tissue"
    # Spots that crowd into a corner may all lie on tissue there, so a scale need not put more of them on tissue.
    if crowded and best >= on - CLEARLY_BETTER:
        remedy = f"; they fill a corner of the slide; {transformation} would put {best:.0%} on tissue over its whole extent"
    # Few spots on tissue alone are no proof, as tissue may be pale: refused only if another transformation convinces.
    convincing = best > CONVINCING and (on < REFUSE_BELOW or crowded)
    if inside < REFUSE_BELOW or convincing:
        message = shares + (remedy or "; are they of this slide?")
        return AlignmentReport(len(spots), inside, on, "refuse", message)
    if on < WARN_BELOW:
        return AlignmentReport(len(spots), inside, on, "warn", shares + remedy)
    return AlignmentReport(len(spots), inside, on, "ok")


def check_scale(
    report: AlignmentReport, slide_id: str, slide_mpp: float, implied_mpp: float | None
) -> AlignmentReport:
    """Compare the slide's mpp with the one that the expression's own files imply.

    Positions in pixels lie on tissue whatever the mpp is, so `check_alignment` cannot see a wrong one.

    Returns
    -------
    AlignmentReport
        ``warn`` with both values where they differ by more than `SAME_MPP`.
    """
    if implied_mpp is None or abs(implied_mpp / slide_mpp - 1) <= SAME_MPP:
        return report
    message = (
        f"section {slide_id!r}: the slide has {slide_mpp:.4g} µm/px in the store, its expression's files imply "
        f"{implied_mpp:.4g}; if these are right, set mpp {implied_mpp:.4g} in the sample sheet and embed again"
    )
    return replace(report, verdict="warn", message="; ".join(filter(None, [report.message, message])))


def _crowded(xy_um: NDArray[np.float64], tissue: TissueMap) -> bool:
    """Tell whether all spots sit in the top-left corner, far smaller than the tissue: coordinates of a hires image."""
    extent = tissue.extent_um()
    if not (extent > 0).all():
        return False
    in_corner = (xy_um.max(axis=0) < np.asarray(tissue.size_um) / CROWDED).all()
    return bool(in_corner and (np.ptp(xy_um, axis=0) < extent / CROWDED).all())


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
        for scale in guess * SCALES:
            if abs(scale - 1) > UNSCALED:
                words = f"scaling the coordinates (or the mpp) by {scale:.3g}"
                candidates.append((words + (" and swapping x and y" if swapped else ""), points * scale))
    # Rounded, so that of transformations that are as good the first is taken: a swap before a scale.
    best = max(candidates, key=lambda item: round(tissue.share_on_tissue(item[1]), 3))
    return best[0], tissue.share_on_tissue(best[1])
