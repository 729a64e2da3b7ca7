"""What tissues look like up close: periodic textures, and stamps of nuclei, in optical density of two stains.

Terms
    density   -log10 of transmitted light along a stain's direction, kept as uint8: 255 is `FULL_DENSITY`
"""

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from histosge.synthetic.anatomy import FAT, GLAND, IMMUNE, NECROSIS, STROMA, TISSUES, TUMOUR
from histosge.synthetic.cells import EPITHELIUM
from histosge.synthetic.fields import Field, random_field

FULL_DENSITY = 1.6
TEXTURE_PX = 1024
TEXTURE_UM = 0.5
"""Microns per texture pixel: a texture repeats after 512 microns, bent differently each time."""
ORIENTATIONS = 16
VARIANTS = 8
JITTER_PX = 5


def to_byte(density: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return densities as bytes."""
    return np.asarray(np.clip(density * (255 / FULL_DENSITY) + 0.5, 0, 255).astype(np.uint8))


# Kept: the sections of a cohort share them.
@lru_cache(maxsize=1)
def make_textures() -> NDArray[np.uint16]:
    """Draw one texture per tissue; haematoxylin in the high byte, eosin in the low one.

    The same for every section, as staining, bending and cells are not.

    Returns
    -------
    numpy.ndarray
        Shape ``(7, 1024, 1024)``, by tissue number.
    """
    rng = np.random.default_rng(TEXTURE_PX)
    shape = (TEXTURE_PX, TEXTURE_PX)

    def noise(*length: float) -> Field:
        return random_field(shape, (length[0], length[-1]), rng)

    grain = noise(0.8)
    mottle = noise(7)
    cloud = noise(24)
    fibre, strand, cleft = noise(1.3, 38), noise(4.5, 90), noise(2.6, 60)
    stains = {
        0: (0.012 + 0.004 * grain, 0.030 + 0.008 * grain + 0.004 * cloud),
        TUMOUR: _epithelial(mottle, cloud, noise(3), grain),
        STROMA: _fibrous(fibre, strand, cleft, grain, 0.34),
        IMMUNE: (0.12 + 0.03 * mottle, 0.17 + 0.05 * mottle + 0.03 * cloud + 0.02 * grain),
        GLAND: _fibrous(noise(1.6, 22), noise(5, 50), noise(4, 34) + 0.3, grain, 0.23),
        FAT: _fatty(rng, grain),
        NECROSIS: _necrotic(mottle, noise(2.2), cloud, grain),
    }
    out = np.empty((len(TISSUES), *shape), np.uint16)
    for kind, (haematoxylin, eosin) in stains.items():
        out[kind] = to_byte(haematoxylin).astype(np.uint16) << 8 | to_byte(eosin)
    return out


def _epithelial(mottle: Field, cloud: Field, clump: Field, grain: Field) -> tuple[Field, Field]:
    open_ = np.clip((mottle + 0.5 * clump - 1.9) * 2, 0, 1)
    haematoxylin = (0.15 + 0.03 * mottle + 0.025 * clump + 0.02 * cloud + 0.015 * grain) * (1 - open_)
    return haematoxylin, (0.25 + 0.04 * mottle + 0.03 * clump + 0.02 * grain) * (1 - open_) + 0.04 * open_


def _fibrous(fibre: Field, strand: Field, cleft: Field, grain: Field, level: float) -> tuple[Field, Field]:
    open_ = np.clip((cleft - 1.15) * 3, 0, 1)
    eosin = (level + 0.065 * fibre + 0.085 * strand + 0.02 * grain) * (1 - open_) + 0.05 * open_
    return 0.05 + 0.02 * fibre * (1 - open_), np.maximum(eosin, 0.04)


def _necrotic(mottle: Field, fine: Field, cloud: Field, grain: Field) -> tuple[Field, Field]:
    debris = np.clip((fine - 1.9) * 1.2, 0, 1)
    return (
        0.07 + 0.03 * cloud + 0.45 * debris,
        0.36 + 0.08 * mottle + 0.06 * cloud + 0.05 * fine + 0.02 * grain,
    )


@lru_cache(maxsize=1)
def make_jitter() -> NDArray[np.int32]:
    """Draw how far each pixel looks aside for its tissue, pixels ``(down or across, 1024, 1024)``: ragged borders."""
    rng = np.random.default_rng(JITTER_PX)
    fields = [random_field((TEXTURE_PX, TEXTURE_PX), 2.5, rng) for _ in range(2)]
    return np.clip(np.round(1.5 * np.stack(fields)), -JITTER_PX, JITTER_PX).astype(np.int32)


def _fatty(rng: np.random.Generator, grain: Field) -> tuple[Field, Field]:
    """Draw vacuoles with thin septa: what is nearly as close to a second cell as to its own."""
    n = 9
    lattice = (np.stack(np.meshgrid(np.arange(n), np.arange(n)), axis=-1).reshape(-1, 2) + 0.5) / n
    shifted = lattice + rng.uniform(-0.3, 0.3, lattice.shape) / n
    centres = np.asarray(np.mod(shifted, 1) * TEXTURE_PX, dtype=np.float64)
    half = TEXTURE_PX // 2
    # At half resolution, and enlarged: the distances are smooth.
    y, x = np.mgrid[:half, :half] * 2.0
    # On a torus, so that the texture repeats without a seam.
    apart, _ = cKDTree(centres, boxsize=np.full(2, float(TEXTURE_PX))).query(
        np.column_stack([y.ravel(), x.ravel()]), k=3
    )
    nearest = np.asarray(apart).T
    near, second, third = (np.kron(d.reshape(half, half), np.ones((2, 2))) for d in nearest)
    septum = np.exp(-(((second - near) / 5.5) ** 2))
    corner = np.exp(-(((third - near) / 9.0) ** 2))
    eosin = 0.025 + 0.33 * septum + 0.15 * corner + 0.008 * grain
    return (0.012 + 0.05 * septum + 0.35 * corner).astype(np.float32), eosin.astype(np.float32)


# Half axes in microns, peak density, how mottled: a nucleus of each tissue.
_NUCLEI = {
    TUMOUR: (4.9, 3.8, 0.62, 0.22),
    STROMA: (6.4, 1.5, 0.80, 0.10),
    IMMUNE: (2.9, 2.6, 0.95, 0.14),
    GLAND: (5.6, 1.5, 0.75, 0.10),
    NECROSIS: (1.9, 1.5, 0.75, 0.10),
    EPITHELIUM: (4.9, 2.6, 0.78, 0.16),
}


@lru_cache(maxsize=4)
def make_stamps(mpp: float) -> dict[int, NDArray[np.uint8]]:
    """Draw nuclei as haematoxylin stamps.

    Returns
    -------
    dict
        Tissue number or `EPITHELIUM` -> ``(orientations, variants, side, side)``, side odd.
    """
    rng = np.random.default_rng(VARIANTS)
    return {
        kind: np.stack(
            [
                np.stack([_stamp(*axes, np.pi * turn / ORIENTATIONS, mpp, rng) for _ in range(VARIANTS)])
                for turn in range(ORIENTATIONS)
            ]
        )
        for kind, axes in _NUCLEI.items()
    }


def _stamp(
    long_um: float,
    short_um: float,
    peak: float,
    mottled: float,
    angle: float,
    mpp: float,
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    # Room for the random size, stretch and edge below.
    reach = int(np.ceil(long_um * 1.35 / mpp)) + 1
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1] * mpp
    size = rng.uniform(0.78, 1.18)
    u = (x * np.cos(angle) + y * np.sin(angle)) / (long_um * size * rng.uniform(0.9, 1.1))
    v = (y * np.cos(angle) - x * np.sin(angle)) / (short_um * size * rng.uniform(0.9, 1.1))
    direction = np.arctan2(v, u)
    edge = (
        1
        + 0.07 * np.cos(2 * direction + rng.uniform(0, 6))
        + 0.05 * np.cos(3 * direction + rng.uniform(0, 6))
    )
    far = np.hypot(u, v) / edge
    body = 1 / (1 + np.exp((far - 1) * short_um / 0.28))
    chromatin = random_field(far.shape, 0.8 / mpp, rng)
    rim = np.exp(-(((far - 0.88) / 0.16) ** 2))
    inner = peak * (1 + mottled * chromatin + mottled * (rim - 0.35))
    return to_byte((body * np.maximum(inner, 0.2)).astype(np.float32))
