"""Make a synthetic section, or a cohort of them, on disk: slide, spots, truth.

Making it twice is free: the spec stands beside the files, and files of the same spec are used again.
"""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from histosge.synthetic.anatomy import make_anatomy
from histosge.synthetic.programme import make_programme, make_truth
from histosge.synthetic.render import draw_strips, make_scene
from histosge.synthetic.slide_file import write_slide
from histosge.synthetic.spec import SyntheticSpec
from histosge.synthetic.spots import measure, write_h5ad
from histosge.synthetic.truth import save_truth

VERSION = 1
"""Raised whenever the same spec gives another section."""


@dataclass(frozen=True)
class SyntheticSection:
    """One synthetic section on disk.

    Parameters
    ----------
    slide_id
        Stem of its files.
    slide, expression, truth
        The TIFF, the ``.h5ad`` with spots, and the ``.npz`` for `load_truth`.
    families
        Family -> gene names.
    """

    slide_id: str
    slide: Path
    expression: Path
    truth: Path
    families: dict[str, tuple[str, ...]]


def make_section(
    out_dir: str | Path, spec: SyntheticSpec | None = None, slide_id: str = "demo"
) -> SyntheticSection:
    """Make a section, or take the one that is there if it was made from the same spec.

    Parameters
    ----------
    out_dir
        Gets ``<slide_id>.tif``, ``.h5ad``, ``.truth.npz`` and ``.spec.json``; made if absent.
    spec
        None means the default, about 4 x 4 mm with about 1,200 spots.
    """
    spec = spec or SyntheticSpec()
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    section = SyntheticSection(
        slide_id,
        folder / f"{slide_id}.tif",
        folder / f"{slide_id}.h5ad",
        folder / f"{slide_id}.truth.npz",
        make_programme(spec).families,
    )
    written = folder / f"{slide_id}.spec.json"
    wanted = json.dumps({"version": VERSION, **spec.to_json()}, indent=1)
    parts = (section.slide, section.expression, section.truth)
    if written.is_file() and written.read_text() == wanted and all(part.is_file() for part in parts):
        return section
    # The spec is removed first and written last: files without it are of an interrupted run.
    written.unlink(missing_ok=True)
    _make(section, spec)
    written.write_text(wanted)
    return section


def _make(section: SyntheticSection, spec: SyntheticSpec) -> None:
    anatomy = make_anatomy(spec)
    truth = make_truth(spec, anatomy)
    _whole(section.truth, lambda path: save_truth(path, truth))
    measured = measure(spec, truth)
    _whole(section.expression, lambda path: write_h5ad(path, measured, truth, spec, section.slide_id))
    scene = make_scene(spec, anatomy)
    _whole(section.slide, lambda path: write_slide(path, draw_strips(scene), spec.size_px, spec.mpp))


def _whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the file, then rename: a reader never sees half of it."""
    beside = path.with_name(f"partial-{path.name}")
    write(beside)
    beside.replace(path)


def make_cohort(out_dir: str | Path, spec: SyntheticSpec, n: int) -> Path:
    """Make sections that share a gene programme, each with its own anatomy and staining.

    Section ``i`` has the seed ``spec.seed + i``; two consecutive sections share a donor.

    Returns
    -------
    pathlib.Path
        The sample sheet, ``cohort.csv``; its paths are relative to it.
    """
    folder = Path(out_dir)
    sections = [
        make_section(folder, replace(spec, seed=spec.seed + i), slide_id=f"section{i + 1}") for i in range(n)
    ]
    sheet = folder / "cohort.csv"
    with sheet.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "slide", "expression", "mpp", "donor"])
        for i, section in enumerate(sections):
            names = (section.slide.name, section.expression.name)
            writer.writerow([section.slide_id, *names, spec.mpp, f"donor{i // 2 + 1}"])
    return sheet
