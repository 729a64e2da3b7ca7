"""The slides of a folder: which of its entries are slides, and which were left out and why."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

from featurestore.errors import SampleSheetError, SlideWarning
from featurestore.slides.slide_reader import is_folder_slide, is_slide_file

NOT_SLIDES = (
    *(
        ".csv",
        ".tsv",
        ".txt",
        ".md",
        ".json",
        ".xml",
        ".html",
        ".pdf",
        ".xlsx",
        ".log",
        ".yaml",
        ".yml",
        ".md5",
    ),
    *(
        ".sha256",
        ".geojson",
        ".h5ad",
        ".h5",
        ".parquet",
        ".gz",
        ".zip",
        ".tar",
        ".py",
        ".r",
        ".ipynb",
        ".db",
        ".ini",
    ),
)
"""Suffixes of what lies beside slides and is none: left out in silence."""
PICTURES = (".png", ".jpg", ".jpeg")
"""In a folder beside or below slides these are previews, masks and plots."""
NAMED = 5
"""Files that a warning names."""
_HEADER_BYTES = 1 << 16
_SERIES_TAG = b"\x20\x00\x0e\x00"


def list_slides(folder: Path) -> list[Path]:
    """Return a folder's slides, sorted by name; a DICOM series of several files is the largest of them.

    Hidden entries are no slides: macOS writes a ``._`` file beside each file on a foreign disk. In a folder without slides,
    the slides are those of its folders, if each holds one.

    Raises
    ------
    SampleSheetError
        If a folder without slides has a folder with several.
    """
    slides: list[Path] = []
    unknown: list[Path] = []
    broken: list[Path] = []
    others: list[Path] = []
    folders: list[Path] = []
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and not entry.exists():
            broken.append(entry)
        elif entry.is_dir():
            if is_folder_slide(entry.name):
                if _is_store(entry):
                    continue
                (others if _is_other_zarr(entry) else slides).append(entry)
            else:
                folders.append(entry)
        elif is_slide_file(entry):
            slides.append(entry)
        elif entry.suffix.lower() not in NOT_SLIDES:
            unknown.append(entry)
    _warn(folder, broken, "links to files that are not there")
    _warn(folder, unknown, "files that no reader knows by their suffix (a sample sheet can name them)")
    _warn(folder, others, "Zarr folders without an OME-Zarr image")
    below = {name: found for name in folders if (found := _slides_inside(name))}
    if slides:
        # MRXS and VMS keep the parts of a slide in a folder of its name.
        stems = {slide.stem for slide in slides}
        left_out = [name for name in below if name.name not in stems]
        _warn(folder, left_out, "folders with slides (a sample sheet can name them)")
        return one_per_series(slides)
    if any(len(found) > 1 for found in below.values()):
        names = ", ".join(name.name for name in list(below)[:NAMED])
        raise SampleSheetError(
            f"{folder} holds no slides, and several in one of its folders ({names}): give one of them, or a sample sheet"
        )
    # One folder a file, as the Genomic Data Commons' client writes them.
    return [slide for found in below.values() for slide in found]


def _slides_inside(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # a folder that may not be entered
        return []
    named = [entry for entry in entries if not entry.name.startswith(".")]
    return one_per_series([e for e in named if e.suffix.lower() not in PICTURES and is_slide_file(e)])


def _warn(folder: Path, entries: Sequence[Path], what: str) -> None:
    if entries:
        names = ", ".join(entry.name for entry in entries[:NAMED])
        more = f" and {len(entries) - NAMED} more" if len(entries) > NAMED else ""
        warnings.warn(f"left out of {folder}: {what}: {names}{more}", SlideWarning, stacklevel=3)


def _zarr_attributes(folder: Path) -> dict[str, object] | None:
    """Return a Zarr group's attributes; None if they cannot be read."""
    for name in ("zarr.json", ".zattrs"):
        try:
            found = json.loads((folder / name).read_bytes())
        except (OSError, ValueError, RecursionError):
            continue
        attributes = found.get("attributes", {}) if isinstance(found, dict) and name == "zarr.json" else found
        return attributes if isinstance(attributes, dict) else None
    return None


def _is_store(folder: Path) -> bool:
    """Whether a folder is a store of ours: embeddings or maps, written beside the slides."""
    spec = (_zarr_attributes(folder) or {}).get("spec")
    return isinstance(spec, str) and spec.startswith("histosge-")


def _is_other_zarr(folder: Path) -> bool:
    """Whether a folder is a Zarr group that holds no image: SpatialData, AnnData."""
    attributes = _zarr_attributes(folder)
    if attributes is None:
        return False
    image = attributes.get("ome", attributes)
    keys = ("multiscales", "bioformats2raw.layout")
    # A writer may leave out the attributes of the root; its first image is the group "0".
    return not (isinstance(image, dict) and any(key in image for key in keys)) and not (folder / "0").is_dir()


def is_other_folder(folder: Path) -> bool:
    """Whether a folder with the suffix of a slide is none: a store of ours, SpatialData, AnnData."""
    return _is_store(folder) or _is_other_zarr(folder)


def one_per_series(slides: list[Path]) -> list[Path]:
    """Return slides without those DICOM files that are a smaller part of a series of another one."""
    # OpenSlide finds the other files of a series, which hold its levels, label and overview, by itself.
    largest: dict[str, Path] = {}
    series = {path: _series(path) for path in slides if path.suffix.lower() == ".dcm"}
    for path, uid in series.items():
        if uid and (uid not in largest or path.stat().st_size > largest[uid].stat().st_size):
            largest[uid] = path
    return [path for path in slides if not series.get(path) or largest[series[path]] == path]


def _series(path: Path) -> str:
    """Return the SeriesInstanceUID of a DICOM file; empty if it is not found."""
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER_BYTES)
    except OSError:
        return ""
    at = header.find(_SERIES_TAG)
    if at < 0 or header[128:132] != b"DICM":
        return ""
    # Behind the tag stand two letters for its type and a length of two bytes, or a length of four.
    start = at + 8
    length = (
        int.from_bytes(header[at + 6 : start], "little")
        if header[at + 4 : at + 6] == b"UI"
        else header[at + 4]
    )
    return header[start : start + length].rstrip(b"\0 ").decode("ascii", "replace")
