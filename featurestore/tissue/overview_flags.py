"""Pen, folds, bubbles and edges on the overview of a slide: classical measures of colour and shape, thresholds stated.

All work in optical density, where a stain adds and the lamp's brightness cancels. Haematoxylin and eosin both absorb green
most; what absorbs red or blue more is ink, what absorbs all alike is dark glue, glass or air.

Terms
    grey    pixels that absorb red, green and blue about alike, as rims of glass and air do
"""

from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.tissue.flags import Flag

FLAG_MPP = 16.0
"""Microns per pixel: strokes, folds and rims are wider than 30 microns, and a finer overview costs four times as much."""
# Haematoxylin absorbs 0.93 times as much red as green, eosin 0.07 (Ruifrok & Johnston 2001): no mixture reaches 1.
PEN_RED_TO_GREEN = 1.08
"""Red over green density from which on it is blue, green or black ink."""
# 0.41 and 0.11 in the same table; blood, orange, comes near 0.8.
PEN_BLUE_TO_GREEN = 0.83
"""Blue over green density from which on it is red, orange or yellow ink, if it is as dense as `RED_INK_DENSITY`."""
RED_INK_DENSITY = 0.8
"""Least blue density of red ink: paler pixels are a yellowish lamp or glue."""
PEN_DENSITY = 0.3
"""Least density of the strongest colour: paler ones are glass."""
BLACK_DENSITY, BLACK_RATIO = 0.9, 0.8
"""Least density of every colour, and of the weakest over the strongest, in black ink."""
PEN_UM2 = 50_000.0
"""Least area of a mark: a stroke of 50 microns is 1 mm long. Pigment and carbon in tissue are smaller."""
FOLD_DENSITY = 1.6
"""Times the green density of the slide's median tissue: tissue that lies double has 2."""
FOLD_MIN_DENSITY = 0.35
"""Least green density of a fold, which keeps pale slides' ordinary tissue out."""
FOLD_HUE = 0.18
"""Largest difference of red over green density from the slide's median: a fold has its tissue's colour, where a dense
group of nuclei is bluer."""
FOLD_UM2 = 40_000.0
"""Least area of a fold."""
FOLD_WIDTH_UM = 200.0
"""Largest width of a fold: what is wider is dense tissue. Narrower dense tissue is still taken for a fold, such as the
epidermis of OpenSlide's test slide CMU-1-Small-Region, which is up to 200 microns wide."""
GREY_DENSITY, GREY_RATIO = 0.12, 0.6
"""Least density of a grey pixel, and of the weakest colour over the strongest: tissue has 0.1 to 0.5."""
RIM_GAP_UM = 64.0
"""Gaps of a bubble's rim up to twice this width are closed."""
BUBBLE_UM2 = 100_000.0
"""Least area inside a rim: 0.36 mm across. Smaller holes of tissue are its own."""
BUBBLE_FILL, BUBBLE_ASPECT = (0.62, 0.92), 1.6
"""Share of its bounding box that a round area fills (a disc: 0.785), and the longest ratio of the box's sides."""
EDGE_UM, EDGE_BEND_UM = 2_000.0, 48.0
"""Length of a line, and how far it may leave the straight: 2 degrees off the axes of the picture."""
GLASS_DENSITY = 0.2
"""Largest density of empty glass under a dim or yellowish lamp: 210 of 255 grey levels."""
MIN_SHARE = 0.1
"""Share of a patch from which on it is flagged: as for tissue."""


def overview_masks(rgb: NDArray[np.uint8], mpp: float) -> tuple[dict[Flag, NDArray[np.bool_]], float]:
    """Find what is wrong on an overview.

    Parameters
    ----------
    rgb, mpp
        ``(height, width, 3)``, and its microns per pixel.

    Returns
    -------
    (dict, float)
        Flag -> mask ``(height, width)``, and the masks' microns per pixel.
    """
    factor = max(1, int(FLAG_MPP / mpp + 1e-6))
    coarse = _binned(rgb, factor)
    mpp *= factor
    density = -np.log((coarse + 1) / 256)
    # What stands out of the glass: a yellowish lamp absorbs, too, and is no ink. No more than a lamp does, since a slide
    # that is covered with tissue or ink shows no glass.
    glass = np.minimum(np.percentile(density[::4, ::4].reshape(-1, 3), 10, axis=0), GLASS_DENSITY)
    density = np.maximum(density - glass, 0)
    pen = pen_mask(density, mpp)
    grey = grey_mask(density) & ~pen
    return {
        Flag.PEN: pen,
        Flag.FOLD: fold_mask(density, mpp, pen),
        Flag.BUBBLE: bubble_mask(grey, mpp),
        Flag.EDGE: edge_mask(grey, mpp),
    }, mpp


