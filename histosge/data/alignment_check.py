"""Do these spots lie on this slide? The positions as given are compared with every other placement.

The evidence is the share of spots on tissue, and how much of their counts the stain under them explains (see
`histosge.data.placement`). The positions as given are the prior: they are refused only where another placement fits
clearly better, or where few spots lie on tissue and the counts do not follow the stain either.

The constants were chosen on 9 sections (her2st C2-C4, mob, four synthetic ones), each with its tissue mask as it is, with
the palest 25 % or 45 % missing, with a wide border of glass, and without a mask; with all spots or those of a window;
with their own counts or those of another section; and on 23 wrong positions of each. `benchmarks/alignment.py` measures
them on other sections.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from histosge.data.placement import AS_GIVEN, SAME_PLACE_UM, Fit, PlacedSpots, Placement
from histosge.data.sections import Spots
from histosge.data.tissue_map import TissueMap

# Shares of spots. Below the first, too few lie on the slide, or on tissue; below the second, a warning is due; above the
# third, another placement is evidence by its tissue alone. Real sections show 0.99 and more; where half of the tissue
# is not recognised, 0.6.
REFUSE_BELOW, WARN_BELOW, CONVINCING = 0.5, 0.8, 0.9
# By which the score of another placement must exceed that of the positions as given. Right positions: at most 0.0 with
# a mask of any quality and 0.2 (a window, the mask misses what lies under it); wrong ones: 0.16 and more.
CLEARLY_BETTER = 0.15
# By which it must also exceed every other placement. Where counts do not follow the stain, many placements fit equally
# well by chance: the best stands out by at most 0.09 over right positions, and by 0.11 and more over wrong ones.
DISTINCT = 0.1
# A better placement that is not clearly better is named from here on. Right positions reach 0.04 with their own mask.
WORTH_A_WARNING = 0.08
# Of the counts' variance: with less, the counts tell nothing of where the spots lie. Right positions show 0.26 and
# more, another section's counts up to 0.04.
UNEXPLAINED = 0.05
SAME_MPP = 0.05
"""Two values of microns per pixel are taken as one scale up to this relative difference."""
# Spots within 1 / 3 of the slide's and of the tissue's extent crowd a corner: Space Ranger's hires image, from which such
# coordinates come, is only 2,000 pixels a side.
CROWDED = 3
# Spots that all lie within so many diameters of one are indices of an array: Visium's has 128 columns, 64 µm at 0.5 µm.
ARRAY_DIAMETERS = 2


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
        One line: the evidence for the positions as given, and for another placement where one may fit better; empty
        when ok.
    explained
        Share of the variance of library size and expression that the stain under the spots explains, 0..1.
    better, better_fit
        The other placement that the message names, and how well it fits; None where it names none.
    """

    n_spots: int
    share_inside: float
    share_on_tissue: float
    verdict: str
    message: str = ""
    explained: float = 0.0
    better: Placement | None = None
    better_fit: Fit | None = None

    def forced(self) -> "AlignmentReport":
        """Return the report with a refusal turned into a warning, as ``force`` asks for."""
        if self.verdict != "refuse":
            return self
        return replace(
            self, verdict="warn", message=f"{self.message.removesuffix(WAY_OUT)}; taken all the same"
        )


WAY_OUT = "; correct the positions, or take them as they are with --force"


def check_alignment(spots: Spots, tissue: TissueMap, mpp: float = 1.0) -> AlignmentReport:
    """Compare spots with the slide that a sample sheet puts them on.

    Parameters
    ----------
    mpp
        Microns per pixel of the slide: a better placement is written down in pixels.

    Returns
    -------
    AlignmentReport
        ``refuse`` where another placement fits clearly better, or the spots are clearly elsewhere; ``warn`` where the
        evidence is weak, or another placement may fit better.
    """
    placed = PlacedSpots.from_spots(spots, tissue)
    inside, given, candidates = (
        float(tissue.inside(spots.xy_um).mean()),
        placed.fit(AS_GIVEN),
        placed.candidates(),
    )
    best, fit = candidates[0]
    gain = fit.score - given.score
    distinct = fit.score - candidates[1][1].score if len(candidates) > 1 else fit.score
    near = placed.displacement_um(best, AS_GIVEN) <= SAME_PLACE_UM
    crowded = _crowded(spots.xy_um, tissue)
    unexplained = given.explained < UNEXPLAINED
    # Without colours, or with counts that are all alike, nothing can be explained. Few spots on tissue alone are no proof
    # then, as tissue may be pale: another placement must convince.
    convincing = placed.is_informative or fit.on_tissue > CONVINCING
    lost = inside < REFUSE_BELOW or (given.on_tissue < REFUSE_BELOW and unexplained and convincing)
    clearly = gain >= CLEARLY_BETTER and distinct >= DISTINCT
    named = gain >= WORTH_A_WARNING
    remarks = [_evidence(spots, inside, given)]
    if crowded:
        remarks.append(_crowd(spots))
    if named:
        doubt = " (little better)" if gain < CLEARLY_BETTER else " (others fit nearly as well)"
        remarks.append(_better(best, fit, "" if clearly else doubt, mpp, tissue.size_um))
    # A near placement is a matter of registration: training loses little by it, so it is told and not refused.
    if lost or crowded or (clearly and not near):
        if not clearly and not crowded:
            remarks.append("they may belong to another slide")
        message = f"section {spots.slide_id!r}: {'; '.join(remarks)}{WAY_OUT}"
        verdict = "refuse"
    elif named or given.on_tissue < WARN_BELOW or (unexplained and placed.is_informative):
        message = f"section {spots.slide_id!r}: {'; '.join(remarks)}"
        verdict = "warn"
    else:
        message, verdict = "", "ok"
    better = (best, fit) if named and message else (None, None)
    return AlignmentReport(
        len(spots), inside, given.on_tissue, verdict, message, given.explained, better[0], better[1]
    )


def _evidence(spots: Spots, inside: float, given: Fit) -> str:
    return (
        f"{given.on_tissue:.0%} of {len(spots)} spots lie on tissue and {inside:.0%} on the slide, and the stain "
        f"explains {given.explained:.0%} of their counts"
    )


def _better(best: Placement, fit: Fit, doubt: str, mpp: float, size_um: tuple[float, float]) -> str:
    size_px = (size_um[0] / mpp, size_um[1] / mpp)
    return (
        f"{best.describe(mpp)}, (x, y) -> {best.formula(mpp, size_px)} in pixels, would put {fit.on_tissue:.0%} on "
        f"tissue and explain {fit.explained:.0%}{doubt}"
    )


def _crowd(spots: Spots) -> str:
    extent = np.ptp(spots.xy_um, axis=0)
    if extent.max() < ARRAY_DIAMETERS * spots.diameter_um:
        return (
            "all lie within the width of two spots, as array rows and columns would; give positions in pixels"
        )
    return "they fill a corner of the slide, as pixels of a smaller picture would"


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
