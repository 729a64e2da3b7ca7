"""Where which tissue lies on a synthetic section.

Regions are cut from smooth random fields, one tissue after the other, so that each gets its share of
the area. Borders are ragged at cell scale; thin septa of stroma run through the tumour.

Terms
    lattice      8 microns a step: what the truth is given on
    fine         2 microns a step: what the slide is painted from
    composition  share of a lattice position's tissue that is of each type; sums to 1 on tissue
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosge.synthetic.fields import Field, interpolate, random_field, smoothed
from histosge.synthetic.spec import LATTICE_UM, SyntheticSpec

TISSUES = ("background", "tumour", "stroma", "immune", "gland", "fat", "necrosis")
"""Labels by their number; 0 is no tissue."""
TUMOUR, STROMA, IMMUNE, GLAND, FAT, NECROSIS = range(1, 7)
AREAS = (0.40, 0.12, 0.15, 0.12)
"""Share of the tissue that tumour, fat, gland and immune tissue claim."""
MAX_AREA = 0.9
"""Of these together, whoever the donor: stroma gets the rest."""
FINE = 4
"""Fine steps in one lattice step."""
FINE_UM = LATTICE_UM / FINE
# Standard deviation over which tissue types mix at a border: expression has no sharper edge than a cell is wide.
CELL_UM = 10.0


@dataclass(frozen=True)
class Anatomy:
    """Tissue types over a slide.

    Parameters
    ----------
    fine
        Type of every fine position, uint8, ``(4 n_y, 4 n_x)``.
    label
        Type of every lattice position, uint8, ``(n_y, n_x)``; 0 where less than half is tissue.
    composition
        Shares of tumour, stroma, immune, gland, fat, necrosis: ``(6, n_y, n_x)``.
    warp_um
        Displacement ``(down, across)`` that bends textures, ``(2, n_y, n_x)``.
    texture_angle
        Angle by which textures are turned, radians.
    """

    fine: NDArray[np.uint8]
    label: NDArray[np.uint8]
    composition: Field
    warp_um: Field
    texture_angle: float

    @property
    def tissue(self) -> NDArray[np.bool_]:
        """Which lattice positions are tissue, ``(n_y, n_x)``."""
        return self.label > 0

    def type_at(self, x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.uint8]:
        """Return the type at positions in microns; background beyond the slide."""
        row, col = np.floor(y_um / FINE_UM).astype(np.int64), np.floor(x_um / FINE_UM).astype(np.int64)
        inside = (row >= 0) & (col >= 0) & (row < self.fine.shape[0]) & (col < self.fine.shape[1])
        return np.where(inside, self.fine[row * inside, col * inside], 0).astype(np.uint8)


def draw_anatomy(spec: SyntheticSpec) -> Anatomy:
    """Lay out the tissue of one section."""
    # Each part of a section has a purpose number of its own, so that a change in one moves no other's random numbers.
    rng = spec.rng(1)
    shape = spec.lattice_shape
    length = spec.region_length_um / LATTICE_UM
    ragged = random_field((shape[0] * FINE, shape[1] * FINE), 9 / FINE_UM, rng)
    inside = _enlarged(_outline(spec, rng)) + 0.016 * ragged > 0
    factors = (1.0,) * 4 if spec.donor is None else spec.donor.shares
    areas = np.array(AREAS) * factors
    areas = areas * min(1.0, MAX_AREA / areas.sum())
    fine = np.where(inside, _types(shape, length, ragged, inside, areas, rng), 0).astype(np.uint8)
    composition, label = _on_lattice(fine)
    return Anatomy(fine, label, composition, _warp(shape, length, rng), rng.uniform(0, np.pi))


def _warp(shape: tuple[int, int], length: float, rng: np.random.Generator) -> Field:
    """Return slow turns, at the scale of regions, and quicker waves."""
    bend = LATTICE_UM * 0.7 * length * random_field(shape, length * 1.5, rng)
    waves = 45 * random_field(shape, 14, rng), 20 * random_field(shape, 14, rng)
    return np.stack([bend + waves[0], waves[1]]).astype(np.float32)


def _outline(spec: SyntheticSpec, rng: np.random.Generator) -> Field:
    """Return a field that is positive on tissue: a lopsided disc with bays."""
    n_y, n_x = spec.lattice_shape
    y = (np.arange(n_y, dtype=np.float32)[:, None] + 0.5) / n_y - 0.5 + 0.03 * rng.standard_normal()
    x = (np.arange(n_x, dtype=np.float32)[None] + 0.5) / n_x - 0.5 + 0.03 * rng.standard_normal()
    angle = rng.uniform(0, np.pi)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    side = min(n_y, n_x)
    bays = 0.10 * random_field((n_y, n_x), side * 0.09, rng) + 0.03 * random_field(
        (n_y, n_x), side * 0.025, rng
    )
    # A superellipse: with an exponent of 2.4, between a disc and a rectangle.
    body = 1 - (np.abs(u / 0.43) ** 2.4 + np.abs(v / 0.38) ** 2.4) + 1.6 * bays
    # A margin of glass on all sides.
    frame = np.minimum(0.47 - np.abs(x), 0.47 - np.abs(y)) * 8
    return np.asarray(np.minimum(body, frame), dtype=np.float32)


def _types(
    shape: tuple[int, int],
    length: float,
    ragged: Field,
    inside: NDArray[np.bool_],
    areas: NDArray[np.float64],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    area_tumour, area_fat, area_gland, area_immune = (float(area) for area in areas)

    def field(scale: float) -> Field:
        return _enlarged(random_field(shape, length * scale, rng)) + 0.05 * ragged

    types = np.full(inside.shape, STROMA, np.uint8)
    free = inside.copy()

    def claim(values: Field, share: float, kind: int) -> float:
        """Give the highest values of what is free to one type, so much of the whole tissue."""
        wanted = min(share * inside.sum() / max(free.sum(), 1), 1.0)
        # Every seventh position gives the quantile of a smooth field closely enough, at a seventh of the sorting.
        level = float(np.quantile(values[free][::7], 1 - wanted)) if free.any() else 0.0
        taken = free & (values > level)
        types[taken] = kind
        free[taken] = False
        return level

    # In this order: later tissues only get what earlier ones left. Stroma is what nothing has claimed.
    tumour = field(1.0)
    edge = claim(tumour, area_tumour, TUMOUR)
    core = tumour + 0.25 * field(0.5)
    dying = inside & (core > np.quantile(core[types == TUMOUR], 0.82) if (types == TUMOUR).any() else False)
    # Around the zero line of a random field: thin, branching septa.
    nests = np.abs(_enlarged(random_field(shape, min(9.0, length / 3), rng)) + 0.03 * ragged) < 0.10
    types[(types == TUMOUR) & nests] = STROMA
    types[(types != STROMA) & dying] = NECROSIS
    claim(field(0.8), area_fat, FAT)
    claim(field(0.8), area_gland, GLAND)
    # Infiltrates gather at the tumour's edge.
    claim(field(0.45) - 0.5 * np.abs(tumour - edge), area_immune, IMMUNE)
    return types


def _enlarged(field: Field) -> Field:
    """Interpolate a lattice field on the fine lattice."""
    rows, cols = ((np.arange(n * FINE) + 0.5) / FINE for n in field.shape)
    return interpolate(field, rows, cols)


def _on_lattice(fine: NDArray[np.uint8]) -> tuple[Field, NDArray[np.uint8]]:
    n_y, n_x = fine.shape[0] // FINE, fine.shape[1] // FINE
    cells = fine.reshape(n_y, FINE, n_x, FINE)
    shares = [
        np.asarray(np.mean(cells == kind, axis=(1, 3), dtype=np.float32)) for kind in range(1, len(TISSUES))
    ]
    area = np.stack(shares)
    label = np.where(area.sum(axis=0) >= 0.5, area.argmax(axis=0) + 1, 0).astype(np.uint8)
    blurred = np.stack([smoothed(share, CELL_UM / LATTICE_UM) for share in shares])
    blurred = np.maximum(blurred, 0)  # float32 leaves tiny negative values
    total = blurred.sum(axis=0)
    composition = np.divide(blurred, total, out=np.zeros_like(blurred), where=(total > 1e-6) & (label > 0))
    return composition, label
