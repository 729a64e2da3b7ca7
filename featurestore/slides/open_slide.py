"""One way to look at any slide: size, scale, levels, and pixels at any mpp.

It knows no format by name: it asks the registered readers how sure they are, and tries the surest first.

Terms
    size_px     (width, height) at level 0
    mpp         microns per pixel at level 0
    level_px    (width, height) of each stored level, finest first
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from featurestore.errors import (
    MppError,
    SlideError,
    SlideNotFoundError,
    first_line,
)
from featurestore.slides.access_errors import access_error, check_slide_url, is_access_error
from featurestore.slides.download_cache import fetch, is_remote
from featurestore.slides.protocol import Slide
from featurestore.slides.pyramid_slide import PyramidSlide
from featurestore.slides.slide_reader import (
    READERS,
    Recognition,
    SlideReader,
    is_folder_slide,
    readers_in_order,
)

T = TypeVar("T")
SAME_MPP = 0.05
"""Relative difference of two scales that rounding explains: a level may be as far from the requested mpp."""
REASON_CHARS = 120
"""Kept of each reader's reason: three of them and the path still make one readable line."""


def open_slide(
    path: str | os.PathLike[str], mpp: float | None = None, *, fallback_mpp: float | None = None
) -> Slide:
    """Open a slide with whichever reader knows it.

    Parameters
    ----------
    path
        A file, or a URL (s3, gs, az, http, https): JPEG-tiled TIFF and SVS (of a URL the tiles that are needed;
        other formats are fetched whole); other SVS and TIFF, NDPI, MRXS, DICOM through OpenSlide; flat and
        OME-TIFF through tifffile; PNG and JPEG; and what other packages' readers add.
        A folder or URL that ends in ``.zarr``: OME-Zarr, read in place.
    mpp
        Microns per pixel at level 0; overrides those in the file.
    fallback_mpp
        Used if `mpp` is None and the file states none, or an absurd one.

    Raises
    ------
    SlideNotFoundError
        If there is no such file.
    MppError
        If mpp is neither given nor in the file, or absurd.
    SlideError
        If no reader can open it; the message holds each one's reason.
    """
    if mpp is None and fallback_mpp is not None:
        try:
            return open_slide(path)
        except MppError:
            mpp = fallback_mpp
    source = os.fspath(path)
    check_slide_url(source)
    if is_remote(source):
        slide = _open_url(source, mpp)
        if slide is not None:
            return slide
        source = str(fetch(source))
    source = source.removeprefix("file://")
    # Checked here, so that no reader has to distinguish a missing file from a bad one.
    try:
        is_there = is_folder_slide(source) or Path(source).is_file()
    except OSError as error:  # a folder that may not be entered, a name that is too long
        raise access_error(source, error, "cannot be read") from error
    if not is_there:
        raise SlideNotFoundError(f"there is no slide at {source}")
    reasons: list[str] = []
    for reader in _candidates(source):
        try:
            return _guarded(reader, reader.open, source, mpp)
        except MppError:
            raise  # the format is known and only the scale is missing: that is what the user has to hear
        except SlideError as error:
            reasons.append(first_line(error))
    if len(reasons) == 1 and reasons[0].startswith(source):
        raise SlideError(reasons[0])
    # A single reason is given whole: it may end in the command that converts the file.
    cut = REASON_CHARS if len(reasons) > 1 else None
    short = dict.fromkeys(reason[:cut] for reason in reasons)
    raise SlideError(f"{source} cannot be opened: {'; '.join(short) or 'no reader knows its format'}")


def mpp_difference(slide: Slide, mpp: float | None) -> str:
    """Return a sentence where the mpp that a sample sheet gives differs from the file's own by more than 5 %, else "".

    A factor of 2 or 10 is a typing error or another magnification, and each patch then shows another size of tissue.
    """
    stated = slide.stated_mpp if isinstance(slide, PyramidSlide) else None
    if mpp is None or stated is None or abs(mpp / stated - 1) <= SAME_MPP:
        return ""
    return (
        f"{slide.source} states {stated:.4g} microns per pixel, the sample sheet {mpp:.4g}; the sheet's is used, leave its "
        "mpp empty if the file is right"
    )


def _open_url(url: str, mpp: float | None) -> Slide | None:
    """Open a remote slide without fetching it; None if it has to be fetched whole."""
    for reader in readers_in_order():
        if reader.open_url is not None and reader.has_suffix(url):
            slide = _guarded(reader, reader.open_url, url, mpp)
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


def _guarded(
    reader: SlideReader, opener: Callable[[str, float | None], T], source: str, mpp: float | None
) -> T:
    """Call a reader; whatever is wrong with the slide comes out as a `SlideError`."""
    try:
        return opener(source, mpp)
    except SlideError:
        raise
    except Exception as error:
        if is_access_error(error):
            raise access_error(source, error, "cannot be read") from error
        # A bug of ours keeps its traceback; another package's is a reason like any other.
        if reader.name in READERS.own:
            raise
        reason = " ".join(str(error).split())
        raise SlideError(f"{reader.name}: {type(error).__name__}: {reason}") from error
