"""How the samples of a TIFF page become RGB: by its photometric interpretation, bits, planes and extra samples.

What a file leaves open is refused with the command that converts it: a picture in wrong colours looks like a picture.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import SlideError

CONVERT = "vips tiffsave IN OUT.tif --tile --pyramid --bigtiff"
"""Writes a pyramid of tiles from most formats."""
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
JPEG = 7
# YCbCr in these is what the TIFF tag says; other codecs convert colours themselves, some of them, some of the time.
_PLAIN_CODECS = (1, 5, 8, 32773, 32946, 50000)
_COLOUR_SAMPLES = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}
# Values of the TIFF tag ExtraSamples.
_ASSOCIATED, _UNASSOCIATED = 1, 2


@dataclass(frozen=True)
class PixelFormat:
    """How the samples of a page are to be read.

    Parameters
    ----------
    photometric
        Value of the TIFF tag PhotometricInterpretation.
    white
        The value of a full sample; None for 16 bits of which only the pixels tell how many are used.
    alpha
        0: none; 1: colours are multiplied with it; 2: they are not.
    palette
        RGB of each value, ``(n, 3)``.
    """

    photometric: int
    white: int | None = 255
    alpha: int = 0
    palette: NDArray[np.uint8] | None = None

    def to_rgb(self, samples: NDArray[Any]) -> NDArray[np.uint8]:
        """Convert samples ``(height, width, n)`` to RGB ``(height, width, 3)``."""
        if self.palette is not None:
            return np.asarray(self.palette[np.minimum(samples[..., 0], len(self.palette) - 1)], np.uint8)
        pixels = to_8_bits(samples, self.white or 65535)
        alpha = pixels[..., -1:] if self.alpha else None
        if self.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO):
            grey = pixels[..., :1] if self.photometric == BLACK_IS_ZERO else 255 - pixels[..., :1]
            rgb = np.repeat(grey, 3, axis=2)
        elif self.photometric == CMYK:
            rgb = cmyk_to_rgb(pixels[..., :4])
        else:
            rgb = pixels[..., :3]
        if alpha is not None:
            return on_white(rgb, alpha, multiplied=self.alpha == _ASSOCIATED)
        return np.ascontiguousarray(rgb)


def pixel_format(page: Any, significant_bits: int | None = None) -> PixelFormat:
    """Return how a tifffile page's samples are to be read.

    Parameters
    ----------
    page
        A ``tifffile.TiffPage``.
    significant_bits
        Bits in use, if the file's metadata say so.

    Raises
    ------
    SlideError
        If the page is of a kind that is not read, or its tags do not settle how.
    """
    photometric, codec = int(page.photometric), int(page.compression)
    turned = page.tags.get("Orientation")
    if turned is not None and turned.value not in (0, 1):
        raise _refusal(
            f"it is stored turned or mirrored (Orientation {int(turned.value)})", "vips autorot IN OUT.tif"
        )
    if photometric not in _COLOUR_SAMPLES:
        name = getattr(page.photometric, "name", photometric)
        raise _refusal(f"photometric interpretation {name} is not read", "vips colourspace IN OUT.tif srgb")
    if page.dtype not in (np.uint8, np.uint16):
        raise _refusal(
            f"pixels are {page.dtype}, not 8 or 16 bits without sign", "vips cast IN OUT.tif uchar"
        )
    alpha = _alpha(page, page.samplesperpixel - _COLOUR_SAMPLES[photometric])
    if codec == JPEG and (photometric == CMYK or alpha):
        raise _refusal("JPEG of four samples: the file does not say whether its inks are inverted")
    if photometric == YCBCR and codec != JPEG:
        raise _refusal(f"YCbCr in codec {codec} is not read", "vips colourspace IN OUT.tif srgb")
    if photometric == CMYK and (inks := page.tags.get("InkSet")) is not None and inks.value != 1:
        raise _refusal("its inks are not CMYK")
    if photometric == PALETTE:
        shape = np.shape(page.colormap)  # () if there is none
        if page.dtype != np.uint8 or len(shape) != 2 or shape[0] != 3 or page.samplesperpixel != 1:
            raise _refusal("its palette is not one of 8 bits", "vips colourspace IN OUT.tif srgb")
        return PixelFormat(photometric, 255, 0, _palette(page.colormap))
    return PixelFormat(photometric, _white(page, significant_bits), alpha)


def is_plain_rgb(page: Any) -> bool:
    """Whether a page is 8-bit RGB of the kind that every reader of TIFF decodes alike."""
    codecs = (JPEG,) if page.photometric == YCBCR else (JPEG, *_PLAIN_CODECS)
    turned = page.tags.get("Orientation")
    return bool(
        page.photometric in (RGB, YCBCR)
        and page.compression in codecs
        and page.dtype == np.uint8
        and page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == 1
        and (turned is None or turned.value in (0, 1))
    )


def unknown_depth() -> SlideError:
    """Return the refusal of 16 bits that may be 10, 12 or 14 in truth."""
    return _refusal(
        "pixels have 16 bits, and the file does not say how many are in use",
        "vips linear IN OUT.tif 0.0623 0 --uchar (255 / 4095: 12 bits)",
    )


def to_8_bits(samples: NDArray[Any], white: int) -> NDArray[np.uint8]:
    """Scale samples so that `white` becomes 255, rounded."""
    if samples.dtype == np.uint8 and white == 255:
        return samples
    scaled = (np.minimum(samples, white).astype(np.uint32) * 255 + white // 2) // white
    return np.asarray(scaled, np.uint8)


def cmyk_to_rgb(inks: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Convert inks ``(..., 4)``, 255 being full, as Pillow does without a colour profile."""
    light = 255 - inks.astype(np.int32)
    ink = inks[..., :3].astype(np.int32) * light[..., 3:]
    ink = (ink + 128 + ((ink + 128) >> 8)) >> 8  # a division by 255 that rounds
    return np.clip(light[..., 3:] - ink, 0, 255).astype(np.uint8)


