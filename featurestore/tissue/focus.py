"""Which patches are out of focus, from their own pixels: how much of the contrast at 4 microns is there at half a micron.

Blur takes away fine contrast and leaves coarse contrast. The ratio of the two hardly depends on how strongly a slide is
stained. It compares differences of neighbouring pixels before and after blurring, as Crete et al. (2007), "The blur effect",
do with a filter; here the coarser differences stand for the filtered ones.
"""

import numpy as np
from numpy.typing import NDArray

FINE_UM = 0.5
"""Distance of the finer differences. Below it lenses show little: at 0.25 microns a sharp patch would look blurred."""
COARSER = 8
"""The coarser differences, in finer ones: 4 microns, half a nucleus. At 2 microns strong blur leaves too little contrast."""
MAX_RATIO = 0.035
"""A patch with less is out of focus. Tissue patches of two public slides (0.5 and 0.7 microns per pixel) have medians of
0.07 and 0.13, and tenth percentiles of 0.05 and 0.09. Blurred by a Gaussian of 0.7 microns their medians are 0.04, of 1.4
microns 0.02."""
NOISE = 2.0
"""Grey levels (standard deviation) of a camera's and JPEG's noise, which blur does not touch: without it a strongly blurred
patch would look sharp."""
MIN_CONTRAST = 6.0
"""Grey levels: a patch whose coarser differences are smaller, as of glass or fat, is not judged."""
MAX_ROWS = 7
"""Rows of a patch that are measured, evenly spaced, or one more: the measure runs on every patch that is read, and costs a
tenth of decoding it."""
EXACT_PX = 256
"""Squares of so many differences of bytes add up to less than 2^24, to which float32 counts whole numbers exactly. So a flag
depends neither on the batch that a patch came in nor on the processor: a resumed run gives equal bytes."""


def is_blurred(pixels: NDArray[np.uint8], mpp: float) -> NDArray[np.bool_]:
    """Tell which patches are out of focus.

    Parameters
    ----------
    pixels
        RGB, ``(n, side, side, 3)``.
    mpp
        Microns per pixel.

    Returns
    -------
    numpy.ndarray
        Bool, ``(n,)``.
    """
    fine, coarse = contrasts(pixels, mpp)
    return (coarse >= MIN_CONTRAST**2) & (fine < MAX_RATIO * coarse)


def contrasts(pixels: NDArray[np.uint8], mpp: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean squared finer and coarser differences of each patch's green, without those of noise, ``(n,)`` each.

    Both are 0 of patches that are not larger than the distance of the coarser differences.
    """
    fine_px = max(1, round(FINE_UM / mpp))
    coarse_px = COARSER * fine_px
    stop = pixels.shape[1] - coarse_px
    if stop <= 0:
        return np.zeros(len(pixels)), np.zeros(len(pixels))
    every = max(1, pixels.shape[1] // MAX_ROWS)
    # Green: both stains of tissue absorb it. Whole rows, since a column of pixels touches the memory of all rows.
    row = pixels[:, 0:stop:every, :, 1].astype(np.float32)
    found = []
    for step in (fine_px, coarse_px):
        below = pixels[:, step : stop + step : every, :, 1].astype(np.float32)
        # Across and down, so that a blur along one axis alone shows, too.
        squares = (_mean_square(row[..., step:] - row[..., :-step]) + _mean_square(below - row)) / 2
        found.append(
            np.maximum(squares - 2 * NOISE**2, 0)
        )  # a difference of two pixels has the noise of both
    return found[0], found[1]


def _mean_square(differences: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the mean square of each patch's differences ``(n, rows, pixels)``, ``(n,)``."""
    n, n_rows, width = differences.shape
    total = np.zeros(n)
    for first in range(0, width, EXACT_PX):
        part = differences[..., first : first + EXACT_PX]
        total += np.einsum("nrd,nrd->nr", part, part).sum(axis=1, dtype=np.float64)
    return np.asarray(total / (n_rows * width))
