"""Which image of a TIFF is the slide, and which are labels, overviews, or a second slide.

OME-TIFF names its images and states their scale; other TIFFs hold pages, of which the smaller levels are marked.
"""

import xml.etree.ElementTree as ET
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import tifffile

from featurestore.errors import SlideError
from featurestore.slides.picture_bounds import MAX_PLANES, check_layout, check_text
from featurestore.slides.tiff_colours import BLACK_IS_ZERO, CONVERT, is_plain_rgb
from featurestore.slides.units import microns

OVERVIEWS = ("macro", "label", "thumbnail", "overview", "barcode")
"""Words in the names of images that show the glass and not the scan."""
COARSER = 1.9
"""An image whose pixels are this much larger is an overview: scans of one run have one scale, and levels halve it."""
SMALLER = 0.3
"""Of an image without a scale, the share of the largest image's area up to which it is an overview or a level: half as
large on each side, and some more where sizes were rounded up."""
SAME_ASPECT = 0.02
"""Relative difference up to which two pages have the same proportions: sizes of small levels are rounded."""
# Of OME's channel colours: RGBA in one signed number.
_PRIMARIES = {-16776961: 0, 16711935: 1, 65535: 2}
_CHANNEL_NAMES = {"red": 0, "r": 0, "green": 1, "g": 1, "blue": 2, "b": 2}
_FLUORESCENCE = ("EmissionWavelength", "ExcitationWavelength", "Fluor")


@dataclass(frozen=True)
class SlideImage:
    """The slide in a TIFF.

    Parameters
    ----------
    levels
        Finest first; of each its page, or three pages that hold red, green and blue.
    keyframes
        The page of each level that has its tags.
    mpp
        ``(x, y)`` as OME states it; None where it does not.
    significant_bits
        As OME states it.
    """

    levels: tuple[tuple[Any, ...], ...]
    keyframes: tuple[Any, ...]
    mpp: tuple[float | None, float | None] = (None, None)
    significant_bits: int | None = None


def find_slide(file: tifffile.TiffFile) -> SlideImage:
    """Find the slide among the images of a TIFF.

    Raises
    ------
    SlideError
        If there is none, more than one that may be it, or one of a kind that is not read.
    """
    # Before tifffile parses what the pages say of themselves.
    for page in pages_once(file):
        check_text(str(getattr(page, "description", "")))
    ome = _ome_images(file)
    every = [series for series in file.series if series.keyframe is not None]
    named = [series for series in every if not _is_overview(series.name)] or every
    if not named:
        raise SlideError("it holds no image")
    slide = max(named, key=_area)
    images = {id(series): _ome_image(ome, series) for series in named}
    mpp = _image_mpp(images[id(slide)])
    for other in named:
        if other is not slide and not _is_smaller_version(other, _image_mpp(images[id(other)]), slide, mpp):
            raise SlideError(
                f"it holds several images, of {_size(slide)} and {_size(other)}, and does not say which is the slide; "
                'write one of them: vips tiffsave "IN[page=N]" OUT.tif --tile --pyramid'
            )
    levels = [level for level in slide.levels if level is slide.levels[0] or _is_level(level, slide)]
    levels += [s for s in named if s is not slide and slide.kind != "ome" and _is_level(s, slide)]
    levels.sort(key=_area, reverse=True)
    for level in levels:
        check_layout(level.keyframe)
    order = _plane_order(slide, images[id(slide)])
    return SlideImage(
        tuple(_planes(level, order) for level in levels),
        tuple(level.keyframe for level in levels),
        mpp,
        _significant_bits(images[id(slide)]),
    )


def pages_once(file: tifffile.TiffFile) -> Iterator[Any]:
    """Yield the pages of a TIFF; `file.pages` never ends where a directory names an earlier one as the next (2026.3.3).

    Raises
    ------
    SlideError
        If that is so.
    """
    seen: set[int] = set()
    for page in file.pages:
        if page.offset in seen:
            raise SlideError("its directories name each other in a circle")
        seen.add(page.offset)
        yield page


