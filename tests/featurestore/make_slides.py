"""Tiny slides with known pixels, written with public libraries."""

from pathlib import Path

import numpy as np
import tifffile


def painted(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with a little noise, ``(height, width, 3)``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 90 * np.sin(x / 17 + k) * np.cos(y / (23 + k)) for k in range(3)]
    return np.clip(np.stack(waves, axis=2) + rng.normal(0, 9, (height, width, 3)), 0, 255).astype(np.uint8)


def tissue_like(width: int, height: int, mpp: float, seed: int = 0) -> np.ndarray:
    """An ellipse of dark nuclei on pink, on a pale background with a halo, ``(height, width, 3)``."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    inside = ((x / width - 0.45) / 0.3) ** 2 + ((y / height - 0.55) / 0.3) ** 2 < 1
    halo = np.exp(-(((x / width - 0.75) / 0.15) ** 2 + ((y / height - 0.6) / 0.2) ** 2))
    image = np.stack([np.full(x.shape, v) for v in (240.0, 228.0, 236.0)], axis=2)
    image[..., 1] -= 30 * halo
    cells = rng.random((int(height * mpp / 10) + 1, int(width * mpp / 10) + 1)) < 0.5
    nuclei = cells[(y * mpp / 10).astype(int), (x * mpp / 10).astype(int)]
    colour = np.where(nuclei[..., None], (95, 60, 140), (225, 160, 195))
    image = np.where(inside[..., None], colour, image) + rng.normal(0, 3, image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def write_pyramid(path: Path, image: np.ndarray, mpp: float, levels: int = 3, tile: int = 64) -> Path:
    """Write a tiled pyramid that OpenSlide reads as generic TIFF; losslessly compressed."""
    per_cm = 1e4 / mpp
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            step = 2**level
            height, width = image.shape[0] // step * step, image.shape[1] // step * step
            blocks = image[:height, :width].reshape(height // step, step, width // step, step, 3)
            tiff.write(
                blocks.mean(axis=(1, 3)).round().astype(np.uint8),
                tile=(tile, tile),
                photometric="rgb",
                compression="zlib",
                resolution=(per_cm / step, per_cm / step),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
            )
    return path
