"""The numbers of `morphology` written again from docs/morphology.md: scipy and numpy, float64, one map at a time."""

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate, gaussian_filter, maximum_filter

Map = NDArray[np.float64]
DYES = np.array([(0.650, 0.704, 0.286), (0.072, 0.990, 0.105)])
STAINS = ("haematoxylin", "eosin", "residual")
SHARES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
FLOOR = 1e-3


def morphology(patch: NDArray[np.uint8]) -> dict[str, float]:
    """Return the numbers of a patch ``(height, width, 3)`` by name."""
    rows = np.array([*DYES, np.cross(*DYES)])
    density = -np.log10((patch.astype(np.float64) + 1) / 256)
    planes = np.moveaxis(density @ np.linalg.inv(rows / np.linalg.norm(rows, axis=1, keepdims=True)), 2, 0)
    half = [_averaged(plane, 2, 2) for plane in planes]
    return _pixels(patch, half) | _texture(list(planes[:2]), half[:2]) | _nuclei(half)


def _averaged(plane: Map, down: int, across: int) -> Map:
    rows, cols = plane.shape[0] // down, plane.shape[1] // across
    return plane[: rows * down, : cols * across].reshape(rows, down, cols, across).mean((1, 3))


def _skew(plane: Map) -> float:
    third = ((plane - plane.mean()) ** 3).mean()
    return float(np.clip(third / (plane.std() + FLOOR) ** 3, -10, 10))


def _correlation(one: Map, other: Map) -> float:
    covariance = np.cov(one.ravel(), other.ravel(), bias=True)[0, 1]
    return float(covariance / (one.std() + FLOOR) / (other.std() + FLOOR))


def _pixels(patch: NDArray[np.uint8], half: list[Map]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, plane in zip(("red", "green", "blue"), np.moveaxis(patch / 255, 2, 0), strict=True):
        found |= {f"{name}.mean": plane.mean(), f"{name}.sd": plane.std()}
    for name, plane in zip(STAINS, half, strict=True):
        found |= {f"{name}.mean": plane.mean(), f"{name}.sd": plane.std(), f"{name}.skew": _skew(plane)}
        found |= {
            f"{name}.p{round(100 * s):02d}": float(np.quantile(plane, s, method="inverted_cdf"))
            for s in SHARES
        }
    for a, b in ((0, 1), (0, 2), (1, 2)):
        found[f"correlation.{STAINS[a]}-{STAINS[b]}"] = _correlation(half[a], half[b])
    return found


def _pairs() -> list[NDArray[np.complex128]]:
    """Return a complex filter an orientation: the even one is its real part, the odd one its imaginary part."""
    y, x = np.mgrid[-3:4, -3:4]
    envelope = np.exp(-(x * x + y * y) / (2 * 1.7**2))
    found = []
    for degrees in (0, 45, 90, 135):
        angle = np.deg2rad(degrees)
        wave = np.exp(2j * np.pi / 5 * (x * np.cos(angle) + y * np.sin(angle)))
        found.append(2 * envelope * (wave - np.average(wave.real, weights=envelope)) / envelope.sum())
    return found


def _texture(planes: list[Map], half: list[Map]) -> dict[str, float]:
    found: dict[str, float] = {}
    finer: list[Map] = []
    for octave in range(5):
        if octave == 1:
            planes = half
        elif octave > 1:
            planes, finer = ([_averaged(plane, 2, 2) for plane in maps] for maps in (planes, finer))
        step = 1 if octave else 2
        bands, textures = [], []
        for stain, plane in zip(STAINS, planes, strict=False):
            responses = np.array(
                [
                    correlate(plane, pair.real, mode="nearest")[::step, ::step]
                    + 1j * correlate(plane, pair.imag, mode="nearest")[::step, ::step]
                    for pair in _pairs()
                ]
            )
            strength = np.abs(responses)
            texture, band = strength.mean(0), responses.real.mean(0)
            name = f"octave{octave}.{stain}"
            overall = strength.mean((1, 2))
            found |= {
                f"{name}.texture": texture.mean(),
                f"{name}.texture_sd": texture.std(),
                f"{name}.band_skew": _skew(band),
                f"{name}.local_anisotropy": strength.max(0).mean() - texture.mean(),
                f"{name}.anisotropy": overall.max() - overall.min(),
            }
            for side in (4, 8):
                sides = [max(1, min(side, length // 2)) for length in texture.shape]
                found[f"{name}.texture_sd_over_{side}"] = _averaged(texture, *sides).std()
            if octave > 1:
                found[f"{name}.lowpass_sd"] = plane.std()
            if octave:
                previous = finer[len(textures)][: texture.shape[0], : texture.shape[1]]
                found[f"{name}.texture_with_finer"] = _correlation(previous, texture)
            bands.append(band)
            textures.append(texture)
        found[f"octave{octave}.correlation.band"] = _correlation(*bands)
        found[f"octave{octave}.correlation.texture"] = _correlation(*textures)
        if octave > 1:
            found[f"octave{octave}.correlation.lowpass"] = _correlation(*planes)
        finer = textures
    return found


def _nuclei(half: list[Map]) -> dict[str, float]:
    sigmas, contrasts = (1.0, 1.41, 2.0, 2.83, 4.0), (0.03, 0.08, 0.16)
    smooth = np.array([gaussian_filter(half[0], s, mode="nearest", radius=17) for s in (*sigmas, 5.66)])
    response = smooth[:-1] - smooth[1:]
    top = response.max(0)
    found: dict[str, float] = {}
    peaks = np.argwhere((response == maximum_filter(top, 5, mode="nearest")) & (response > contrasts[0]))
    at = response[tuple(peaks.T)]
    share = 10_000 / (4 * top.size)
    for contrast in contrasts:
        for size, sigma in enumerate(sigmas):
            found[f"nuclei.sigma{sigma:g}.over{contrast:g}"] = (
                share * ((peaks[:, 0] == size) & (at > contrast)).sum()
            )
        found[f"nuclei.over{contrast:g}"] = share * (at > contrast).sum()
    for size, sigma in enumerate(sigmas):
        found[f"nuclei.sigma{sigma:g}.energy"] = float(np.sqrt((response[size] ** 2).mean()))
    some = len(peaks) + FLOOR
    octaves = peaks[:, 0] / 2
    mean = octaves.sum() / some
    found["nuclei.contrast"] = at.sum() / some
    found["nuclei.log2_sigma"] = mean
    found["nuclei.log2_sigma_sd"] = float(np.sqrt(max(0, (octaves**2).sum() / some - mean**2)))
    for stain, plane in zip(STAINS[:2], half, strict=False):
        found[f"nuclei.{stain}"] = plane[peaks[:, 1], peaks[:, 2]].sum() / some
    return found
