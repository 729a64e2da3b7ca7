"""A tile of a TIFF as a JPEG stream of its own: the level's tables and the colours of the TIFF's tag before its bytes."""

import numpy as np
import simplejpeg
from numpy.typing import NDArray

_SOI = b"\xff\xd8"
# libjpeg guesses a stream's colours from its markers; OpenSlide goes by the TIFF's tag. So the marker is set.
_IS_YCBCR = b"\xff\xe0\x00\x10JFIF\x00\x01\x01\x00\x00\x01\x00\x01\x00\x00"
_IS_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
_COLOUR_MARKERS = (0xE0, 0xEE)


def stream_header(tables: bytes | None, *, rgb: bool) -> bytes:
    """Return what goes before the bytes of each tile of a level.

    Parameters
    ----------
    tables
        Quantisation and Huffman tables that the tiles share, as a stream; None if each tile has its own.
    rgb
        Whether the TIFF's tag says that its pixels are RGB; otherwise they are YCbCr.
    """
    shared = tables or _SOI + b"\xff\xd9"
    return _SOI + (_IS_RGB if rgb else _IS_YCBCR) + _without_colour_markers(shared)[2:-2]


def stream_body(data: bytes, *, rgb: bool) -> bytes:
    """Return what goes behind `stream_header`, from the bytes of one tile.

    Raises
    ------
    ValueError
        If they are no JPEG stream.
    """
    if not data.startswith(_SOI):
        raise ValueError(f"it starts with {data[:2].hex()}, not as JPEG")
    # A JFIF marker outranks all others, so only for RGB do the stream's own markers have to go.
    return (_without_colour_markers(data) if rgb else data)[2:]


def decode_stream(stream: bytes, out: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode a stream to RGB; the result is `out` where it has the tile's shape.

    Raises
    ------
    ValueError
        If the stream is damaged or cut off.
    """
    try:
        return np.asarray(simplejpeg.decode_jpeg(stream, buffer=out))
    except ValueError as error:
        if "extraneous bytes before marker 0xd9" not in str(error):
            raise
        # Bytes after the last pixel: the picture is whole, and OpenSlide shows it.
        return np.asarray(simplejpeg.decode_jpeg(stream, buffer=out, strict=False))


def _without_colour_markers(stream: bytes) -> bytes:
    """Drop the segments from which libjpeg infers the colours: JFIF and Adobe."""
    at, kept = 2, [stream[:2]]
    while at + 4 <= len(stream) and stream[at] == 0xFF and stream[at + 1] not in (0xDA, 0xD9):
        stop = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        if stream[at + 1] not in _COLOUR_MARKERS:
            kept.append(stream[at:stop])
        at = stop
    return b"".join([*kept, stream[at:]])
