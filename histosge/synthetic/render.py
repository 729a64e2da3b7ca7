"""Draw an anatomy as H&E: stains as optical densities, then light through them (Beer-Lambert).

Works pane by pane, so that memory does not grow with the slide.

Terms
    pane   a square of `PANE_PX` pixels that is drawn at once
    warp   how far textures are displaced, in pixels: fibres bend with it
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histosge.synthetic import textures
from histosge.synthetic.anatomy import Anatomy
from histosge.synthetic.cells import Placed, place_glands, place_nuclei
from histosge.synthetic.fields import LATTICE_UM, interpolation, smooth_noise
from histosge.synthetic.spec import SyntheticSpec
from histosge.synthetic.textures import TEXTURE_PX, Gland
from histosge.synthetic.tissue_types import FAT, GLANDS, TISSUE_TYPES

PANE_PX = 512
HAEMATOXYLIN = (0.66, 0.70, 0.30)
EOSIN = (0.12, 0.80, 0.36)
"""Optical density in red, green and blue of one unit of each stain."""
GLASS = (245.0, 239.0, 242.0)
GRAIN = 1.6
"""Standard deviation of the camera's noise, in grey levels."""
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Scene:
    """All that panes are drawn from.

    Parameters
    ----------
    planes
        Slow fields on the lattice: composition of every type, then tissue, stain gains, glass, halo, warps.
    placed
        Nuclei of each tissue type: where, and which stamp.
    nuclei
        Stamps of each tissue type: orientation -> variants.
    """

    spec: SyntheticSpec
    planes: Plane
    fibres: Plane
    mottle: Plane
    grain: Plane
    walls: Plane
    placed: tuple[Placed, ...]
    nuclei: tuple[list[list[Plane]], ...]
    glands: tuple[Gland, ...]
    gland_places: Placed


def make_scene(spec: SyntheticSpec, anatomy: Anatomy) -> Scene:
    """Prepare textures, stamps and places for one section."""
    rng = np.random.default_rng([spec.seed, 5])
    shape = anatomy.tissue.shape
    stain = (1 + 0.06 * rng.standard_normal(2)).clip(0.85, 1.15)
    slow = [smooth_noise(rng, shape, 0.12 * min(spec.size_um) / LATTICE_UM) for _ in range(3)]
    warps = [60 * smooth_noise(rng, shape, 90 / LATTICE_UM) / spec.mpp for _ in range(2)]
    away_um = ndimage.distance_transform_edt(~anatomy.tissue) * LATTICE_UM
    halo = np.where(anatomy.tissue, 0, np.exp(-away_um / 55))
    planes = np.stack(
        [
            *anatomy.composition,
            ndimage.gaussian_filter(anatomy.tissue.astype(np.float32), 0.6),
            stain[0] * (1 + 0.05 * slow[0]),
            stain[1] * (1 + 0.05 * slow[1]),
            1 + 0.012 * slow[2],
            halo,
            *warps,
        ]
    ).astype(np.float32)
    walls = textures.vacuoles(rng, spec.mpp)
    placed = [place_nuclei(rng, spec, anatomy, k, (warps[0], warps[1])) for k in range(len(TISSUE_TYPES))]
    fat = placed[FAT]
    placed[FAT] = fat.only(walls[fat.y % TEXTURE_PX, fat.x % TEXTURE_PX] > 0.6)
    return Scene(
        spec,
        planes,
        textures.fibres(rng, spec.mpp),
        textures.mottle(rng, spec.mpp),
        textures.grain(rng),
        walls,
        tuple(placed),
