"""Smooth random fields, and how a coarse field is read at pixels: arithmetic only.

Terms
    field    float32, ``(y, x)``; element (i, j) stands at its cell's centre
    length   standard deviation of the smoothing Gaussian, in cells
"""

import numpy as np
from numpy.typing import NDArray
from scipy import fft

Field = NDArray[np.float32]


def random_field(
    shape: tuple[int, int], length: float | tuple[float, float], rng: np.random.Generator
) -> Field:
    """Draw a smooth periodic field with mean 0 and standard deviation 1.

    Parameters
    ----------
    length
        One number, or ``(down, across)``.
    """
    down, across = length if isinstance(length, tuple) else (length, length)
    noise = rng.standard_normal(shape, dtype=np.float32)
    # The Fourier transform of a Gaussian: exp(-2 (pi sigma f)^2), with f in cycles per cell.
    gain_y = np.exp(-2 * (np.pi * down * fft.fftfreq(shape[0])) ** 2)
    gain_x = np.exp(-2 * (np.pi * across * fft.rfftfreq(shape[1])) ** 2)
    gain = np.outer(gain_y, gain_x).astype(np.float32)
    gain[0, 0] = 0  # the mean
    # Circular, so a field is periodic: textures repeat without a seam.
    smooth = fft.irfft2(fft.rfft2(noise) * gain, s=shape)
    return np.asarray(smooth / max(float(smooth.std()), 1e-12), dtype=np.float32)


def smoothed(values: NDArray[np.float32], length: float) -> Field:
    """Smooth a field with a Gaussian; edges are mirrored."""
    from scipy import ndimage

    return np.asarray(ndimage.gaussian_filter(values, length, mode="reflect", truncate=3.0), dtype=np.float32)


def interpolate(field: Field, rows: NDArray[np.floating], cols: NDArray[np.floating]) -> Field:
    """Interpolate a field at every crossing of `rows` and `cols`.

    Parameters
    ----------
    rows, cols
        Positions in cells from the field's corner (the first centre is at 0.5); clamped to the field.

    Returns
    -------
    numpy.ndarray
        Shape ``(len(rows), len(cols))``.
    """
    top, bottom, down = _neighbours(rows, field.shape[0])
    left, right, across = _neighbours(cols, field.shape[1])
    lines = field[top] + (field[bottom] - field[top]) * down[:, None]
    start = np.take(lines, left, axis=1)
    # In place: this is called for every strip of pixels, and new memory costs as much as the arithmetic.
    step = np.take(lines, right, axis=1)
    step -= start
    step *= across
    step += start
    return step


def _neighbours(at: NDArray[np.floating], n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Field]:
    place = np.clip(at - 0.5, 0, n - 1)
    first = np.floor(place).astype(np.int64)
    return first, np.minimum(first + 1, n - 1), (place - first).astype(np.float32)
