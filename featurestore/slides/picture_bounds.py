"""What a file claims of its pixels and metadata, checked before memory is taken or another library believes it.

A few bytes of a header can claim terabytes: OpenSlide ends the process when it cannot get them, and decoders take what a
stream's header names, whatever the file around it says.
"""

from typing import Any, Literal

from featurestore.errors import SlideError
from featurestore.slides.tiff_colours import CONVERT

LARGEST_PX = 1 << 27
"""Pixels of one picture, tile or strip that are decoded at once, whatever its size in the file: 400 MB of RGB."""
MOST_PX_PER_BYTE = 64
"""Larger ones may hold this many pixels for each byte of their file. JPEG of white glass reaches 50, of tissue 10."""
MAX_PLANES = 10_000
"""Planes of an OME image: tifffile makes a list of them before it looks whether the file holds any."""
_SOI, _SOF_FIRST, _SOF_LAST = b"\xff\xd8", 0xC0, 0xCF
_NOT_FRAMES = (0xC4, 0xC8, 0xCC)
_J2K = b"\xff\x4f\xff\x51"
_PNG = b"\x89PNG\r\n\x1a\n"
_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
EXIF_WITHIN = 1 << 20
"""Bytes from the beginning in which EXIF stands: before the pixels, after an embedded preview or colour profile."""
_JPEG2000_BOX = b"\x00\x00\x00\x0cjP  "


def frame_header(data: bytes) -> tuple[int, int, int] | None:
    """Return ``(width, height, samples)`` of a PNG (0 samples), JPEG or JPEG 2000 stream; None if it shows none."""
    if data.startswith(_PNG):
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big"), 0
    if data.startswith((_J2K, _JPEG2000_BOX)):
        at = data.find(_J2K)
        sides = [int.from_bytes(data[at + k : at + k + 4], "big") for k in (8, 12, 16, 20)]
        return (sides[0] - sides[2], sides[1] - sides[3], 0) if at >= 0 else None
    if not data.startswith(_SOI):
        return None
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        # All frame headers (SOF0 to SOF15) but the three of their numbers that are other segments.
        if _SOF_FIRST <= marker <= _SOF_LAST and marker not in _NOT_FRAMES:
            height, width = (int.from_bytes(data[at + k : at + k + 2], "big") for k in (5, 7))
            return width, height, data[at + 9]
        at += 1 if marker == 0xFF else 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def exif_orientation(data: bytes) -> int:
    """Return the orientation that the EXIF of a JPEG or PNG states, 1 to 8; 0 if it states none."""
    start = data.find(_EXIF, 0, EXIF_WITHIN) + len(_EXIF)
    if start < len(_EXIF):
        start = data.find(b"eXIf", 0, EXIF_WITHIN) + 4 if data.startswith(_PNG) else 0
        if start < 4:
            return 0
    exif = data[start : start + (1 << 16)]
    order: Literal["little", "big"] = "little" if exif[:2] == b"II" else "big"
    at = int.from_bytes(exif[4:8], order)
    for entry in range(at + 2, at + 2 + 12 * int.from_bytes(exif[at : at + 2], order), 12):
        if int.from_bytes(exif[entry : entry + 2], order) == _ORIENTATION:
            return int.from_bytes(exif[entry + 8 : entry + 10], order)
    return 0


def check_pixels(width: int, height: int, file_bytes: int) -> None:
    """Refuse a picture, tile or strip that is too large to be decoded at once.

    Raises
    ------
    SlideError
        With the size and the command that writes tiles.
    """
    if width * height > max(LARGEST_PX, MOST_PX_PER_BYTE * file_bytes):
        raise SlideError(
            f"one piece of it is said to hold {width} x {height} px, in {file_bytes} bytes; if that is true, convert it: "
            f"{CONVERT}"
        )


def check_stream(data: bytes, width: int, height: int) -> None:
    """Refuse a compressed tile or strip whose own header names more pixels than the file gives it.

    Raises
    ------
    SlideError
        With both sizes.
    """
    found = frame_header(data)
    # A strip's last piece may be cut: rows more than the strip's are no fault, and cost no more than a full one.
    if found is not None and found[0] * found[1] > 2 * max(width * height, 1 << 16):
        raise SlideError(f"a piece of {width} x {height} px holds a stream of {found[0]} x {found[1]}")


def check_layout(page: Any) -> None:
    """Refuse a TIFF page whose sizes cannot be true: no pixels, no tile size, fewer tiles or strips than it needs.

    Raises
    ------
    SlideError
        With what the page claims.
    """
    width, height = int(page.imagewidth), int(page.imagelength)
    if width < 1 or height < 1:
        raise SlideError(f"a page of {width} x {height} px")
    strip = width, min(int(page.rowsperstrip), height)
    tile = (int(page.tilewidth), int(page.tilelength)) if page.is_tiled else strip
    if tile[0] < 1 or tile[1] < 1:
        raise SlideError(f"a page with tiles or strips of {tile[0]} x {tile[1]} px")
    # A tile of one row, or one that is larger than the page, is odd but right; one of 2**31 makes OpenSlide abort.
    if page.is_tiled and tile[0] * tile[1] > LARGEST_PX:
        raise SlideError(f"a page with tiles of {tile[0]} x {tile[1]} px")
    needed = -(-width // tile[0]) * -(-height // tile[1])
    needed *= int(page.samplesperpixel) if page.planarconfig != 1 else 1
    listed = min(len(page.dataoffsets), len(page.databytecounts))
    if listed < needed:
        raise SlideError(
            f"a page of {width} x {height} px lists {listed} of the {needed} tiles or strips it needs"
        )


def check_text(text: str) -> None:
    """Refuse XML that defines entities: a few of them grow to gigabytes, or name other files.

    Raises
    ------
    SlideError
        If there is a document type or an entity.
    """
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise SlideError(f"its XML defines entities, which no scanner writes; convert it: {CONVERT}")
