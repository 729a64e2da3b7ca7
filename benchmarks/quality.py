"""How well the quality flags find pen marks, folds, bubbles, edges and patches out of focus, on painted slides.

python benchmarks/quality.py [--quick] [--json FILE]

Every slide is painted with one artefact or none, so what is wrong with each pixel is known. Slides are written as pyramids
of JPEG tiles, and read and surveyed as `embed` does. The patches are those that `embed` would encode. A patch has an
artefact if a tenth of it or more has it; patches with less are left out, unless they have none of it.

    auc_FLAG      area under the ROC curve: patches with the artefact against all without it, on all slides. The score is the
                  share of the patch that the overview shows as flagged; of blur, the ratio of finer to coarser contrast
    found_FLAG    share of the patches with the artefact that get the flag
    false_FLAG    share of the patches without it that get the flag, on all slides
    clean_flagged share of the patches of clean slides that get any flag

The thresholds were set on slides of other seeds.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from _artefacts import MPP, ArtefactSlide, paint, write_slide
from _common import Result, options, report
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from featurestore.blocks import Block
from featurestore.embedding.quality import judge_focus
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.patch_reader import read_batches
from featurestore.tissue.flags import NAMES, bits_of, has_any
from featurestore.tissue.focus import MIN_CONTRAST, contrasts
from featurestore.tissue.overview import read_overview
from featurestore.tissue.overview_flags import MIN_SHARE, overview_masks
from featurestore.tissue.survey import patch_means, survey
from featurestore.tissue.threshold import is_tissue

SPEC = GridSpec(mpp=MPP, patch_px=128, stride_px=128)
SEEDS = range(1000, 1006)
"""Not 0 to 14, on which the thresholds were set."""
HAS_IT = MIN_SHARE
"""Share of a patch from which on it has an artefact: that from which on `embed` flags it."""
KINDS = ((), *((name,) for name in NAMES))
AUC = ">= 0.9"


@dataclass(frozen=True)
class Patches:
    """The patches of one slide that `embed` would encode, ``(n,)`` each.

    Parameters
    ----------
    artefact
        What was painted; empty for a clean slide.
    quality
        Their flags.
    scores
        Name of a flag -> what it is decided by.
    truth
        Name of a flag -> share of the patch that has it.
    """

    artefact: str
    quality: NDArray[np.uint8]
    scores: dict[str, NDArray[np.float64]]
    truth: dict[str, NDArray[np.float64]]


def main() -> None:
    """Paint, flag, compare and print."""
    asked = options(__doc__)
    # Quick slides are as small as edges and bubbles fit into.
    seeds, size_px = (SEEDS[:1], (2560, 2304)) if asked.quick else (SEEDS, (3584, 2560))
    report("quality", measure(seeds, size_px), asked)


def measure(seeds: Sequence[int], size_px: tuple[int, int]) -> list[Result]:
    """Return the figures of slides of some seeds and a size, ``(width, height)``."""
    with tempfile.TemporaryDirectory() as folder:
        slides = list(_slides(Path(folder), seeds, size_px))
    results = []
    for name, flag in NAMES.items():
        has_it, score, flagged = (np.concatenate(parts) for parts in zip(*_cases(slides, name), strict=True))
        flagged = has_any(flagged, flag)
        results += [
            Result(f"auc_{name}", float(roc_auc_score(has_it, score)), "", AUC),
            Result(f"found_{name}", float(flagged[has_it].mean())),
            Result(f"false_{name}", float(flagged[~has_it].mean())),
        ]
    clean = np.concatenate([slide.quality for slide in slides if not slide.artefact])
    results.append(Result("clean_flagged", float(has_any(clean, bits_of(NAMES)).mean())))
    results.append(Result("patches", float(sum(len(slide.quality) for slide in slides))))
    return results


def _slides(folder: Path, seeds: Sequence[int], size_px: tuple[int, int]) -> Iterator[Patches]:
    for seed in seeds:
        for number, artefacts in enumerate(KINDS):
            painted = paint(100 * seed + number, artefacts, size_px=size_px)
            yield flag(write_slide(folder / "slide.tif", painted), painted, "".join(artefacts))


def flag(path: Path, painted: ArtefactSlide, artefact: str) -> Patches:
    """Survey a slide as `embed` does, and return its tissue patches with flags, scores and truth."""
    slide = open_slide(path, None)
    try:
        grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, SPEC)
        found = survey(slide, grid)
        assert found.quality is not None
        tissue = is_tissue(found.tissue)
        masks, mpp = overview_masks((overview := read_overview(slide)).rgb, overview.mpp)
        scale = grid.effective_mpp / mpp
        scores = {
            name: patch_means(masks[bit].astype(float), grid, scale)[tissue]
            for name, bit in NAMES.items()
            if bit in masks
        }
        ratio = np.ones(grid.shape)
        for batch in read_batches(slide, grid, Block((0, 0), (0, grid.n_rows), (0, grid.n_cols)), tissue, 64):
            fine, coarse = contrasts(batch.pixels, grid.effective_mpp)
            decided = coarse >= MIN_CONTRAST**2  # others are never called blurred
            ratio[batch.rows, batch.cols] = np.where(decided, fine / np.maximum(coarse, 1.0), 1.0)
        scores["blur"] = -ratio[tissue]
        quality = found.quality | judge_focus(slide, grid, tissue)
    finally:
        slide.close()
    truth = {
        name: patch_means(mask.astype(float), grid, grid.effective_mpp / MPP)[tissue]
        for name, mask in painted.truth.items()
    }
    return Patches(artefact, quality[tissue], scores, truth)


def _cases(
    slides: Sequence[Patches], name: str
) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.uint8]]]:
    """Yield of each slide's decided patches whether they have an artefact, their score, and their flags."""
    for slide in slides:
        share = slide.truth[name]
        decided = (share >= HAS_IT) | (share == 0)
        yield share[decided] >= HAS_IT, slide.scores[name][decided], slide.quality[decided]


if __name__ == "__main__":
    main()
