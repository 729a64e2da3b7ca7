"""What tissue is drawn with: repeating textures, and stamps of nuclei and glands. Arithmetic alone.

Terms
    texture   a square of side `TEXTURE_PX` whose opposite borders fit, looked up modulo its side
    stamp     a small picture that is put down many times
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import cKDTree

from histosge.synthetic.fields import smooth_noise
from histosge.synthetic.tissue_types import TissueType

TEXTURE_PX = 2048
VARIANTS = 24
ORIENTATIONS = 12


@dataclass(frozen=True)
class Gland:
    """One gland seen across: what it covers, and the stains there, all ``(side, side)``."""

    cover: NDArray[np.float32]
    eosin: NDArray[np.float32]
    haematoxylin: NDArray[np.float32]


def fibres(rng: np.random.Generator, mpp: float) -> NDArray[np.float32]:
    """Draw fibres along x, mean 0, standard deviation 1."""
    shape = (TEXTURE_PX, TEXTURE_PX)
    thin = smooth_noise(rng, shape, (0.8 / mpp, 16 / mpp), periodic=True)
    thick = smooth_noise(rng, shape, (2.5 / mpp, 34 / mpp), periodic=True)
    mixed = 0.75 * thin + thick
    return np.asarray(mixed / mixed.std(), dtype=np.float32)


def mottle(rng: np.random.Generator, mpp: float) -> NDArray[np.float32]:
    """Draw cytoplasm: grains and clouds, mean 0, standard deviation 1."""
    shape = (TEXTURE_PX, TEXTURE_PX)
    mixed = smooth_noise(rng, shape, 0.9 / mpp, periodic=True) + smooth_noise(
        rng, shape, 4.5 / mpp, periodic=True
    )
    return np.asarray(mixed / mixed.std(), dtype=np.float32)


def grain(rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw the camera's noise, mean 0, standard deviation 1."""
    return smooth_noise(rng, (TEXTURE_PX, TEXTURE_PX), 0.6, periodic=True)


def vacuoles(rng: np.random.Generator, mpp: float) -> NDArray[np.float32]:
    """Draw the thin walls between fat cells: 1 on a wall, 0 in a vacuole."""
    coarse = TEXTURE_PX // 4
    cells = max(2, round(TEXTURE_PX * mpp / 62))
    places = (np.stack(np.meshgrid(*[np.arange(cells)] * 2), axis=-1).reshape(-1, 2) + 0.5) * coarse / cells
    places = (places + rng.uniform(-0.38, 0.38, places.shape) * coarse / cells) % coarse
    at = np.stack(np.meshgrid(*[np.arange(coarse)] * 2, indexing="ij"), axis=-1).reshape(-1, 2)
    # Walls bend: the places are looked for a little beside where they are.
    bend = [smooth_noise(rng, (coarse, coarse), 5 / mpp, periodic=True).ravel() for _ in range(2)]
    at = (at + 0.9 / mpp * np.stack(bend, axis=1)) % coarse
    near, _ = cKDTree(places, boxsize=np.full(2, float(coarse))).query(at, k=2)
    gap_um = ((near[:, 1] - near[:, 0]) * 4 * mpp).reshape(coarse, coarse)
    gap_um = ndimage.gaussian_filter(gap_um, 0.8, mode="wrap")
    gap_um = ndimage.zoom(gap_um, TEXTURE_PX / coarse, order=1, mode="grid-wrap", grid_mode=True)
    return np.exp(-((gap_um / 3.2) ** 2)).astype(np.float32)


