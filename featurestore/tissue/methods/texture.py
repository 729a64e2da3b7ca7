"""Tissue by its texture, not by its colour: backgrounds are pink, uneven and haloed, but smooth.

The local spread of optical density does not depend on the brightness of the glass, so one setting serves all slides but
faint ones. These are seen by their mask, which holds only the upper tail of the spread, and get a threshold of their own.
"""

from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.tissue.overview import Overview
from featurestore.tissue.tissue_method import TissueMethod


@dataclass(frozen=True)
class TextureSettings:
    """What decides tissue; lengths in microns, so that it means the same on any overview.

    Parameters
    ----------
    texture_um, texture_od
        Side of the square in which the spread of the green optical density is taken, and the
        standard deviation from which on it is tissue.
    dense_od
        Red optical density (against white) from which on a pixel is tissue too, where it touches
        textured tissue: smooth but deeply stained.
    close_um
        Gaps narrower than this are closed.
    hole_um2, speck_um2
        Holes and specks smaller than this are filled and dropped.
    cut_ratio
        A mask whose median spread is less than so many thresholds is cut off by the threshold: tissue is missing.
    haze_ratio
        The same of a lower threshold's mask where the usual threshold finds nothing: what is cut off is haze.
    glass_ratio, least_od
        The threshold of a faint slide: so many times the spread of its glass, and no less than the second.
    """

    texture_um: float = 40.0
    texture_od: float = 0.04
    dense_od: float = 0.35
    close_um: float = 40.0
    hole_um2: float = 60_000.0
    speck_um2: float = 30_000.0
    # Public sections stained as usual have 5 to 6, the palest of them (mouse olfactory bulbs) 2, painted ones of 0.35 of the
    # usual stain, which are found whole, 1.6 to 1.8. Sections that were diluted until a tenth was lost had less than 1.6.
    cut_ratio: float = 1.6
    # Glass with haze alone had up to 1.5, sections of a tenth of the usual stain 1.5 to 2.5.
    haze_ratio: float = 1.5
    # 3 and 4 took haze around an olfactory bulb, diluted to half, for tissue; 5 did not, and lost nothing elsewhere.
    glass_ratio: float = 5.0
    # Grey levels are whole numbers: glass without any noise has a spread of 0 at most places.
    least_od: float = 0.01


SETTINGS = TextureSettings()
GLASS_PERCENTILE = 25
"""Percentile of the spread outside the mask that stands for glass. Of a faint slide the rest of the tissue is there, too; a
slide without glass gets no lower threshold."""


def texture_mask(
    rgb: NDArray[np.uint8], mpp: float, settings: TextureSettings = SETTINGS
) -> NDArray[np.bool_]:
    """Tell tissue from glass on an overview.

    Parameters
    ----------
    rgb, mpp
        Shape ``(height, width, 3)``, and its microns per pixel.

    Returns
    -------
    numpy.ndarray
        Shape ``(height, width)``.
    """
    # Optical density, not grey levels: absorption adds up in it, and dimmer glass only shifts it.
    density = -np.log((rgb.astype(np.float32) + 1) / 256)
    # Green is the one colour that haematoxylin and eosin both absorb, so it shows all tissue.
    green = density[..., 1]
    side = _odd_side(settings.texture_um / mpp)
    spread = _local_sd(green, side)
    dense = (_ndimage().uniform_filter(density[..., 0], side) > settings.dense_od) & (
        _ndimage().uniform_filter(green, side) > settings.dense_od
    )
    mask = _mask_from(spread > settings.texture_od, dense, mpp, settings)
    if not _is_cut(spread, mask, settings.texture_od, settings.cut_ratio):
        return mask
    glass = float(np.percentile(spread[~mask], GLASS_PERCENTILE)) if not mask.all() else np.inf
    lower = max(settings.least_od, settings.glass_ratio * glass)
    if lower >= settings.texture_od:
        return mask
    found = _mask_from(spread > lower, dense, mpp, settings)
    # Where nothing was found there may be nothing but haze, which the lower threshold cuts off as well.
    return found if mask.any() or not _is_cut(spread, found, lower, settings.haze_ratio) else mask


def _mask_from(
    textured: NDArray[np.bool_], dense: NDArray[np.bool_], mpp: float, settings: TextureSettings
) -> NDArray[np.bool_]:
    # Grown from the texture: a smooth dark area that touches none (a frame, an air bubble) is no tissue.
    mask = _ndimage().binary_propagation(textured, mask=textured | dense)
    mask = _close_gaps(mask, _odd_side(settings.close_um / mpp))
    return _drop_small_regions(mask, settings.hole_um2 / mpp**2, settings.speck_um2 / mpp**2)


def _is_cut(spread: NDArray[np.float32], mask: NDArray[np.bool_], threshold: float, ratio: float) -> bool:
    """Tell whether a mask holds only the upper tail of the tissue's spread, or nothing."""
    # Without smooth tissue inside, which was filled in: it says nothing of the threshold.
    textured = spread[mask & (spread > threshold)]
    return not len(textured) or bool(np.median(textured) < ratio * threshold)


@cache
def _ndimage() -> Any:
    # Here, since the registry loads this module to list the methods, and scipy.ndimage takes half a second.
    return import_module("scipy.ndimage")


def _odd_side(pixels: float) -> int:
    """Return the side of a square around a pixel, at least 3: a square of one pixel has no spread."""
    return max(3, 2 * int(pixels // 2) + 1)


def _local_sd(values: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    # In double: the difference of two nearly equal means is what counts here.
    values = values.astype(np.float64)
    mean = _ndimage().uniform_filter(values, side)
    variance = _ndimage().uniform_filter(values**2, side) - mean**2
    return np.asarray(np.sqrt(np.maximum(variance, 0)), dtype=np.float32)


def _close_gaps(mask: NDArray[np.bool_], side: int) -> NDArray[np.bool_]:
    # Padded, or erosion would eat tissue that runs off the slide.
    padded = np.pad(mask, side, mode="edge")
    closed = _ndimage().binary_closing(padded, np.ones((side, side), bool))
    return np.asarray(closed[side:-side, side:-side] | mask)


def _drop_small_regions(mask: NDArray[np.bool_], hole_px: float, speck_px: float) -> NDArray[np.bool_]:
    # Holes first: a ring whose hole is filled may be large enough to be no speck.
    for target, smallest, becomes in ((False, hole_px, True), (True, speck_px, False)):
        labels, count = _ndimage().label(mask == target)
        sizes = np.bincount(labels.ravel(), minlength=count + 1)
        # A slide smaller than a speck is judged by itself.
        small = sizes < min(smallest, mask.size / 4)
        small[0] = False  # label 0 is what is not looked for
        mask = np.where(small[labels], becomes, mask)
    return mask.astype(bool)


def _mask(overview: Overview) -> NDArray[np.bool_]:
    return texture_mask(overview.rgb, overview.mpp)


RECORD = TissueMethod(
    "texture",
    "local spread of optical density: tissue is rough where glass, halo and background are smooth",
    _mask,
    # 1 had no threshold for faint slides; all others have the same mask.
    version=2,
    parameters=asdict(SETTINGS),
)
