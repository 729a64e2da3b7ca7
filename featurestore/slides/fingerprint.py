"""What makes a slide file the same file: size and its first and last MiB, never its mtime."""

import hashlib
from pathlib import Path

from featurestore.errors import SlideError, SlideNotFoundError
from featurestore.location import Location
from featurestore.slides.access_errors import access_as_slide_error, check_slide_url
from featurestore.slides.download_cache import fetch, is_remote
from featurestore.slides.range_reader import RangedFile
from featurestore.slides.slide_reader import is_folder_slide

SAMPLE_BYTES = 1 << 20
"""Bytes hashed at each end: headers and directories stand there, and with the size they differ between any two slides."""
METADATA = ("zarr.json", ".zattrs", ".zarray", ".zgroup")
"""Objects of a Zarr whose content counts; of chunks only the size does, which compression makes differ."""


def folder_fingerprint(path: str) -> str:
    """Return ``<bytes>-<sha256>`` over the names and sizes of all objects of an OME-Zarr, and its metadata's content.

    Raises
    ------
    SlideNotFoundError
        If nothing is there.
    """
    location = Location(path)
    sizes = location.sizes()
    if not sizes:
        raise SlideNotFoundError(f"there is no slide at {location.label}")
    # Sorted: file systems list in any order.
    digest = hashlib.sha256()
    for name in sorted(sizes):
        digest.update(f"{name} {sizes[name]}\n".encode())
        if name.rsplit("/", 1)[-1] in METADATA:
            digest.update(location.read_bytes(name))
    return f"{sum(sizes.values())}-{digest.hexdigest()}"


def slide_fingerprint(path: str) -> str:
    """Return ``<bytes>-<sha256>`` of a slide's first and last MiB; of a folder (OME-Zarr), see `folder_fingerprint`.

    Reading whole slides of several GB would cost more than it protects from.

    Parameters
    ----------
    path
        A file, or a URL: of a server that serves parts, no more than these two MiB are fetched.

    Raises
    ------
    SlideError
        If the slide is not there, or cannot be read.
    """
    check_slide_url(path)
    with access_as_slide_error(path, "cannot be read"):
        return _fingerprint(path)


def _fingerprint(path: str) -> str:
    if is_folder_slide(path):
        return folder_fingerprint(path)
    if is_remote(path):
        return _remote_fingerprint(path)
    file = Path(path.removeprefix("file://"))
    if not file.is_file():
        raise SlideNotFoundError(f"there is no slide at {path}")
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(SAMPLE_BYTES))
        # Of a file below 2 MiB the ends overlap: the last part begins where the first ended.
        if size > SAMPLE_BYTES:
            stream.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return f"{size}-{digest.hexdigest()}"


def _remote_fingerprint(url: str) -> str:
    try:
        remote = RangedFile(url)
    except SlideNotFoundError:
        raise
    except SlideError:  # its server serves no parts
        return slide_fingerprint(str(fetch(url)))
    parts = [(0, min(SAMPLE_BYTES, remote.size))]
    if remote.size > SAMPLE_BYTES:
        start = max(SAMPLE_BYTES, remote.size - SAMPLE_BYTES)
        parts.append((start, remote.size - start))
    digest = hashlib.sha256()
    for data in remote.read(parts):
        digest.update(data)
    return f"{remote.size}-{digest.hexdigest()}"