def first_page_is_slide(file: tifffile.TiffFile) -> bool:
    """Whether a TIFF's first page is the slide, in plain RGB, and all others are levels of it or far smaller.

    OpenSlide reads such files right; of others it takes the first page, whatever that is.
    """
    pages: list[Any] = list(pages_once(file))
    first = pages[0]
    if file.is_ome or file.is_imagej or not is_plain_rgb(first):
        return False
    area = first.imagewidth * first.imagelength
    others = [page for page in pages[1:] if not page.is_reduced]
    return all(page.imagewidth * page.imagelength <= SMALLER * area for page in others) and all(
        page.imagewidth * page.imagelength < area for page in pages[1:]
    )


def _ome_images(file: tifffile.TiffFile) -> list[ET.Element]:
    if not file.is_ome:
        return []
    try:
        root = ET.fromstring(file.ome_metadata or "")  # noqa: S314  # `check_text` refused entities
    except ET.ParseError as error:
        raise SlideError(f"its OME-XML cannot be parsed ({error}); convert it: {CONVERT}") from error
    if any(element.tag.endswith(("AlongZ", "AlongT", "AlongC")) for element in root.iter()):
        raise SlideError(
            "its OME-XML divides its planes further (modulo annotations); a slide is one picture"
        )
    images = root.findall("{*}Image")
    for pixels in (image.find("{*}Pixels") for image in images):
        sizes = [pixels.get(f"Size{axis}", "1") for axis in "CZT"] if pixels is not None else []
        if not all(size.isdecimal() and len(size) <= 9 for size in sizes) or (
            sizes and int(sizes[0]) * int(sizes[1]) * int(sizes[2]) > MAX_PLANES
        ):
            raise SlideError(
                f"its OME-XML states {' x '.join(size[:20] for size in sizes)} planes; a slide has one or three"
            )
    return images


def _ome_image(images: list[ET.Element], series: Any) -> ET.Element | None:
    """Find the element of a series: tifffile leaves out images that are not in the file."""
    size = str(series.keyframe.imagewidth), str(series.keyframe.imagelength)
    for image in images:
        pixels = image.find("{*}Pixels")
        is_named = image.get("Name", series.name) == series.name or len(images) == 1
        if pixels is not None and (pixels.get("SizeX"), pixels.get("SizeY")) == size and is_named:
            return pixels
    return None


