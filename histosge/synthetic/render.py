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
        tuple(textures.nuclei(rng, kind, spec.mpp) for kind in TISSUE_TYPES),
        tuple(textures.gland(rng, TISSUE_TYPES[GLANDS], spec.mpp) for _ in range(textures.VARIANTS)),
        place_glands(rng, spec, anatomy),
    )


def draw_strips(scene: Scene) -> Iterator[NDArray[np.uint8]]:
    """Draw the slide from top to bottom.

    Yields
    ------
    numpy.ndarray
        RGB, `PANE_PX` high (the last may be lower), as wide as the slide.
    """
    width, height = scene.spec.size_px
    for top in range(0, height, PANE_PX):
        rows = np.arange(top, min(top + PANE_PX, height))
        panes = [
            _draw_pane(scene, rows, np.arange(left, min(left + PANE_PX, width)))
            for left in range(0, width, PANE_PX)
        ]
        yield np.concatenate(panes, axis=1)


def _draw_pane(scene: Scene, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.uint8]:
    fields = _upsample(scene, rows, cols)
    n = len(TISSUE_TYPES)
    tissue, gain_h, gain_e, glass, halo = fields[n : n + 5]
    if tissue.max() > 0.01:
        haematoxylin, eosin = _stains(scene, rows, cols, fields)
        haematoxylin *= gain_h
        eosin *= gain_e
    else:
        haematoxylin, eosin = np.zeros_like(tissue), np.zeros_like(tissue)
    eosin += 0.035 * halo
    return _light(haematoxylin, eosin, glass, _repeat(scene.grain, rows, cols))


def _upsample(scene: Scene, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> Plane:
    """Interpolate the lattice's planes at pixels, ``(n_planes, n_rows, n_cols)``."""
    per_px = scene.spec.mpp / LATTICE_UM
    at_y, at_x = ((pixels.astype(np.float64) + 0.5) * per_px - 0.5 for pixels in (rows, cols))
    (y0, y1), (x0, x1) = (
        (max(int(at[0]) - 1, 0), min(int(at[-1]) + 3, size))
        for at, size in zip((at_y, at_x), scene.planes.shape[1:], strict=True)
    )
    down = interpolation(y1 - y0, at_y - y0)
    across = interpolation(x1 - x0, at_x - x0)
    near = np.ascontiguousarray(scene.planes[:, y0:y1, x0:x1])
    wide = near.reshape(-1, x1 - x0) @ np.ascontiguousarray(across.T)
    return np.stack([down @ plane for plane in wide.reshape(len(near), y1 - y0, -1)])


def _repeat(texture: Plane, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> Plane:
    return texture[np.ix_(rows % TEXTURE_PX, cols % TEXTURE_PX)]


def _stains(
    scene: Scene, rows: NDArray[np.int64], cols: NDArray[np.int64], fields: Plane
) -> tuple[Plane, Plane]:
    """Return haematoxylin and eosin of a pane, before the slow variation of staining."""
    tissue = fields[len(TISSUE_TYPES)]
    kinds = _sharper(fields[: len(TISSUE_TYPES)])
    y = (rows[:, None] + fields[-1]).astype(np.int32) % TEXTURE_PX
    x = (cols[None] + fields[-2]).astype(np.int32) % TEXTURE_PX
    fibre = scene.fibres[y, x]
    mottle = _repeat(scene.mottle, rows, cols)
    eosin, haematoxylin, fibrous, mottled = _mixed(kinds)
    haematoxylin *= 1 + 0.2 * mottle
    # Bundles with clefts between them: fibres darken less than clefts brighten.
    waves = np.minimum(fibre, 1.2)
    eosin *= np.maximum(1 + fibrous * waves + mottled * mottle, 0.08)
    if kinds[FAT].max() > 0.01:
        # Fat ends in a wall of its own.
        walls = np.maximum(_repeat(scene.walls, rows, cols), 4 * (1 - kinds[FAT]))
        eosin += 0.42 * kinds[FAT] * walls * (1 + 0.25 * mottle)
        haematoxylin += 0.06 * kinds[FAT] * walls
    nuclear = _nuclear(scene, rows, cols)
    hidden = np.minimum(nuclear * 2, 1)
    haematoxylin = haematoxylin * (1 - hidden) + nuclear
    eosin *= 1 - 0.45 * hidden
    _put_glands(scene, rows, cols, haematoxylin, eosin)
    # A frayed outline: the interpolated edge is cut where the texture says.
    edge = np.clip((tissue - 0.5 + 0.07 * mottle) * 5 + 0.5, 0, 1)
    return haematoxylin * edge, eosin * edge


def _sharper(kinds: Plane) -> Plane:
    """Narrow the borders between tissue types, which the lattice blurs over 16 microns."""
    cubed = kinds * kinds * kinds
    total = cubed.sum(axis=0)
    return np.divide(cubed, np.maximum(total, 1e-6, out=total), out=cubed)


def _mixed(kinds: Plane) -> Plane:
    """Return eosin, haematoxylin, fibres and mottle of the tissue types, mixed by composition."""
    values = [[kind.eosin, kind.haematoxylin, kind.fibres, kind.mottle] for kind in TISSUE_TYPES]
    mixed = np.array(values, np.float32).T @ kinds.reshape(len(kinds), -1)
    return np.asarray(mixed.reshape(-1, *kinds.shape[1:]))


def _nuclear(scene: Scene, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> Plane:
    plane = np.zeros((len(rows), len(cols)), np.float32)
    for placed, stamps in zip(scene.placed, scene.nuclei, strict=True):
        reach = max(stamp.shape[0] for turned in stamps for stamp in turned) // 2 + 1
        for i in placed.near(rows, cols, reach):
            turned = stamps[placed.turn[i] % len(stamps)]
            stamp = turned[placed.variant[i] % len(turned)]
            textures.put_max(plane, stamp, placed.y[i] - rows[0], placed.x[i] - cols[0], placed.gain[i])
    return plane


def _put_glands(
    scene: Scene, rows: NDArray[np.int64], cols: NDArray[np.int64], haematoxylin: Plane, eosin: Plane
) -> None:
    placed = scene.gland_places
    reach = max(stamp.cover.shape[0] for stamp in scene.glands) // 2 + 1
    for i in placed.near(rows, cols, reach):
        stamp = scene.glands[placed.variant[i] % len(scene.glands)]
        place = (int(placed.y[i] - rows[0]), int(placed.x[i] - cols[0]))
        here, part = textures.overlap(eosin.shape, stamp.cover.shape, *place)
        if here is None:
            continue
        turn = int(placed.turn[i])
        cover = np.rot90(stamp.cover, turn)[part]
        for plane, source in ((haematoxylin, stamp.haematoxylin), (eosin, stamp.eosin)):
            plane[here] += cover * (np.rot90(source, turn)[part] - plane[here])


def _light(haematoxylin: Plane, eosin: Plane, glass: Plane, grain: Plane) -> NDArray[np.uint8]:
    """Send light through the stains; the camera rounds."""
    rgb = np.empty((*eosin.shape, 3), np.uint8)
    for channel in range(3):
        density = haematoxylin * np.float32(HAEMATOXYLIN[channel]) + eosin * np.float32(EOSIN[channel])
        level = np.exp(density * np.float32(-np.log(10))) * glass
        level = level * np.float32(GLASS[channel]) + np.float32(GRAIN) * grain + np.float32(0.5)
        rgb[..., channel] = np.clip(level, 0, 255)
    return rgb
