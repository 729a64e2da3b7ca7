"""Mask and annotation files by path or URL: which formats there are, and which file of a folder belongs to a slide."""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from featurestore.credentials import strip_credentials
from featurestore.errors import MaskError
from featurestore.input_file import kind_of
from featurestore.location import Location
from featurestore.tissue.annotation import Annotation
from featurestore.tissue.label_picture import read_picture
from featurestore.tissue.outlines import read_outlines

OUTLINES = (".geojson", ".json")
PICTURES = (".png", ".tif", ".tiff")
ENDINGS = ("", "_contours", "_mask", "-mask")
"""What may stand between a slide's id and the suffix: HEST writes ``ID_contours.geojson``, other tools ``ID_mask.png``."""
FOLDERS = ("contours_geojson", "tissue_seg")
"""Folders in which TRIDENT and HEST keep contours: whoever names the folder above means them."""
_PICKLES = (".pkl", ".pickle", ".p")
_HDF5 = (".h5", ".hdf5")
_HEAD = 1 << 10


@dataclass(frozen=True)
class AnnotationFile:
    """A mask or annotation file, opened.

    Parameters
    ----------
    annotation
        Its content.
    label
        Path or URL, without credentials.
    fingerprint
        sha256 of the whole file.
    """

    annotation: Annotation
    label: str
    fingerprint: str


def read_annotation(file: str, overview_px: tuple[int, int] | None = None) -> AnnotationFile:
    """Read a mask or annotation file.

    Parameters
    ----------
    file
        A path or URL. Its content decides what it is, but what would have to be unpickled is refused by name.
    overview_px
        ``(width, height)`` of the overview that it will be drawn on: of a TIFF with levels a coarse one is enough.

    Raises
    ------
    MaskError
        If it is not there, or cannot be used.
    """
    label = strip_credentials(file)
    _refuse_by_name(label)
    if _is_remote(file):
        data = _read_remote(file, label)
        return AnnotationFile(
            _parse(data, data[:_HEAD], label, overview_px), label, hashlib.sha256(data).hexdigest()
        )
    path = _local(file, label)
    with path.open("rb") as stream:
        head = stream.read(_HEAD)
    # A picture may have gigabytes at its finest level, of which only a coarse one is read.
    data_or_path = str(path) if _suffix(label) in PICTURES else path.read_bytes()
    return AnnotationFile(_parse(data_or_path, head, label, overview_px), label, annotation_fingerprint(file))


def annotation_fingerprint(file: str) -> str:
    """Return the sha256 of a mask or annotation file, which is read whole.

    Raises
    ------
    MaskError
        If it is not there.
    """
    label = strip_credentials(file)
    if _is_remote(file):
        return hashlib.sha256(_read_remote(file, label)).hexdigest()
    with _local(file, label).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _refuse_by_name(label: str) -> None:
    if _suffix(label) in _PICKLES:
        raise MaskError(
            f"{label} is a pickle, which can run code when it is read, so it is not opened; write its contours as GeoJSON "
            "(see the guide on masks)"
        )
    if _suffix(label) in _HDF5:
        raise MaskError(
            f"{label} holds patch coordinates, not an area of tissue; give the contours as GeoJSON, or a PNG mask"
        )


def _suffix(label: str) -> str:
    return Path(label.partition("?")[0]).suffix.lower()


def _is_remote(file: str) -> bool:
    return "://" in file and not file.startswith("file://")


def _local(file: str, label: str) -> Path:
    path = Path(file.removeprefix("file://"))
    if kind_of(path) != "file":
        raise MaskError(f"there is no mask at {label}; correct the path")
    return path


def _read_remote(url: str, label: str) -> bytes:
    folder, _, name = url.rpartition("/")
    try:
        return Location(folder).read_bytes(name)
    except FileNotFoundError as error:
        raise MaskError(f"there is no mask at {label}; correct the URL") from error


def _parse(data: bytes | str, head: bytes, label: str, overview_px: tuple[int, int] | None) -> Annotation:
    # By content: GeoJSON is text that begins with a bracket, perhaps after a byte order mark.
    if isinstance(data, bytes) and head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"{", b"["):
        return read_outlines(data, label)
    if _suffix(label) in PICTURES:
        return read_picture(data, head, label, overview_px)
    raise MaskError(f"{label} is no mask that can be read; give PNG, TIFF or GeoJSON")


def masks_by_slide(folder: str, slide_ids: Iterable[str], option: str = "--mask") -> dict[str, str]:
    """Return the mask file of each slide that a folder has one for; two listings at most, whatever the number of slides.

    Parameters
    ----------
    folder
        A folder or URL whose files are named by slide id, or TRIDENT's or HEST's folder above them.
    option
        How the user gave it, for messages.

    Raises
    ------
    MaskError
        If there is no such folder, it holds no file of a known kind, or two for one slide.
    """
    place = Location(folder)
    if place.is_local and kind_of(folder.removeprefix("file://")) != "folder":
        raise MaskError(
            f"{option} {place.label} is no folder; give one with a file for each slide, named by its id"
        )
    below = place.folders()
    inner = next((name for name in FOLDERS if name in below), None)
    files = place.files() if inner is None else place.files(inner)
    base = folder.rstrip("/") + (f"/{inner}" if inner else "")
    found: dict[str, list[str]] = {}
    for name in files:
        stem, dot, suffix = name.rpartition(".")
        if f"{dot}{suffix}".lower() in (*OUTLINES, *PICTURES):
            found.setdefault(stem, []).append(name)
    if not found:
        raise MaskError(
            f"{option} {place.label} holds no masks; it needs a file for each slide, named by its id: PNG, TIFF or GeoJSON"
        )
    masks = {}
    for slide_id in slide_ids:
        names = [name for ending in ENDINGS for name in found.get(f"{slide_id}{ending}", [])]
        if len(names) > 1:
            raise MaskError(
                f"{option} {place.label} holds {len(names)} masks of slide {slide_id!r}: {', '.join(names)}; keep one "
                "of them"
            )
        if names:
            masks[slide_id] = f"{base}/{names[0]}"
    return masks
