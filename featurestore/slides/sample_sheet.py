"""Which slides a run is about: from one file, a folder, or a sample sheet.

A sample sheet is a table with a header, separated by commas, semicolons or tabs; columns ``slide_id, slide, expression,
mpp, donor, mask, known``, all but `slide` optional. Paths are relative to the sheet. No slide is opened here: one that
cannot be is reported when its turn comes.
"""

import hashlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from featurestore.credentials import strip_credentials
from featurestore.errors import MppError, SampleSheetError
from featurestore.names import RESERVED, slug
from featurestore.slides.protocol import MPP_RANGE
from featurestore.slides.sheet_table import SHEETS, SPREADSHEETS, read_table
from featurestore.slides.slide_folder import list_slides
from featurestore.slides.slide_reader import is_folder_slide, slide_suffixes
from featurestore.slides.units import parse_number, unit_microns

KNOWN = "known"
"""Column of what `histosge samples` found out about a file. It is for readers: nothing is decided by it."""
COLUMNS = ("slide_id", "slide", "expression", "mpp", "donor", "mask", KNOWN)
MISSING = ("", "na", "n/a", "nan", "none", "null", "-", "#n/a")
"""How tables write that there is no value, in lower case."""
MAX_ID = 180
"""Letters of a slide id that are kept: file systems allow names of 255 bytes, and failures add to it."""
_MPP = re.compile(r"([^A-Za-zÅµμ/]+)(.*)")


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
        A folder or file in any layout that `histosge` reads, with ``#NAME`` behind it for one section of several;
        None if there is none.
    mpp
        Microns per pixel at level 0, overriding the file's; None to take the file's.
    donor
        Whose tissue; by default the slide's own id.
    fallback_mpp
        Microns per pixel at level 0 if neither `mpp` nor the file gives them.
    mask
        A mask or annotation file: PNG, TIFF or GeoJSON; None if there is none.
    is_named
        Whether the sheet gives the id; otherwise it is made from the file's name.
    is_private
        Whether the names of its files may not stand in the store.
    """

    slide_id: str
    slide: str
    expression: str | None = None
    mpp: float | None = None
    donor: str = ""
    fallback_mpp: float | None = None
    mask: str | None = None
    is_named: bool = False
    is_private: bool = False


def read_samples(samples: str | os.PathLike[str], slide_mpp: float | None = None) -> list[Sample]:
    """Read a slide file, a folder of slides, or a sample sheet.

    What a folder holds that looks like a slide and is left out is named in a `SlideWarning`.

    Parameters
    ----------
    samples
        A path; ``.csv``, ``.tsv`` and ``.txt`` mean a sample sheet.
    slide_mpp
        For slides that state no mpp, neither in the sheet nor in their file.

    Raises
    ------
    SampleSheetError
        If nothing is there, or a sheet has unknown columns, missing files or repeated slides.
    MppError
        If `slide_mpp` is absurd.
    """
    if slide_mpp is not None and not MPP_RANGE[0] <= slide_mpp <= MPP_RANGE[1]:
        raise MppError(
            f"--slide-mpp {slide_mpp:.4g} is outside {MPP_RANGE[0]}..{MPP_RANGE[1]} microns per pixel"
        )
    samples = os.fspath(samples)
    path = Path(samples)
    if path.suffix.lower() in (*SHEETS, *SPREADSHEETS) and "://" not in samples:
        rows = _read_sheet(path, slide_mpp)
    elif "://" in samples or (path.is_dir() and is_folder_slide(samples)):
        rows = [
            _sample(_stem(samples), samples if "://" in samples else absolute(path), fallback_mpp=slide_mpp)
        ]
    elif path.is_dir():
        files = list_slides(path)
        if not files:
            known = " ".join(slide_suffixes())
            raise SampleSheetError(f"{samples} is a folder without slides; known suffixes: {known}")
        rows = [_sample(name, absolute(f), fallback_mpp=slide_mpp) for name, f in _names(files, path)]
    elif path.is_file():
        rows = [_sample(path.stem, absolute(path), fallback_mpp=slide_mpp)]
    else:
        raise SampleSheetError(f"there is no slide, folder or sample sheet at {samples}")
    _refuse_repeated(rows, samples)
    return rows


def absolute(path: Path) -> str:
    """Return a path that is valid in any working directory; a link is followed if its target has the same suffix.

    Content stores keep files under their hash, and the suffix, which readers go by, is on the link alone. Slides of
    several files have the others beside the target.
    """
    target = path.resolve()
    return str(target) if target.suffix.lower() == path.suffix.lower() else os.path.abspath(path)  # noqa: PTH100


def name_slide(name: str) -> str:
    """Return a name for the store that no other name has.

    Letters of other alphabets cannot stand in a store's path. They are left out, and a hash of the whole name tells
    two such names apart.
    """
    # The same name, typed on a Mac and elsewhere, has its accents apart or not.
    name = unicodedata.normalize("NFC", name)
    # A store keeps names that begin with an underscore for itself (`_failures`).
    plain = slug(name).lstrip("_") or "slide"
    if name.isascii() and len(plain) <= MAX_ID:
        return plain
    letters = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    kept = slug(letters)[:MAX_ID].strip("_-") or "slide"
    return f"{kept}-{hashlib.sha256(name.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _names(files: Sequence[Path], folder: Path) -> list[tuple[str, Path]]:
    """Name each slide of a folder by its file; of slides in folders of their own that share a name, by both."""
    times = Counter(file.stem for file in files)
    return [
        (
            file.stem
            if file.parent == folder or times[file.stem] == 1
            else f"{file.parent.name}-{file.stem}",
            file,
        )
        for file in files
    ]


def _stem(slide: str) -> str:
    return Path(strip_credentials(slide)).stem


def _sample(
    slide_id: str,
    slide: str,
    expression: str | None = None,
    mpp: float | None = None,
    donor: str | None = None,
    fallback_mpp: float | None = None,
    mask: str | None = None,
) -> Sample:
    name = name_slide(slide_id)
    if name in RESERVED:
        raise SampleSheetError(f"slide_id {name!r} cannot name a folder of a store; give the slide another")
    return Sample(name, slide, expression, mpp, donor or name, fallback_mpp, mask)


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
    names, rows = read_table(path, COLUMNS)
    for name in names:
        if not name:
            raise SampleSheetError(
                f"{path} has a column without a name; write it without row numbers (index=False)"
            )
        if name not in COLUMNS:
            near = get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(COLUMNS)}"
            raise SampleSheetError(f"{path} has an unknown column {name!r}: {hint}")
    if "slide" not in names:
        raise SampleSheetError(f"{path} has no column 'slide'; it needs one with the path of each slide")
    if not rows:
        raise SampleSheetError(f"{path} has a header but no rows; add one row per slide")
    samples = []
    for line, values in rows:
        try:
            samples.append(_row(values, path.parent, slide_mpp))
        except SampleSheetError as error:
            raise SampleSheetError(f"{path}, line {line}: {error}") from error
    return samples


def _row(values: dict[str, str], folder: Path, slide_mpp: float | None) -> Sample:
    if not values["slide"]:
        raise SampleSheetError("the slide's path is empty")
    # Tables that pandas wrote hold "nan" where nothing stood. Of paths only an empty one is none.
    slide_id, mpp, donor, expression, mask = (
        values.get(name, "") for name in ("slide_id", "mpp", "donor", "expression", "mask")
    )
    is_named = slide_id.lower() not in MISSING
    row = _sample(
        slide_id if is_named else _stem(values["slide"]),
        _resolve(folder, "slide", values["slide"]),
        _resolve(folder, "expression", expression) if expression.lower() not in MISSING else None,
        _parse_mpp(mpp) if mpp.lower() not in MISSING else None,
        donor if donor.lower() not in MISSING else None,
        slide_mpp,
        _resolve(folder, "mask", mask) if mask.lower() not in MISSING else None,
    )
    return replace(row, is_named=is_named)


def _parse_mpp(text: str) -> float:
    """Return the mpp of a cell: ``0.5``, ``0,5``, ``0.5 um`` or ``500 nm/px``."""
    parts = _MPP.fullmatch(text)
    number = parse_number(parts[1]) if parts else None
    unit = re.sub(r"/(px|pixel)$", "", parts[2].strip()) if parts else ""
    per_unit = unit_microns(unit) if unit else 1.0
    if number is None or per_unit is None:
        raise SampleSheetError(f"mpp {text!r} is no number; write it like 0.5")
    return number * per_unit


def _resolve(folder: Path, column: str, value: str) -> str:
    if "://" in value:
        return value
    # Absolute from here on: workers on a cluster have other working directories.
    path = folder / value
    try:
        exists = path.exists()
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    file, mark, section = value.rpartition("#")
    if not exists and mark and column == "expression":
        # One section of a file with several; which of them there are is known to the file's reader.
        return f"{_resolve(folder, column, file)}#{section}"
    if not exists:
        raise SampleSheetError(f"{column} {value[:200]!r} does not exist (paths are relative to the sheet)")
    return absolute(path)
