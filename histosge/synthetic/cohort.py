"""Make synthetic sections, one or many: the slide, its spots, and the dense truth behind both.

Same spec, same arrays. What is made is not made again: a section whose truth was written from the same spec
is returned as it is.
"""

import csv
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from histosge.errors import ExpressionError
from histosge.synthetic.anatomy import draw_anatomy
from histosge.synthetic.cells import density, place_cells
from histosge.synthetic.donors import of_donor
from histosge.synthetic.painting import Painter
from histosge.synthetic.programme import rates
from histosge.synthetic.pyramid_tiff import TILE_PX, write_pyramid
from histosge.synthetic.spec import LATTICE_UM, SyntheticSpec
from histosge.synthetic.spots import depth_field, measure_spots, write_h5ad
from histosge.synthetic.truth import Truth, load_truth, read_spec, save_truth, truth_at

__all__ = [
    "SyntheticCohort",
    "SyntheticSection",
    "SyntheticSpec",
    "Truth",
    "load_truth",
    "make_cohort",
    "make_section",
    "truth_at",
]


@dataclass(frozen=True)
class SyntheticSection:
    """Where one synthetic section lies.

    Parameters
    ----------
    slide
        JPEG-tiled pyramidal TIFF.
    expression
        ``.h5ad`` with raw counts and ``obsm["spatial"]`` in level-0 pixels.
    truth
        What `load_truth` reads.
    families
        Family -> gene names: morphology, gradient, noise, housekeeping.
    """

    slide_id: str
    slide: Path
    expression: Path
    truth: Path
    families: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class SyntheticCohort:
    """Several sections of one gene programme, and the sample sheet that names them."""

    sheet: Path
    sections: tuple[SyntheticSection, ...]


def make_section(out_dir: str | Path, spec: SyntheticSpec, slide_id: str = "demo") -> SyntheticSection:
    """Make one section, unless it is there already.

    Parameters
    ----------
    out_dir
        Folder for ``<slide_id>.tif``, ``<slide_id>.h5ad`` and ``<slide_id>.truth.npz``; made if need be.
    """
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    slide, expression, truth_path = (folder / f"{slide_id}{end}" for end in (".tif", ".h5ad", ".truth.npz"))
    section = SyntheticSection(slide_id, slide, expression, truth_path, spec.genes.names())
    # The truth is written last: where it exists, the other two are complete.
    if slide.is_file() and expression.is_file() and read_spec(truth_path) == spec.to_json():
        return section
    truth_path.unlink(missing_ok=True)
    anatomy = draw_anatomy(spec)
    nuclei, glands = place_cells(spec, anatomy)
    nuclei_mm2 = density(nuclei, anatomy)
    painter = Painter(spec, anatomy, nuclei, glands)
    picture = write_pyramid(slide, painter.strips(TILE_PX), spec.size_px, spec.mpp)
    dense = np.full((spec.genes.total, *anatomy.label.shape), np.nan, np.float32)
    dense[:, anatomy.tissue] = rates(spec, anatomy, nuclei_mm2)
    y_um, x_um = ((np.arange(n) + 0.5) * LATTICE_UM for n in anatomy.label.shape)
    genes = tuple(gene for family in section.families.values() for gene in family)
    depth = depth_field(nuclei_mm2, anatomy.tissue, spec.median_counts)
    truth = Truth(dense, y_um, x_um, anatomy.label, genes, section.families, depth)
    write_h5ad(expression, measure_spots(spec, truth), truth, spec, (slide_id, picture))
    save_truth(truth_path, truth, spec.to_json())
    return section


def make_cohort(
    out_dir: str | Path,
    spec: SyntheticSpec,
    n: int,
    *,
    sections_per_donor: int = 1,
    donors_differ: bool = False,
) -> SyntheticCohort:
    """Make several sections of one gene programme, each with its own anatomy, staining and counts.

    Parameters
    ----------
    spec
        Of the first section; the others take the next seeds and the same `programme_seed`.
    n
        How many.
    sections_per_donor
        Neighbours in the sheet that share a donor.
    donors_differ
        Draw what a donor changes, see `histosge.synthetic.donors`; else donors are names only.

    Returns
    -------
    SyntheticCohort
        The sheet is ``cohort.csv`` in `out_dir`: slide_id, slide, expression, mpp, donor; paths relative to it.
    """
    if n < 1 or sections_per_donor < 1:
        raise ExpressionError(
            f"a cohort needs sections and donors, not {n} sections, {sections_per_donor} a donor"
        )
    folder = Path(out_dir)
    specs = [replace(spec, seed=spec.seed + i) for i in range(n)]
    numbers = [i // sections_per_donor for i in range(n)]
    if donors_differ:
        specs = [of_donor(each, number) for each, number in zip(specs, numbers, strict=True)]
    sections = tuple(make_section(folder, each, slide_id=f"S{i + 1}") for i, each in enumerate(specs))
    # Paths relative to the sheet, so that the folder can be moved.
    sheet = folder / "cohort.csv"
    with sheet.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("slide_id", "slide", "expression", "mpp", "donor"))
        for number, section in zip(numbers, sections, strict=True):
            row = (section.slide_id, section.slide.name, section.expression.name, spec.mpp, f"D{number + 1}")
            writer.writerow(row)
    return SyntheticCohort(sheet, sections)
