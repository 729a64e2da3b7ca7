"""One way to look at any slide: size, scale, levels, and pixels at any mpp.

It knows no format by name: it asks the registered readers how sure they are, and tries the surest first.

Terms
    size_px     (width, height) at level 0
    mpp         microns per pixel at level 0
    level_px    (width, height) of each stored level, finest first
"""

import os
from pathlib import Path

from featurestore.errors import FeatureStoreError, MppError, SlideError, SlideNotFoundError, first_line
from featurestore.slides.download_cache import fetch, is_remote
from featurestore.slides.protocol import Slide
from featurestore.slides.slide_reader import (
    READERS,
    Recognition,
    SlideReader,
    is_folder_slide,
    readers_in_order,
)

REASON_CHARS = 120
"""Kept of each reader's reason: three of them and the path still make one readable line."""


def open_slide(path: str | os.PathLike[str], mpp: float | None = None) -> Slide:
    """Open a slide with whichever reader knows it.

    Parameters
    ----------
    path
        A file, or a URL that fsspec knows: JPEG-tiled TIFF and SVS (of a URL the tiles that are needed;
        other formats are fetched whole); other SVS and TIFF, NDPI, MRXS, DICOM through OpenSlide; flat and
        OME-TIFF through tifffile; PNG and JPEG; and what other packages' readers add.
        A folder or URL that ends in ``.zarr``: OME-Zarr, read in place.
    mpp
        Microns per pixel at level 0; overrides those in the file.

    Raises
    ------
    SlideNotFoundError
        If there is no such file.
    MppError
        If mpp is neither given nor in the file, or absurd.
    SlideError
        If no reader can open it; the message holds each one's reason.
    """
    source = os.fspath(path)
    if is_remote(source):
        slide = _open_url(source, mpp)
        if slide is not None:
            return slide
        source = str(fetch(source))
    source = source.removeprefix("file://")
    # Checked here, so that no reader has to distinguish a missing file from a bad one.
    if not is_folder_slide(source) and not Path(source).is_file():
        raise SlideNotFoundError(f"there is no slide at {source}")
    reasons: list[str] = []
    for reader in _candidates(source):
        try:
            return _open(reader, source, mpp)
        except MppError:
            raise  # the format is known and only the scale is missing: that is what the user has to hear
        except SlideError as error:
            reasons.append(first_line(error))
    if len(reasons) == 1 and reasons[0].startswith(source):
        raise SlideError(reasons[0])
    short = dict.fromkeys(reason[:REASON_CHARS] for reason in reasons)
    raise SlideError(f"{source} cannot be opened: {'; '.join(short) or 'no reader knows its format'}")


def _open_url(url: str, mpp: float | None) -> Slide | None:
    """Open a remote slide without fetching it; None if it has to be fetched whole."""
    for reader in readers_in_order():
        if reader.open_url is not None and reader.has_suffix(url):
            slide = reader.open_url(url, mpp)
            if slide is not None:
                return slide
    return None


def _candidates(path: str) -> list[SlideReader]:
    """Return the readers to try, the surest first; if some claim the slide as theirs, only those."""
    found = [(reader.recognition(path), reader) for reader in readers_in_order()]
    is_claimed = any(recognition is Recognition.MINE for recognition, _ in found)
    least = Recognition.MINE if is_claimed else Recognition.MAYBE
    # A stable sort: readers that are equally sure keep their order.
    ranked = sorted(found, key=lambda pair: pair[0], reverse=True)
    return [reader for recognition, reader in ranked if recognition >= least]


def _open(reader: SlideReader, path: str, mpp: float | None) -> Slide:
    try:
        return reader.open(path, mpp)
    except FeatureStoreError:
        raise
    except Exception as error:
        # A bug of ours keeps its traceback; another package's is a reason like any other.
        if reader.name in READERS.own:
            raise
        reason = " ".join(str(error).split())
        raise SlideError(f"{reader.name}: {type(error).__name__}: {reason}") from error
