"""Plain PNG and JPEG pictures as slides of one level, decoded once. Their mpp has to be given."""

from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from featurestore.errors import SlideError, first_line
from featurestore.slides.picture_bounds import check_pixels, exif_orientation, frame_header
from featurestore.slides.pyramid_slide import PyramidSlide, check_mpp
from featurestore.slides.slide_reader import SlideReader
from featurestore.slides.tiff_colours import CONVERT, cmyk_to_rgb, on_white

SUFFIXES = (".png", ".jpg", ".jpeg")
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"
_DECODE_ERRORS = (ValueError, RuntimeError, TypeError, IndexError)
_INKS = 4
"""Samples of a CMYK JPEG."""


class RasterSlide(PyramidSlide):
    """A picture in memory."""

    def __init__(self, path: str, mpp: float | None) -> None:
        checked = check_mpp(mpp, path)  # before decoding: without it there is nothing to do
        try:
            self._image = _decode(Path(path).read_bytes())
        except _DECODE_ERRORS as error:
            if isinstance(error, SlideError):
                raise
            raise SlideError(f"cannot be decoded: {first_line(error)}") from error
        super().__init__(path, ((self._image.shape[1], self._image.shape[0]),), checked)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        return self._image[y : y + height, x : x + width].copy()

    def close(self) -> None:
        """Nothing is open."""


def _decode(data: bytes) -> NDArray[np.uint8]:
    """Decode a PNG or JPEG, by its first bytes, to RGB."""
    width, height, samples = frame_header(data) or (0, 0, 0)
    check_pixels(width, height, len(data))
    if (turned := exif_orientation(data)) not in (0, 1):
        # Programs differ in whether they turn it, and so do coordinates that were measured on the picture.
        raise SlideError(
            f"it is stored turned or mirrored (EXIF orientation {turned}); write it upright: vips autorot IN OUT.tif"
        )
    if data.startswith(_JPEG):
        image = np.asarray(imagecodecs.jpeg8_decode(data))
        if samples == _INKS:
            # imagecodecs leaves out the black channel otherwise. Adobe's programs write inks inverted, and as Pillow
            # does, every CMYK JPEG is taken for theirs.
            return cmyk_to_rgb(255 - np.asarray(imagecodecs.jpeg8_decode(data, outcolorspace="CMYK")))
    elif data.startswith(_PNG):
        image = np.asarray(imagecodecs.png_decode(data))
    else:
        raise SlideError("not a PNG or JPEG")
    if image.dtype != np.uint8:
        raise SlideError(f"pixels are {image.dtype}; a slide is 8-bit RGB; convert it: {CONVERT}")
    if image.ndim == 2:
        image = image[..., None]
    has_alpha = image.shape[2] in (2, 4)
    colours = image[..., :-1] if has_alpha else image
    rgb = np.repeat(colours, 3, axis=2) if colours.shape[2] == 1 else colours
    return on_white(rgb, image[..., -1:]) if has_alpha else np.ascontiguousarray(rgb)


# The only reader for its suffixes: OpenSlide and tifffile would add nothing but reasons to the message.
RECORD = SlideReader("raster", "PNG and JPEG pictures, one level, decoded whole", SUFFIXES, RasterSlide, 40)
