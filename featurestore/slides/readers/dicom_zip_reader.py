"""A DICOM series in a zip file, as archives hand slides out: unpacked once, beside the slides that were downloaded.

A zip may come from anybody. No name in it becomes a path, what it claims to hold is compared with the cache's size and
the free disk before anything is written, and bytes are copied a piece at a time.
"""

import hashlib
import shutil
import stat
import zipfile
import zlib
from functools import partial
from pathlib import Path, PurePosixPath

from featurestore.errors import MppError, SlideError
from featurestore.slides.download_cache import (
    COPY_BYTES,
    FOLDER_SUFFIX,
    cache_bytes,
    cache_folder,
    keep_folder,
)
from featurestore.slides.protocol import Slide
from featurestore.slides.readers.openslide_reader import OpenSlideSlide
from featurestore.slides.slide_folder import one_per_series
from featurestore.slides.slide_reader import Recognition, SlideReader

DICOM = ".dcm"
MAX_ENTRIES = 10_000
"""Files in one zip. A series has one or some per level; where each frame is a file, it is no slide that OpenSlide reads."""
# What zipfile raises for archives that are damaged, locked, or packed in a way that it does not know.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    EOFError,
    UnicodeError,
    ValueError,
    zlib.error,
)


def _open(path: str, mpp: float | None) -> Slide:
    status = Path(path).stat()
    version = f"{path}\n{status.st_size}\n{status.st_mtime_ns}\n{status.st_ino}"
    name = f"{hashlib.sha256(version.encode(errors='surrogateescape')).hexdigest()[:24]}{FOLDER_SUFFIX}"
    folder = keep_folder(name, partial(_unpack, path))
    series = one_per_series(sorted(folder.glob(f"*{DICOM}")))
    if len(series) != 1:
        raise SlideError(
            f"{path} holds {len(series)} DICOM series, and a slide is one; unpack it, and give each series a folder of its "
            "own"
        )
    try:
        return OpenSlideSlide(str(series[0]), mpp)
    except SlideError as error:
        # The user knows the zip, and nothing of its copy.
        kind = MppError if isinstance(error, MppError) else SlideError
        raise kind(str(error).replace(str(series[0]), path)) from error


def _unpack(path: str, folder: Path) -> None:
    """Copy the DICOM files of a zip into a folder, under names of ours."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _checked(path, archive.infolist())
            for number, entry in enumerate(entries):
                with archive.open(entry) as source, (folder / f"{number:05}{DICOM}").open("wb") as copy:
                    # It ends at the size that the entry claims, whatever more there is.
                    shutil.copyfileobj(source, copy, COPY_BYTES)
    except SlideError:
        raise
    except _ZIP_ERRORS as error:
        raise SlideError(f"{path} is no zip that can be unpacked: {' '.join(str(error).split())}") from error


def _checked(path: str, entries: list[zipfile.ZipInfo]) -> list[zipfile.ZipInfo]:
    """Return the DICOM files of a zip.

    Raises
    ------
    SlideError
        If an entry leads out of the zip or is locked, or all of them are too many or too large.
    """
    if len(entries) > MAX_ENTRIES:
        raise SlideError(
            f"{path} holds {len(entries)} files, and a DICOM series in a zip may have {MAX_ENTRIES}; unpack it"
        )
    # Names do not decide where anything is written; who writes such names means harm. Messages do not quote them, as they
    # may be private.
    for entry in entries:
        name = PurePosixPath(entry.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in entry.filename:
            raise SlideError(f"{path} names a file outside of itself, so it is not unpacked")
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise SlideError(f"{path} holds a link, so it is not unpacked")
    files = [entry for entry in entries if _is_dicom(entry)]
    if any(entry.flag_bits & 1 for entry in files):
        raise SlideError(f"{path} is locked with a password; unpack it, and give the DICOM file")
    size = sum(entry.file_size for entry in files)
    place = cache_folder()
    place.mkdir(parents=True, exist_ok=True)
    room = min(cache_bytes(), shutil.disk_usage(place).free)
    if size > room:
        raise SlideError(
            f"{path} unpacks to {size / 1e9:.3g} GB, and there is room for {room / 1e9:.3g} in {place} (HISTOSGE_CACHE_GB); "
            "unpack it, and give the DICOM file"
        )
    return files


def _is_dicom(entry: zipfile.ZipInfo) -> bool:
    # macOS adds a ``._`` file for each file.
    name = PurePosixPath(entry.filename.replace("\\", "/")).name
    return name.lower().endswith(DICOM) and not name.startswith(".") and not entry.is_dir()


def _recognises(path: str) -> Recognition:
    if not path.lower().endswith(".zip"):
        return Recognition.NO
    try:
        with zipfile.ZipFile(path) as archive:
            is_series = any(map(_is_dicom, archive.infolist()))
    except (OSError, *_ZIP_ERRORS):
        return Recognition.NO
    return Recognition.MINE if is_series else Recognition.NO


RECORD = SlideReader(
    "dicom_zip",
    "a DICOM series in a zip file, through OpenSlide",
    (".zip",),
    _open,
    25,
    recognises=_recognises,
    looks_inside=True,
)
