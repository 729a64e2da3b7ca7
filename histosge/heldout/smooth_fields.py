"""Smooth random fields on a section: values that are alike at neighbouring places and have nothing to do with the picture.

They are what a control needs beside white noise. Genes are smooth in space, so anything else that is smooth correlates
with them by chance far more often than independent spots would. Arithmetic only.

Terms
    correlation length   distance, in spot pitches, at which the correlation of a field is exp(-1/2)
    pitch                distance from a spot's centre to the nearest other one, median of a section, microns
"""

import numpy as np
from numpy.typing import NDArray
from scipy import fft
from scipy.spatial import cKDTree

LENGTHS = (0.5, 1.5, 3.0, 5.0)
"""Correlation lengths in spot pitches: from nearly independent spots to a handful of independent places in a section of
200 spots. Those of measured genes lie between."""
_PADDING = 3.0
"""Correlation lengths that a field is continued beyond the grid. A Fourier transform makes it periodic: without padding
opposite edges would be equal; at 3 lengths their correlation is 0.01."""
_VALUES_AT_ONCE = 1 << 22


def spot_pitch_um(xy_um: NDArray[np.floating]) -> float:
    """Return the median distance of spots, ``(n_spots, 2)`` microns, to their nearest neighbour; 1 for a lone spot."""
    if len(xy_um) < 2:
        return 1.0
    distance = np.asarray(cKDTree(xy_um).query(xy_um, k=2)[0])
    return float(np.median(distance[:, 1]))


def smooth_fields_on_grid(
    rows: NDArray[np.int64], cols: NDArray[np.int64], length: float, n_fields: int, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Draw Gaussian random fields of unit variance at positions of a grid, ``(n_positions, n_fields)``.

    The correlation at distance d is ``exp(-d**2 / (2 * length**2))``.

    Parameters
    ----------
    rows, cols
        Positions, ``(n_positions,)`` each.
    length
        Correlation length in steps of the grid.
    """
    rows, cols = rows - rows.min(), cols - cols.min()
    pad = int(np.ceil(_PADDING * length))
    n_rows, n_cols = (fft.next_fast_len(int(at.max()) + 1 + pad, real=True) for at in (rows, cols))
    # The transfer function of a Gaussian filter of this standard deviation, whose output has the correlation above.
    sigma = length / np.sqrt(2)
    gain = np.outer(
        np.exp(-2 * (np.pi * sigma * fft.fftfreq(n_rows)) ** 2),
        np.exp(-2 * (np.pi * sigma * fft.rfftfreq(n_cols)) ** 2),
    ).astype(np.float32)
    # Per field, so that no field is flatter than others because its draw was; the mean over the padded grid stays.
    scale = np.sqrt(n_rows * n_cols / _power(gain, n_cols))
    fields = np.empty((len(rows), n_fields), np.float32)
    step = max(1, _VALUES_AT_ONCE // (n_rows * n_cols))
    for start in range(0, n_fields, step):
        stop = min(start + step, n_fields)
        noise = rng.standard_normal((stop - start, n_rows, n_cols), dtype=np.float32)
        smooth = fft.irfft2(fft.rfft2(noise) * gain, s=(n_rows, n_cols))
        fields[:, start:stop] = (smooth[:, rows, cols] * scale).T
    return fields


def _power(gain: NDArray[np.float32], n_cols: int) -> float:
    """Return the sum of squares of a transfer function over all frequencies; `gain` holds half of the columns."""
    square = gain.astype(np.float64) ** 2
    # A real transform leaves out the columns that mirror others: all but the first, and the last of an even number.
    twice = square[:, 1 : (n_cols + 1) // 2]
    return float(square.sum() + twice.sum())
