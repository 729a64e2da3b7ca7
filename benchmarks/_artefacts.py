"""Slides with painted artefacts: pen, folds, bubbles, edges and blur, with the truth of each as a mask.

Stains, ink and glass are painted in optical density, where they add; every slide has its own stain, lamp and noise.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy import ndimage

MPP = 1.0
HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
INKS = {
    "black": (1.9, 1.9, 1.9),
    "blue": (1.9, 1.1, 0.25),
    "green": (1.5, 0.35, 1.1),
    "red": (0.15, 1.5, 1.6),
}
"""Optical densities of felt-tip pens on glass, over the whole stroke."""


@dataclass
class ArtefactSlide:
    """A painted slide.

    Parameters
    ----------
    rgb
        ``(height, width, 3)`` at `MPP`.
    tissue
        Which pixels are tissue.
    truth
        Name of a flag -> which pixels have it.
    """

    rgb: NDArray[np.uint8]
    tissue: NDArray[np.bool_]
    truth: dict[str, NDArray[np.bool_]] = field(default_factory=dict)


def paint(
    seed: int,
    artefacts: tuple[str, ...] = (),
    *,
    size_px: tuple[int, int] = (3584, 2560),
    ink: str | None = None,
) -> ArtefactSlide:
    """Paint a slide with some artefacts.

    Parameters
    ----------
    artefacts
        Of ``pen``, ``fold``, ``bubble``, ``edge``, ``blur``.
    size_px
        ``(width, height)``.
    ink
        Colour of the pen; drawn at random if None.
    """
    rng = np.random.default_rng(seed)
    width, height = size_px
    tissue = _blob(rng, height, width)
    density = _stained(rng, tissue)
    truth = {name: np.zeros((height, width), bool) for name in ("pen", "blur", "fold", "bubble", "edge")}
    if "fold" in artefacts:
        truth["fold"] = _stroke(rng, tissue, 60, 140) & tissue
        shift = np.roll(density, (37, 53), axis=(0, 1))  # the other layer is other tissue
        density = density + np.where(truth["fold"][..., None], np.maximum(shift, 0.7 * density), 0)
    if "pen" in artefacts:
        truth["pen"] = _stroke(rng, tissue, 90, 220)
        colour = INKS[ink or rng.choice(list(INKS))]
        thickness = 0.75 + 0.25 * _smooth_noise(rng, height, width, 60)
        density = density + truth["pen"][..., None] * thickness[..., None] * np.array(colour)
    if "bubble" in artefacts:
        distance = _bubble(rng, tissue)
        truth["bubble"] = distance < 1
        rim = np.exp(-(((distance - 0.97) / 0.035) ** 2)) * rng.uniform(0.6, 1.4)
        density = density + rim[..., None] * np.array([1.0, 1.02, 1.04])
    if "edge" in artefacts:
        truth["edge"] = _edge(rng, height, width)
        grey = ndimage.gaussian_filter(truth["edge"].astype(np.float32), 4) * rng.uniform(0.5, 1.2)
        density = density + grey[..., None] * np.array([1.0, 1.0, 1.05])
    lamp = rng.uniform(225, 250) * np.array([1.0, rng.uniform(0.96, 1.0), rng.uniform(0.94, 1.0)])
    picture = lamp * np.exp(-density)
    if "blur" in artefacts:
        truth["blur"] = _half(rng, height, width)
        sigma = rng.uniform(2.0, 5.0)
        blurred = np.stack([ndimage.gaussian_filter(picture[..., i], sigma) for i in range(3)], axis=2)
        picture = np.where(truth["blur"][..., None], blurred, picture)
    picture = picture + rng.normal(0, rng.uniform(1.0, 2.5), picture.shape)
    return ArtefactSlide(np.clip(picture, 0, 255).astype(np.uint8), tissue, truth)


def write_slide(path: Path, slide: ArtefactSlide, levels: int = 3) -> Path:
    """Write a slide as a JPEG-tiled pyramid."""
    per_cm = 1e4 / MPP
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            step = 2**level
            height, width = (side // step * step for side in slide.rgb.shape[:2])
            blocks = slide.rgb[:height, :width].reshape(height // step, step, width // step, step, 3)
            tiff.write(
                blocks.mean(axis=(1, 3)).round().astype(np.uint8),
                tile=(256, 256),
                photometric="rgb",
                compression="jpeg",
                compressionargs={"level": 85},
                resolution=(per_cm / step, per_cm / step),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level else 0,
            )
    return path


def _smooth_noise(rng: np.random.Generator, height: int, width: int, scale: float) -> NDArray[np.float32]:
    """Return smooth noise from -1 to 1 with features of about `scale` pixels."""
    small = rng.normal(size=(int(height / scale) + 4, int(width / scale) + 4))
    zoomed = ndimage.zoom(small, scale, order=3)[:height, :width]
    return np.asarray(zoomed / np.abs(zoomed).max(), np.float32)


def _blob(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    y, x = np.mgrid[:height, :width].astype(np.float32)
    radius = ((x / width - 0.5) / 0.36) ** 2 + ((y / height - 0.5) / 0.36) ** 2
    return np.asarray(radius + 0.5 * _smooth_noise(rng, height, width, 300) < 1)


def _stained(rng: np.random.Generator, tissue: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the optical density of tissue with nuclei, ``(height, width, 3)``."""
    height, width = tissue.shape
    strength = rng.uniform(0.6, 1.3)
    nuclei = np.zeros(tissue.shape, np.float32)
    crowd = 0.5 + 0.5 * _smooth_noise(rng, height, width, 180)
    n = int(tissue.size / 260)
    rows, cols = rng.integers(0, height, n), rng.integers(0, width, n)
    kept = rng.random(n) < crowd[rows, cols]
    nuclei[rows[kept], cols[kept]] = rng.uniform(0.6, 1.4, kept.sum())
    # Discs of 3 pixels' radius with sharp edges, as lenses show nuclei.
    nuclei = ndimage.grey_dilation(nuclei, footprint=np.hypot(*np.mgrid[-3:4, -3:4]) <= 3)
    texture = 0.3 + 0.1 * _smooth_noise(rng, height, width, 8) + 0.1 * _smooth_noise(rng, height, width, 70)
    density = nuclei[..., None] * np.array(HAEMATOXYLIN) * 1.0 + texture[..., None] * np.array(EOSIN)
    return np.asarray(density * strength * tissue[..., None], np.float32)


