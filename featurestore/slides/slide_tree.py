"""All slides below a folder, as rows of a sample sheet: ids that are unique and stay, and what each file says of itself.

Each slide is opened for its size and scale; no pixel is read, and neither its label nor its overview picture.
"""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import openslide

from featurestore.errors import FeatureStoreError, MppError, SampleSheetError, first_line
from featurestore.events import OnProgress, Progress, ignore_progress
from featurestore.names import RESERVED
from featurestore.slides.open_slide import open_slide
from featurestore.slides.pyramid_slide import PyramidSlide
from featurestore.slides.sample_sheet import absolute, name_slide, read_samples
from featurestore.slides.sheet_listing import SheetListing
from featurestore.slides.slide_folder import PICTURES, is_other_folder, one_per_series
from featurestore.slides.slide_reader import is_folder_slide, is_slide_file

OPENED_AT_ONCE = 8
"""Opening is waiting: on a file server for the headers of slides of several GB."""


def list_tree(
    folder: Path, sheet: Path | None = None, on_progress: OnProgress = ignore_progress
) -> SheetListing:
    """List the slides of a folder and all folders below it.

    Parameters
    ----------
    sheet
        An earlier sample sheet, if there is one: slides that it names keep their ids, so that what was added meanwhile does
        not rename them.

    Returns
    -------
    SheetListing
        A slide without a scale has a row, whose `known` says so; one that cannot be opened is left out by name.

    Raises
    ------
    SampleSheetError
        If there is no such folder, or no slide in it.
    """
    if not folder.is_dir():
        raise SampleSheetError(f"{folder} is no folder; give the one that the slides are in")
    files = _find(folder)
    if not files:
        raise SampleSheetError(f"{folder} and the folders below it hold no slides that can be read")
    ids = unique_ids([file.relative_to(folder) for file in files], _earlier_ids(folder, files, sheet))
    rows, left_out = [], []
    with ThreadPoolExecutor(OPENED_AT_ONCE) as pool:
        for number, (file, slide_id, found) in enumerate(
            zip(files, ids, pool.map(_describe, files), strict=True), start=1
        ):
            on_progress(Progress(number, len(files), "open"))
            if isinstance(found, str):
                rows.append({"slide_id": slide_id, "slide": absolute(file), "known": found})
            else:
                left_out.append(f"{file.relative_to(folder)}: {first_line(found)}")
    if not rows:
        raise SampleSheetError(f"no slide of {folder} can be opened: {'; '.join(left_out[:3])}")
    return SheetListing(tuple(rows), tuple(left_out))


def _find(folder: Path) -> list[Path]:
    """Return all slides below a folder, sorted by path; pictures only where there is nothing else."""
    slides: list[Path] = []
    pictures: list[Path] = []
    for place, below, names in os.walk(
        folder
    ):  # links to folders are not followed: they may lead in a circle
        here = Path(place)
        zarrs = [name for name in below if is_folder_slide(name)]
        slides += [here / name for name in zarrs if not is_other_folder(here / name)]
        # Hidden folders hold thumbnails and versions of others; what lies inside a Zarr is part of it.
        below[:] = sorted(name for name in below if name not in zarrs and not name.startswith("."))
        found = [here / name for name in names if not name.startswith(".") and is_slide_file(here / name)]
        for file in found:
            (pictures if file.suffix.lower() in PICTURES else slides).append(file)
    return one_per_series(sorted(slides or pictures))


def _earlier_ids(folder: Path, files: Sequence[Path], sheet: Path | None) -> dict[Path, str]:
    """Return the ids that an earlier sheet gives to these files, by their paths below the folder."""
    if sheet is None or not sheet.is_file():
        return {}
    try:
        rows = read_samples(sheet)
    except FeatureStoreError:  # it is some other table: whether it may be replaced is decided by the caller
        return {}
    named = {row.slide: row.slide_id for row in rows}
    return {file.relative_to(folder): named[path] for file in files if (path := absolute(file)) in named}


def unique_ids(paths: Sequence[Path], earlier: Mapping[Path, str] | None = None) -> list[str]:
    """Return an id for each path: its name without suffix, with as many folders before it as it takes to be unique.

    Parameters
    ----------
    paths
        Relative to one folder.
    earlier
        Path -> id that it keeps.
    """
    ids = dict(earlier or {})
    # Without regard to case: a store is a folder, and on some file systems `A` and `a` are one.
    taken = {slide_id.casefold() for slide_id in ids.values()}
    waiting = [path for path in paths if path not in ids]
    for depth in range(1, 2 + max((len(path.parts) for path in waiting), default=0)):
        groups: dict[str, list[Path]] = defaultdict(list)
        for path in waiting:
            groups[_candidate(path, depth).casefold()].append(path)
        for name, members in groups.items():
            if len(members) == 1 and name not in taken and name not in RESERVED:
                ids[members[0]] = _candidate(members[0], depth)
        taken |= {ids[path].casefold() for path in waiting if path in ids}
        waiting = [path for path in waiting if path not in ids]
    for path in waiting:  # paths that differ only in signs that a store's names do not have
        digest = sha256(os.fsencode(path)).hexdigest()[:8]
        ids[path] = f"{_candidate(path, 1)}-{digest}"
    return [ids[path] for path in paths]


def _candidate(path: Path, depth: int) -> str:
    """Return the id of a path with `depth` - 1 folders before it; beyond its folders, with its suffix."""
    is_whole = depth > len(path.parts)
    folders = path.parts[:-1] if is_whole else path.parts[len(path.parts) - depth : -1]
    return name_slide("-".join((*folders, path.name if is_whole else path.stem)))


def _describe(file: Path) -> str | FeatureStoreError:
    """Return what a slide says of itself, for the column `known`; or why it cannot be opened."""
    try:
        try:
            slide = open_slide(file)
        except MppError as error:
            slide = open_slide(file, 1.0)  # its size can be had without its scale
            # "PATH claims 352.9 microns per pixel, outside ...": the path stands in the sheet already.
            claimed = first_line(error).rpartition(" claims ")[2].partition(",")[0]
            scale = (
                f"no usable mpp (the file claims {claimed}): fill in the column mpp"
                if "outside" in str(error)
                else "no mpp: fill in the column mpp"
            )
        else:
            stated = slide.stated_mpp if isinstance(slide, PyramidSlide) else None
            scale = f"{stated or slide.mpp:.4g} um/px"
        size = "{} x {} px".format(*slide.size_px)
        slide.close()
    except FeatureStoreError as error:
        return error
    return ", ".join((scale, size, _vendor(file)))


def _vendor(file: Path) -> str:
    """Return the maker of a slide's format as OpenSlide names it, or the kind of file."""
    if file.is_file():
        try:
            vendor = openslide.OpenSlide.detect_format(str(file))
        except openslide.OpenSlideError:
            vendor = None
        if vendor:
            return str(vendor)
    return file.suffix.lstrip(".").lower()