def on_white(
    rgb: NDArray[np.uint8], alpha: NDArray[np.uint8], *, multiplied: bool = False
) -> NDArray[np.uint8]:
    """Lay pixels on white: areas that a scanner did not record look like glass.

    Parameters
    ----------
    rgb, alpha
        ``(height, width, 3)`` and ``(height, width, 1)``.
    multiplied
        Whether the colours are multiplied with alpha.
    """
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgb)
    glass = 255 - alpha.astype(np.uint16)
    if multiplied:
        return np.asarray(np.minimum(rgb + glass, 255), np.uint8)
    # In integers, with 127 for rounding: the same bits on every machine.
    return np.asarray((rgb.astype(np.uint16) * alpha + 255 * glass + 127) // 255, np.uint8)


def _alpha(page: Any, extra: int) -> int:
    if extra == 0:
        return 0
    if extra == 1 and len(page.extrasamples) == 1 and page.extrasamples[0] in (_ASSOCIATED, _UNASSOCIATED):
        return int(page.extrasamples[0])
    raise _refusal(
        f"it has {page.samplesperpixel} samples a pixel, and the file does not say that the last is transparency",
        "vips extract_band IN OUT.tif 0 --n 3",
    )


def _white(page: Any, significant_bits: int | None) -> int | None:
    bits = int(page.bitspersample)
    if significant_bits is not None and 0 < significant_bits < bits:
        return (1 << significant_bits) - 1
    largest = page.tags.get("MaxSampleValue")
    if page.dtype == np.uint16 and largest is not None:
        value = int(np.max(largest.value))
        if 255 < value < (1 << bits) - 1:
            return value
    return None if bits == 16 else (1 << bits) - 1


def _palette(colormap: NDArray[np.uint16]) -> NDArray[np.uint8]:
    colours = np.asarray(colormap).T.astype(np.uint32)
    # TIFF's palettes have 16 bits. Some writers put 8 there, which libtiff knows by the same sign.
    if colours.max(initial=0) > 255:
        colours = (colours + 128) // 257
    return colours.astype(np.uint8)


def _refusal(what: str, command: str = CONVERT) -> SlideError:
    return SlideError(f"{what}; convert it: {command}")
