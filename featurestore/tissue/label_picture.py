"""PNG and TIFF masks: a picture of the whole slide at any scale, in which 0 is left out and every other value is a class."""

import io
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from featurestore.errors import MaskError, first_line
from featurestore.slides.picture_bounds import LARGEST_PX, check_layout, frame_header
from featurestore.tissue.annotation import Frame

MAX_CLASSES = 256
"""Values that a picture may hold. One with more is a photograph or a map of probabilities."""
MANY_CLASSES = 64
"""Values from which on the user is warned: smoothed edges and grey photographs have as many, few annotations do."""
LARGEST_PIXEL_UM = 500.0
"""A mask with larger pixels is refused: any picture of a few pixels has about the aspect ratio of any slide."""
_POINTS = (1 / 6, 1 / 2, 5 / 6)
_PNG = b"\x89PNG\r\n\x1a\n"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_WHITE_IS_ZERO = 0
_DECODE_ERRORS = (
    ValueError,
    RuntimeError,
    TypeError,
    IndexError,
    KeyError,
    OSError,
    SyntaxError,
    ArithmeticError,
)


@dataclass(frozen=True)
class LabelPicture:
    """A picture of classes over the whole slide.

    Parameters
    ----------
    labels
        ``(height, width)``; 0 is no class.
    label
        Path or URL of the file, for messages.
    full_px
        ``(width, height)`` of the file's finest level.
    kind, remark
        As `Annotation` has them.
    """

    labels: NDArray[Any] = field(repr=False)
    label: str
    full_px: tuple[int, int]
    kind: Literal["picture"] = "picture"
    remark: str = ""
    _values: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        values = np.unique(self.labels)
        if len(values) > MAX_CLASSES:
            raise MaskError(
                f"{self.label} holds {len(values)} different values, so it is no mask; write one value for each class and 0 "
                "for what is left out"
            )
        found = tuple(int(value) for value in values if value != 0)
        object.__setattr__(self, "_values", found)
        if len(found) > MANY_CLASSES and not self.remark:
            remark = (
                f"{self.label} holds {len(found)} different values, and all but 0 are taken; is it a photograph or a map of "
                "probabilities?"
            )
            object.__setattr__(self, "remark", remark)

    @property
    def classes(self) -> tuple[str, ...]:
        """Values of its pixels but 0, as text."""
        return tuple(map(str, self._values))

    def draw(self, classes: Collection[str], frame: Frame) -> NDArray[np.bool_]:
        """Return which pixels of a frame are mostly of these classes.

        Raises
        ------
        MaskError
            If the picture has another aspect ratio than the slide, or only a few pixels.
        """
        check_aspect(self.full_px, frame.slide_px, self.label)
        pixel_um = frame.slide_px[0] * frame.slide_mpp / self.full_px[0]
        # Not of a slide that has no more pixels itself.
        if pixel_um > LARGEST_PIXEL_UM and pixel_um > 2 * frame.mpp:
            raise MaskError(
                f"{self.label} is {self.full_px[0]} x {self.full_px[1]} px, so {pixel_um:.0f} microns each, and a mask's "
                f"may have {LARGEST_PIXEL_UM:.0f}; write it at a finer scale, or use --tissue none for the whole slide"
            )
        # In the picture's own type: unsigned 64-bit values do not fit into a signed one.
        wanted = np.array([int(name) for name in classes], self.labels.dtype)
        # Not by a table, which numpy 2.0 cannot make of 64-bit numbers.
        chosen = np.isin(self.labels, wanted, kind="sort")
        votes = np.zeros(frame.shape, np.uint8)
        # Nine points of each pixel: its centre alone lies on an edge of the mask's pixels where these are half as wide,
        # and all areas would be shifted by half of one. An odd number has no ties.
        for y in _POINTS:
            for x in _POINTS:
                rows, cols = (
                    np.minimum(((np.arange(n) + at) * frame.scale * m / side).astype(np.int64), m - 1)
                    for n, at, m, side in zip(
                        frame.shape, (y, x), self.labels.shape, frame.slide_px[::-1], strict=True
                    )
                )
                votes += chosen[np.ix_(rows, cols)]
        return votes > len(_POINTS) ** 2 // 2


def check_aspect(picture_px: tuple[int, int], slide_px: tuple[int, int], label: str) -> None:
    """Refuse a picture that cannot show the whole slide: no scale gives both of its sides, each rounded to a pixel.

    Parameters
    ----------
    picture_px, slide_px
        ``(width, height)``.

    Raises
    ------
    MaskError
        With both sizes; says where a picture turned by 90 degrees would fit.
    """
    if _fits(picture_px, slide_px):
        return
    (width, height), (slide_width, slide_height) = picture_px, slide_px
    turned = _fits((height, width), slide_px)
    needed = round(width * slide_height / slide_width)
    fix = "turn it by 90 degrees" if turned else f"a mask {width} px wide needs {needed} px in height"
    raise MaskError(
        f"{label} is {width} x {height} px and the slide {slide_width} x {slide_height}: another aspect ratio, so it shows "
        f"another area; {fix}"
    )


