"""Plain PNG and JPEG pictures as slides of one level, decoded once. Their mpp has to be given."""

from pathlib import Path

import imagecodecs
import numpy as np
from numpy.typing import NDArray

from featurestore.errors import SlideError
from featurestore.slides.pyramid_slide import PyramidSlide, check_mpp
from featurestore.slides.readers.openslide_reader import on_white
from featurestore.slides.slide_reader import SlideReader

DECODERS = {
    ".png": imagecodecs.png_decode,
    ".jpg": imagecodecs.jpeg8_decode,
    ".jpeg": imagecodecs.jpeg8_decode,
}


class RasterSlide(PyramidSlide):
    """A picture in memory."""

    def __init__(self, path: str, mpp: float | None) -> None:
        decode = DECODERS.get(Path(path).suffix.lower())
        if decode is None:
            raise SlideError("not a PNG or JPEG")
        checked = check_mpp(mpp, path)  # before decoding: without it there is nothing to do
        try:
            image = np.asarray(decode(Path(path).read_bytes()))
        except (ValueError, RuntimeError) as error:
            raise SlideError(f"cannot be decoded: {error}") from error
        if image.dtype != np.uint8:
            raise SlideError(f"pixels are {image.dtype}; a slide is 8-bit RGB")
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        self._image = on_white(image) if image.shape[2] == 4 else image[..., :3]
        super().__init__(path, ((image.shape[1], image.shape[0]),), checked)

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> NDArray[np.uint8]:
        """Return native RGB of a rectangle inside a level."""
        return self._image[y : y + height, x : x + width].copy()

    def close(self) -> None:
        """Nothing is open."""


# The only reader for its suffixes: OpenSlide and tifffile would add nothing but reasons to the message.
RECORD = SlideReader(
    "raster", "PNG and JPEG pictures, one level, decoded whole", tuple(DECODERS), RasterSlide, 40
)
