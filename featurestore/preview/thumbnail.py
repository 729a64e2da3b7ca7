"""The picture of one slide, small, with the outline of its tissue drawn in."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featurestore.grid import PatchGrid
from featurestore.slides.protocol import Slide
from featurestore.tissue.overview import read_overview

LONGEST_PX = 384
"""Longer side: twice the width of a card, for dense screens; about 15 kB, so 5,000 slides take 75 MB."""
OUTLINE = (0, 151, 157)
"""The page's accent, which no stain of tissue comes near."""
QUALITY = 82
"""Of JPEG: below 80 the outline frays."""
VERSION = 1
"""Raised when the same slide gives another picture: part of a file's name, so that older ones are drawn anew."""


def slide_picture(slide: Slide) -> tuple[NDArray[np.uint8], float]:
    """Read a slide at the scale of a thumbnail.

    Returns
    -------
    (numpy.ndarray, float)
        RGB, ``(height, width, 3)``, and its microns per pixel.

    Raises
    ------
    SlideError
        If the slide cannot be read.
    """
    mpp = max(slide.size_px) * slide.mpp / LONGEST_PX
    overview = read_overview(slide, mpp)
    return overview.rgb, overview.mpp


def colours_picture(rgb: NDArray[np.uint8], grid: PatchGrid) -> tuple[NDArray[np.uint8], float]:
    """Make a picture of the mean colours of a grid's patches, see `slide_picture`.

    Parameters
    ----------
    rgb
        ``(n_rows, n_cols, 3)``.
    """
    (left, right), (top, bottom) = _edges_um(grid.x_um, grid), _edges_um(grid.y_um, grid)
    mpp = max(right, bottom, 1.0) / LONGEST_PX
    height, width = max(1, round(bottom / mpp)), max(1, round(right / mpp))
    picture = np.full((height, width, 3), 255, np.uint8)
    inside_y, inside_x = slice(round(top / mpp), height), slice(round(left / mpp), width)
    rows, cols = _nearest(height, mpp, grid.y_um)[inside_y], _nearest(width, mpp, grid.x_um)[inside_x]
    picture[inside_y, inside_x] = rgb[np.ix_(rows, cols)]
    return picture, mpp


def _edges_um(centres: NDArray[np.float64], grid: PatchGrid) -> tuple[float, float]:
    """Return where the first patch begins and the last one ends, not before the slide's own edge."""
    half = grid.spec.patch_px * grid.effective_mpp / 2
    return max(0.0, float(centres[0]) - half), float(centres[-1]) + half


def _nearest(n: int, mpp: float, centres: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return, for each pixel along one side of a picture, the patch whose centre is nearest."""
    step = float(centres[1] - centres[0]) if len(centres) > 1 else 1.0
    index = np.round(((np.arange(n) + 0.5) * mpp - float(centres[0])) / step)
    return np.clip(index, 0, len(centres) - 1).astype(np.intp)


def outlined(
    picture: NDArray[np.uint8], mpp: float, grid: PatchGrid, tissue: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """Draw the outline of the patches that are tissue.

    Parameters
    ----------
    picture, mpp
        As `slide_picture` returns them.
    tissue
        ``(n_rows, n_cols)``.
    """
    height, width = picture.shape[:2]
    mask = tissue[np.ix_(_nearest(height, mpp, grid.y_um), _nearest(width, mpp, grid.x_um))]
    inner = mask.copy()
    # Two pixels wide, inside the tissue: one alone is lost when the browser scales the picture down.
    for _ in range(2):
        padded = np.pad(inner, 1)
        inner = (
            padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        )
    drawn = picture.copy()
    drawn[mask & ~inner] = OUTLINE
    return drawn


def jpeg(picture: NDArray[np.uint8]) -> bytes:
    """Return a picture as a JPEG."""
    file = io.BytesIO()
    # Colour at full size: halved, it would grey the outline, which is two pixels wide.
    Image.fromarray(picture).save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