def _image_mpp(pixels: ET.Element | None) -> tuple[float | None, float | None]:
    if pixels is None:
        return None, None
    x, y = (
        microns(pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        for axis in "XY"
    )
    return x, y


def _significant_bits(pixels: ET.Element | None) -> int | None:
    text = pixels.get("SignificantBits", "") if pixels is not None else ""
    return int(text) if text.isdecimal() else None


def _is_overview(name: str) -> bool:
    return any(word in name.lower() for word in OVERVIEWS)


def _area(series: Any) -> int:
    return int(series.keyframe.imagewidth) * int(series.keyframe.imagelength)


def _size(series: Any) -> str:
    return f"{series.keyframe.imagewidth} x {series.keyframe.imagelength} px"


def _is_smaller_version(
    other: Any,
    other_mpp: tuple[float | None, float | None],
    slide: Any,
    mpp: tuple[float | None, float | None],
) -> bool:
    if other_mpp[0] and mpp[0]:
        return other_mpp[0] >= COARSER * mpp[0]
    return _is_level(other, slide) or _area(other) <= SMALLER * _area(slide)


def _is_level(level: Any, slide: Any) -> bool:
    page, first = level.keyframe, slide.keyframe
    across, down = first.imagewidth / page.imagewidth, first.imagelength / page.imagelength
    # A level has to be marked as one: an overview of the glass may have the proportions of the scan.
    is_marked = page.is_reduced or page.treeindex[1:]
    tolerance = SAME_ASPECT + 1 / page.imagewidth + 1 / page.imagelength
    return bool(is_marked and across > 1 and abs(across / down - 1) <= tolerance)


def _plane_order(series: Any, pixels: ET.Element | None) -> tuple[int, ...]:
    """Return which planes are red, green and blue; ``(0,)`` for one page."""
    axes = {axis: size for axis, size in zip(series.axes, series.shape, strict=True) if size != 1}
    count = len(series.pages)
    if count == 1 and not set(axes) - set("YXSC"):
        channels = [] if pixels is None else pixels.findall("{*}Channel")
        if series.keyframe.samplesperpixel == 1 and _is_fluorescence(channels):
            raise SlideError(
                "it is one channel under fluorescence; a slide is a picture in colours, under bright field"
            )
        return (0,)
    described = ", ".join(f"{axis}={size}" for axis, size in axes.items())
    page = series.keyframe
    planes = set(axes) == set("CYX") and count == 3 and page.samplesperpixel == 1 and series.kind == "ome"
    if not planes or page.photometric != BLACK_IS_ZERO or pixels is None:
        raise SlideError(
            f"it has {count} planes ({described}), not one picture in colours; if three of them are red, green and blue: "
            'vips bandjoin "IN[page=0] IN[page=1] IN[page=2]" OUT.tif'
        )
    return _channel_order(pixels.findall("{*}Channel"))


def _channel_order(channels: list[ET.Element]) -> tuple[int, ...]:
    """Return which of three channels are red, green and blue.

    Raises
    ------
    SlideError
        If their names or colours are others: stains under fluorescence, as a rule.
    """
    names = [channel.get("Name", "").strip() for channel in channels]
    colours = [channel.get("Color", "") for channel in channels]
    primaries = [
        _PRIMARIES.get(int(text)) if text.lstrip("-").isdecimal() and len(text) < 12 else None
        for text in colours
    ]
    order = None if _is_fluorescence(channels) else rgb_order(names, colours, primaries)
    if order is None:
        raise not_colours(names)
    return order


def rgb_order(
    names: Sequence[str], colours: Sequence[str], primaries: Sequence[int | None]
) -> tuple[int, ...] | None:
    """Return which of three channels are red, green and blue; None if they are something else.

    Parameters
    ----------
    names, colours
        Of each channel, as its file states them; empty where it does not.
    primaries
        Which of red (0), green (1) and blue (2) each colour is; None for others.
    """
    named = [_CHANNEL_NAMES.get(name.strip().lower()) for name in names]
    if sorted(p for p in named if p is not None) == [0, 1, 2]:
        return tuple(named.index(primary) for primary in range(3))
    # Writers number channels that nobody named ("Channel:0:1", "C2"). Stains are drawn in red, green and blue, too, so
    # colours alone prove nothing beside other names.
    if not all(not name.strip() or _is_number(name.strip()) for name in names):
        return None
    if sorted(p for p in primaries if p is not None) == [0, 1, 2]:
        return tuple(list(primaries).index(primary) for primary in range(3))
    # All of one colour, white, as a rule.
    return (0, 1, 2) if len(set(colours)) <= 1 else None


def not_colours(names: Sequence[str]) -> SlideError:
    """Return the refusal of channels that are not red, green and blue."""
    listed = ", ".join(name.strip()[:40] or "unnamed" for name in names)
    return SlideError(
        f"it has 3 channels ({listed}) that are not red, green and blue; a slide is a picture in colours, under bright field"
    )


def _is_fluorescence(channels: list[ET.Element]) -> bool:
    return any(
        channel.get(key) or "fluor" in channel.get("ContrastMethod", "").lower()
        for channel in channels
        for key in _FLUORESCENCE
    )


def _is_number(name: str) -> bool:
    return (
        name.lower().removeprefix("channel").removeprefix("ch").removeprefix("c").strip(" :_-0123456789")
        == ""
    )


def _planes(level: Any, order: tuple[int, ...]) -> tuple[Any, ...]:
    pages = [page for page in level.pages if page is not None]
    if len(order) == 1:
        return (level.keyframe,)
    if len(pages) != len(order):
        raise SlideError(f"it lacks {len(order) - len(pages)} of {len(order)} planes of a level")
    return tuple(pages[i] for i in order)