def nuclei(rng: np.random.Generator, kind: TissueType, mpp: float) -> list[list[NDArray[np.float32]]]:
    """Draw the nuclei of a tissue type: haematoxylin, orientation -> variants.

    Orientation ``o`` turns the long axis by ``o / ORIENTATIONS * pi`` from x towards y.
    """
    turns = ORIENTATIONS if kind.nucleus_um[0] > 2 * kind.nucleus_um[1] else 1
    return [
        [
            nucleus(rng, kind, mpp, np.pi * turn / turns if turns > 1 else rng.uniform(0, np.pi))
            for _ in range(VARIANTS // min(turns, 4))
        ]
        for turn in range(turns)
    ]


def nucleus(rng: np.random.Generator, kind: TissueType, mpp: float, angle: float) -> NDArray[np.float32]:
    """Draw one nucleus: a wobbly ellipse with a rim, chromatin, and a nucleolus if it is vesicular."""
    long, short = (
        axis * np.exp(0.16 * np.clip(rng.standard_normal(), -2, 2)) / mpp for axis in kind.nucleus_um
    )
    half = int(np.ceil(max(long, short) * 1.35)) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    theta = np.arctan2(across / short, along / long)
    wobble = 1 + 0.09 * np.cos(2 * theta + rng.uniform(0, 6)) + 0.06 * np.cos(3 * theta + rng.uniform(0, 6))
    rho = np.hypot(along / long, across / short) / wobble
    inside = np.clip((1 - rho) * min(long, short) / 1.3 + 0.5, 0, 1)
    chromatin = smooth_noise(rng, (2 * half + 1, 2 * half + 1), 1.6)
    stain = 1 + 0.16 * chromatin - kind.vesicular * np.clip(1 - rho * 1.15, 0, 1)
    if kind.vesicular > 0.3:
        spot = rng.uniform(-0.35, 0.35, 2)
        dot = np.hypot(along / long - spot[0], across / short - spot[1])
        stain = stain + 0.55 * np.clip(1.4 - dot / 0.17, 0, 1)
    return (kind.nucleus_od * inside * np.clip(stain, 0.3, 1.6)).astype(np.float32)


def gland(rng: np.random.Generator, lining: TissueType, mpp: float) -> Gland:
    """Draw one gland: a lumen, a columnar lining with nuclei at its base, a thin sheath."""
    radius = rng.uniform(30, 44) / mpp
    half = int(radius * 1.35) + 2
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    theta, phases = np.arctan2(y, x), rng.uniform(0, 6, 3)
    edge = radius * (
        1
        + 0.13 * np.cos(2 * theta + phases[0])
        + 0.06 * np.cos(3 * theta + phases[1])
        + 0.02 * np.cos(7 * theta + phases[2])
    )
    rho = np.hypot(x, y) / edge
    texture = smooth_noise(rng, rho.shape, 1.6 / mpp)
    opening = rng.uniform(0.34, 0.5)
    lumen = np.clip((opening + 0.03 * texture - rho) * radius / 3 + 0.5, 0, 1)
    sheath = np.exp(-(((rho - 1.01) / 0.035) ** 2))
    cover = np.clip((1.04 - rho) * radius / 3 + 0.5, 0, 1)
    eosin = (0.34 + 0.04 * texture + 0.25 * sheath) * (1 - lumen) + 0.02
    haematoxylin = (0.17 + 0.03 * texture) * (1 - lumen)
    _ring(rng, haematoxylin, edge, half, lining, mpp)
    return Gland(*(plane.astype(np.float32) for plane in (cover, eosin, haematoxylin)))


def _ring(
    rng: np.random.Generator,
    plane: NDArray[np.float32],
    edge: NDArray[np.float32],
    half: int,
    lining: TissueType,
    mpp: float,
) -> None:
    """Put nuclei along the base of a gland's lining, their long axes towards the lumen."""
    count = int(2 * np.pi * float(edge.mean()) * 0.82 * mpp / 6.2)
    for angle in (np.arange(count) + rng.uniform(-0.25, 0.25, count)) * 2 * np.pi / count:
        at = edge[half + round(0.5 * half * np.sin(angle)), half + round(0.5 * half * np.cos(angle))]
        distance = at * rng.uniform(0.77, 0.86)
        stamp = nucleus(rng, lining, mpp, float(angle))
        put_max(plane, stamp, half + round(distance * np.sin(angle)), half + round(distance * np.cos(angle)))


def put_max(
    plane: NDArray[np.float32], stamp: NDArray[np.float32], y: int, x: int, gain: float = 1.0
) -> None:
    """Put a stamp down centred on ``(y, x)``, keeping the darker of both; what falls outside is lost."""
    here, part = overlap(plane.shape, stamp.shape, y, x)
    if here is not None:
        np.maximum(plane[here], stamp[part] * np.float32(gain), out=plane[here])


def overlap(
    shape: tuple[int, ...], stamp: tuple[int, ...], y: int, x: int
) -> tuple[tuple[slice, slice] | None, tuple[slice, slice]]:
    """Return where a stamp centred on ``(y, x)`` meets a plane, in the plane (None if nowhere) and in the stamp."""
    top, left = y - stamp[0] // 2, x - stamp[1] // 2
    y0, y1 = max(top, 0), min(top + stamp[0], shape[0])
    x0, x1 = max(left, 0), min(left + stamp[1], shape[1])
    part = (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
    if y0 >= y1 or x0 >= x1:
        return None, part
    return (slice(y0, y1), slice(x0, x1)), part