def _stroke(
    rng: np.random.Generator, tissue: NDArray[np.bool_], thin: float, thick: float
) -> NDArray[np.bool_]:
    """Return a curved stroke of some width in pixels, across the middle of the tissue."""
    height, width = tissue.shape
    angle, bend, t = rng.uniform(0, np.pi), rng.uniform(-0.5, 0.5), np.linspace(-1, 1, 2000)
    along, across = 0.33 * min(height, width) * t, 0.3 * min(height, width) * bend * (t**2 - 0.5)
    x = width * rng.uniform(0.42, 0.58) + np.cos(angle) * along - np.sin(angle) * across
    y = height * rng.uniform(0.42, 0.58) + np.sin(angle) * along + np.cos(angle) * across
    line = np.ones(tissue.shape, bool)
    line[np.clip(y, 0, height - 1).astype(int), np.clip(x, 0, width - 1).astype(int)] = False
    return np.asarray(ndimage.distance_transform_edt(line) < rng.uniform(thin, thick) / 2)


def _bubble(rng: np.random.Generator, tissue: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return the distance from a bubble's middle, 1 at its rim."""
    height, width = tissue.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    radius = rng.uniform(280, 620)
    squeeze = rng.uniform(0.85, 1.15)
    dy, dx = (y - height * rng.uniform(0.35, 0.65)) / squeeze, (x - width * rng.uniform(0.35, 0.65)) * squeeze
    return np.hypot(dy, dx) / radius


def _edge(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """Return a straight band across the picture, along one of its sides."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    slope, place, half = rng.uniform(-0.008, 0.008), rng.uniform(0.25, 0.75), rng.uniform(15, 35)
    if rng.random() < 0.5:
        return np.asarray(np.abs(y - place * height - slope * x) < half)
    return np.asarray(np.abs(x - place * width - slope * y) < half)


def _half(rng: np.random.Generator, height: int, width: int) -> NDArray[np.bool_]:
    """Return one side of a line through the middle: a scanner loses its focus in a strip or a corner."""
    y, x = np.mgrid[:height, :width].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    return np.asarray(np.cos(angle) * (x - width / 2) + np.sin(angle) * (y - height / 2) > 0)
