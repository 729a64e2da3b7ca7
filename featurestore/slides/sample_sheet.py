"""Which slides a run is about: from one file, a folder, or a sample sheet.

A sample sheet is a CSV with a header; columns ``slide_id, slide, expression, mpp, donor``, all but `slide`
optional. Paths are relative to the sheet. No slide is opened here: one that cannot be is reported when its turn comes.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import polars as pl

from featurestore.errors import SampleSheetError, first_line
from featurestore.location import strip_credentials
from featurestore.names import slug
from featurestore.slides.slide_reader import is_folder_slide, is_slide_file, slide_suffixes

COLUMNS = ("slide_id", "slide", "expression", "mpp", "donor")


@dataclass(frozen=True)
class Sample:
    """One row of a sample sheet.

    Parameters
    ----------
    slide_id
        Name in the store; by default the file's stem.
    slide
        Absolute path, or a URL.
    expression
        A folder or file in any layout that `histosge` reads; None if there is none.
    mpp
        Microns per pixel at level 0, overriding the file's; None to take the file's.
    donor
        Whose tissue; by default the slide's own id.
    """

    slide_id: str
    slide: str
    expression: str | None = None
    mpp: float | None = None
    donor: str = ""


def read_samples(samples: str | os.PathLike[str], slide_mpp: float | None = None) -> list[Sample]:
    """Read a slide file, a folder of slides, or a sample sheet.

    Parameters
    ----------
    samples
        A path; ``.csv`` means a sample sheet.
    slide_mpp
        For slides that have no mpp in the sheet; the sheet's own value wins.

    Raises
    ------
    SampleSheetError
        If nothing is there, or a sheet has unknown columns, missing files or repeated slides.
    """
    samples = os.fspath(samples)
    path = Path(samples)
    if path.suffix.lower() == ".csv":
        rows = _read_sheet(path, slide_mpp)
    elif "://" in samples or (path.is_dir() and is_folder_slide(samples)):
        name = Path(strip_credentials(samples)).stem
        rows = [_sample(name, samples if "://" in samples else str(path.resolve()), mpp=slide_mpp)]
    elif path.is_dir():
        files = sorted(f for f in path.iterdir() if is_slide_file(f) or is_folder_slide(f.name))
        if not files:
            known = " ".join(slide_suffixes())
            raise SampleSheetError(f"{samples} is a folder without slides; known suffixes: {known}")
        rows = [_sample(f.stem, str(f.resolve()), mpp=slide_mpp) for f in files]
    elif path.is_file():
        rows = [_sample(path.stem, str(path.resolve()), mpp=slide_mpp)]
    else:
        raise SampleSheetError(f"there is no slide, folder or sample sheet at {samples}")
    _refuse_repeated(rows, samples)
    return rows


def _sample(
    slide_id: str,
    slide: str,
    expression: str | None = None,
    mpp: float | None = None,
    donor: str | None = None,
) -> Sample:
    # A store keeps names that begin with an underscore for itself (`_failures`).
    name = slug(slide_id).lstrip("_") or "slide"
    return Sample(name, slide, expression, mpp, donor or name)


def _refuse_repeated(rows: Sequence[Sample], samples: str) -> None:
    # One store folder a slide_id: a second slide would be refused later, after hours of work on the first.
    seen: dict[str, str] = {}
    for row in rows:
        if row.slide_id in seen:
            raise SampleSheetError(
                f"{samples} names slide_id {row.slide_id!r} twice ({Path(seen[row.slide_id]).name} and "
                f"{Path(row.slide).name}); give each slide its own slide_id"
            )
        seen[row.slide_id] = row.slide


def _read_sheet(path: Path, slide_mpp: float | None) -> list[Sample]:
    if not path.is_file():
        raise SampleSheetError(f"there is no sample sheet at {path}")
    try:
        frame = pl.read_csv(path, infer_schema=False)  # or a slide_id of 007 would become 7
    except pl.exceptions.PolarsError as error:
        raise SampleSheetError(f"{path} is no CSV with a header: {first_line(error)}") from error
    # Sheets written by hand have spaces after the commas.
    frame = frame.rename({name: name.strip() for name in frame.columns})
    for name in frame.columns:
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COLUMNS)}"
            raise SampleSheetError(f"{path} has an unknown column {name!r}: {hint}")
    if "slide" not in frame.columns:
        raise SampleSheetError(f"{path} has no column 'slide'; it needs one with the path of each slide")
    if frame.is_empty():
        raise SampleSheetError(f"{path} has a header but no rows; add one row per slide")
    return [
        _row(path, number, row, slide_mpp) for number, row in enumerate(frame.iter_rows(named=True), start=2)
    ]


def _row(sheet: Path, line: int, row: dict[str, str | None], slide_mpp: float | None) -> Sample:
    values = {name: (value or "").strip() for name, value in row.items()}
    if not values["slide"]:
        raise SampleSheetError(f"{sheet}, line {line}: the slide's path is empty")
    slide = _resolve(sheet, line, "slide", values["slide"])
    expression = values.get("expression")
    mpp = values.get("mpp")
    try:
        own_mpp = float(mpp) if mpp else slide_mpp
    except ValueError as error:
        raise SampleSheetError(
            f"{sheet}, line {line}: mpp {mpp!r} is no number; write it like 0.5"
        ) from error
    return _sample(
        values.get("slide_id") or Path(values["slide"]).stem,
        slide,
        _resolve(sheet, line, "expression", expression) if expression else None,
        own_mpp,
        values.get("donor"),
    )


def _resolve(sheet: Path, line: int, column: str, value: str) -> str:
    if "://" in value:
        return value
    # Absolute from here on: workers on a cluster have other working directories.
    path = (sheet.parent / value).resolve()
    if not path.exists():
        raise SampleSheetError(
            f"{sheet}, line {line}: {column} {value!r} does not exist (paths are relative to the sheet)"
        )
    return str(path)
