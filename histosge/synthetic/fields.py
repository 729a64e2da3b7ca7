"""Random fields and their interpolation: arithmetic alone.

Terms
    lattice   positions every `LATTICE_UM` microns over the slide; position (i, j) has its centre at
              ``((j + 0.5), (i + 0.5)) * LATTICE_UM`` microns from the slide's top-left
"""

import numpy as np
from numpy.typing import NDArray
from scipy import fft

LATTICE_UM = 8.0


def lattice_shape(size_um: tuple[float, float]) -> tuple[int, int]:
    """Return ``(n_y, n_x)`` positions that cover ``(width, height)`` microns."""
    width, height = size_um
    return int(np.ceil(height / LATTICE_UM - 1e-9)), int(np.ceil(width / LATTICE_UM - 1e-9))


def centres_um(n: int) -> NDArray[np.float64]:
    """Return the centres of `n` lattice positions along one axis, in microns."""
    return (np.arange(n, dtype=np.float64) + 0.5) * LATTICE_UM


def smooth_noise(
    rng: np.random.Generator,
    shape: tuple[int, int],
    sigma: float | tuple[float, float],
    *,
    periodic: bool = False,
) -> NDArray[np.float32]:
    """Draw white noise smoothed by a Gaussian, with mean 0 and standard deviation 1.

    Parameters
    ----------
    sigma
        Of the Gaussian in positions, or ``(sigma_y, sigma_x)``.
    periodic
        Make opposite borders fit, for textures that are repeated.
    """
    sigmas = (sigma, sigma) if isinstance(sigma, float | int) else sigma
    padded = tuple(
        n if periodic else fft.next_fast_len(n + int(3 * s) + 1, real=True)
        for n, s in zip(shape, sigmas, strict=True)
    )
    white = rng.standard_normal(padded, dtype=np.float32)
    fy = np.exp(-2 * (np.pi * sigmas[0] * fft.fftfreq(padded[0])) ** 2)[:, None]
    fx = np.exp(-2 * (np.pi * sigmas[1] * fft.rfftfreq(padded[1])) ** 2)[None]
    values = fft.irfft2(fft.rfft2(white) * (fy * fx).astype(np.float32), s=padded)[: shape[0], : shape[1]]
    values = values - values.mean()
    return np.asarray(values / max(float(values.std()), 1e-12), dtype=np.float32)


def interpolation(n: int, at: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return the matrix that interpolates `n` lattice values linearly.

    Parameters
    ----------
    at
        Positions in lattice units, 0 = the first position's centre; held at the ends.

    Returns
    -------
    numpy.ndarray
        Shape ``(len(at), n)``; ``interpolation(...) @ values`` are the interpolated values.
    """
    place = np.clip(at, 0, n - 1)
    low = np.minimum(place.astype(int), max(n - 2, 0))
    part = (place - low).astype(np.float32)
    weights = np.zeros((len(at), n), np.float32)
    rows = np.arange(len(at))
    weights[rows, low] = 1 - part
    if n > 1:
        weights[rows, low + 1] = part
    return weights