def pen_mask(density: NDArray[np.float32], mpp: float) -> NDArray[np.bool_]:
    """Return which pixels are ink, ``(height, width)``; `density` is ``(height, width, 3)`` over the glass."""
    red, green, blue = (_ndimage().uniform_filter(density[..., i], 3) for i in range(3))
    strongest, weakest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    coloured = (red > PEN_RED_TO_GREEN * green) | (
        (blue > PEN_BLUE_TO_GREEN * green) & (blue > RED_INK_DENSITY)
    )
    black = (weakest > BLACK_DENSITY) & (weakest > BLACK_RATIO * strongest)
    ink = (coloured & (strongest > PEN_DENSITY)) | black
    # Opened first: a rim of glass or air has coloured fringes one pixel wide.
    return _larger_than(_ndimage().binary_opening(ink, np.ones((2, 2), bool)), PEN_UM2 / mpp**2)


def fold_mask(density: NDArray[np.float32], mpp: float, pen: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which pixels are tissue that lies double: as dense as two layers, and of one layer's colour."""
    red, green = (_ndimage().uniform_filter(density[..., i], 3) for i in (0, 1))
    tissue = (green > 0.1) & ~pen
    if not tissue.any():
        return np.zeros(tissue.shape, bool)
    usual = float(np.median(green[tissue]))
    hue = red / np.maximum(green, 1e-3)
    same_hue = np.abs(hue - np.median(hue[tissue])) < FOLD_HUE
    dense = green > max(FOLD_MIN_DENSITY, FOLD_DENSITY * usual)
    found = _ndimage().binary_opening(dense & same_hue & ~pen, np.ones((2, 2), bool))
    return _larger_than(found & ~_wider_than(found, FOLD_WIDTH_UM / mpp), FOLD_UM2 / mpp**2)


def grey_mask(density: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which pixels absorb all colours about alike."""
    strongest, weakest = density.max(axis=2), density.min(axis=2)
    return np.asarray((weakest > GREY_DENSITY) & (weakest > GREY_RATIO * strongest))


def bubble_mask(grey: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """Return the round areas inside closed grey rims, with the rims."""
    gap = max(1, round(RIM_GAP_UM / mpp))
    rim = _ndimage().binary_dilation(grey, iterations=gap)
    labels, count = _ndimage().label(_ndimage().binary_fill_holes(rim) & ~rim)
    found = np.zeros(grey.shape, bool)
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    for number, box in enumerate(_ndimage().find_objects(labels), start=1):
        height, width = (side.stop - side.start for side in box)
        fill = sizes[number] / (height * width)
        is_round = BUBBLE_FILL[0] <= fill <= BUBBLE_FILL[1] and max(height, width) <= BUBBLE_ASPECT * min(
            height, width
        )
        if is_round and sizes[number] * mpp**2 >= BUBBLE_UM2:
            found[box] |= labels[box] == number
    # The rim was widened by the gap, and is as wide again.
    return np.asarray(_ndimage().binary_dilation(found, iterations=2 * gap) if found.any() else found)


def edge_mask(grey: NDArray[np.bool_], mpp: float) -> NDArray[np.bool_]:
    """Return long straight grey lines along the sides of the picture."""
    length, bend = round(EDGE_UM / mpp), max(1, round(EDGE_BEND_UM / mpp))
    found = np.zeros(grey.shape, bool)
    for axis in (0, 1):
        if grey.shape[axis] < length:
            continue
        wide = _ndimage().maximum_filter1d(grey, 2 * bend + 1, axis=1 - axis)
        line = _ndimage().minimum_filter1d(wide, length, axis=axis, mode="constant")
        whole = _ndimage().maximum_filter1d(
            line, length, axis=axis, mode="constant", origin=-1 if length % 2 == 0 else 0
        )
        # What is as wide as it is long is no line: a dark field, or the frame of a scan.
        thick = _ndimage().binary_opening(whole, np.ones((8 * bend, 8 * bend), bool))
        found |= whole & ~thick
    return found


def _binned(rgb: NDArray[np.uint8], factor: int) -> NDArray[np.float32]:
    """Return means of squares of pixels; pixels beyond the last whole square are cut off."""
    height, width = (max(1, side // factor) for side in rgb.shape[:2])
    if factor == 1 or min(rgb.shape[:2]) < factor:
        return rgb.astype(np.float32)
    whole = rgb[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
    return np.asarray(whole.mean(axis=(1, 3), dtype=np.float32))


def _wider_than(mask: NDArray[np.bool_], width_px: float) -> NDArray[np.bool_]:
    """Return the parts of a mask into which a disc of this diameter fits."""
    radius = width_px / 2
    middles = _ndimage().distance_transform_edt(mask) > radius
    if not middles.any():
        return np.zeros_like(mask)
    # One pixel more: a disc of pixels is that much smaller than the round edge that it lies in.
    return np.asarray(mask & (_ndimage().distance_transform_edt(~middles) <= radius + 1))


def _larger_than(mask: NDArray[np.bool_], least_px: float) -> NDArray[np.bool_]:
    labels, count = _ndimage().label(mask, np.ones((3, 3), bool))
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    keep = sizes >= least_px
    keep[0] = False
    return np.asarray(keep[labels])


@cache
def _ndimage() -> Any:
    # Here, since the command line lists the flags without measuring any, and scipy.ndimage takes half a second.
    return import_module("scipy.ndimage")