def _fits(picture_px: tuple[int, int], slide_px: tuple[int, int]) -> bool:
    # A side of n px may have been rounded up or down from a fraction, and pyramids round once a level.
    low = max(side / (n + 1) for n, side in zip(picture_px, slide_px, strict=True))
    high = min(side / max(n - 1, 0.5) for n, side in zip(picture_px, slide_px, strict=True))
    return low <= high


def read_picture(
    data: bytes | str, head: bytes, label: str, overview_px: tuple[int, int] | None
) -> LabelPicture:
    """Read a PNG or TIFF mask; of a TIFF with levels the coarsest that is as fine as the overview.

    Parameters
    ----------
    data
        The file's bytes, or the path of a local file.
    head
        Its first bytes.
    overview_px
        ``(width, height)`` of the overview; None for the finest level.

    Raises
    ------
    MaskError
        If it cannot be decoded, is too large, or its pixels are no classes.
    """
    try:
        if head.startswith(_PNG):
            values = _read_png(data, head, label)
            full = values.shape[1], values.shape[0]
        elif head.startswith(_TIFF):
            values, full = _read_tiff(data, label, overview_px)
        else:
            raise MaskError(
                f"{label} is neither PNG nor TIFF inside; JPEG changes values at every edge: write the mask as PNG"
            )
        return LabelPicture(_one_channel(values, label), label, full)
    except MaskError:
        raise
    except _DECODE_ERRORS as error:
        raise MaskError(f"{label} cannot be decoded: {first_line(error)}; write it again as PNG") from error


def _read_png(data: bytes | str, head: bytes, label: str) -> NDArray[Any]:
    width, height, _ = frame_header(head) or (0, 0, 0)
    most = int(Image.MAX_IMAGE_PIXELS or LARGEST_PX)  # beyond it Pillow warns of a decompression bomb
    if width * height > most:
        raise MaskError(
            f"{label} has {width} x {height} px, and a PNG mask may have {most // 10**6} million; write it at a coarser "
            "scale, 4 microns per pixel are enough"
        )
    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data) as picture:
        return np.asarray(picture)  # of a palette its indices, which are the classes


def _read_tiff(
    data: bytes | str, label: str, overview_px: tuple[int, int] | None
) -> tuple[NDArray[Any], tuple[int, int]]:
    with tifffile.TiffFile(io.BytesIO(data) if isinstance(data, bytes) else data) as tiff:
        # Of each level the first page; a mask has one.
        pages: list[Any] = [level.pages[0] for level in tiff.series[0].levels]
        sizes = [(int(page.imagewidth), int(page.imagelength)) for page in pages]
        fine = [
            number
            for number, (width, height) in enumerate(sizes)
            if overview_px is not None and width >= overview_px[0] and height >= overview_px[1]
        ]
        chosen = max(fine, default=0)
        page = pages[chosen]
        check_layout(page)
        width, height = sizes[chosen]
        if width * height > LARGEST_PX:
            raise MaskError(
                f"{label} has {width} x {height} px and no coarser level, and a mask may have {LARGEST_PX // 10**6} "
                "million; write it at a coarser scale, 4 microns per pixel are enough"
            )
        if int(page.photometric) == _WHITE_IS_ZERO:
            # Programs differ in which of its two values they show as white, and so in what is left out.
            raise MaskError(f"{label} stores white as 0 (WhiteIsZero); write it as PNG, or with BlackIsZero")
        return np.asarray(page.asarray()), sizes[0]


def _one_channel(values: NDArray[Any], label: str) -> NDArray[Any]:
    """Return the classes of a picture's pixels, ``(height, width)``."""
    if values.dtype == np.bool_:
        values = values.astype(np.uint8)
    if values.dtype.kind not in "ui":
        raise MaskError(
            f"{label} holds {values.dtype}; classes are whole numbers: apply a threshold, and write 0 and 1"
        )
    if values.ndim == 2:
        return values
    if values.ndim != 3 or values.shape[2] not in (1, 2, 3, 4):
        raise MaskError(
            f"{label} holds an array of shape {values.shape}; a mask has one value for each pixel"
        )
    channels = values.shape[2]
    colours = values[..., : channels - 1] if channels in (2, 4) else values
    first = colours[..., :1]
    # Grey, or classes in red alone, as the PANDA challenge wrote them.
    if not ((colours == first).all() or not colours[..., 1:].any()):
        raise MaskError(
            f"{label} has colours; a mask has one value for each pixel: 0 for what is left out, a number for each class"
        )
    return np.where(values[..., -1] > 0, first[..., 0], 0) if channels in (2, 4) else first[..., 0]
