"""Where the nuclei and the glands of a synthetic section lie: positions only, no pixels.

Terms
    nuclei   points with a type, an orientation (radians, x to y) and a variant of their stamp
    gland    a wobbly ring of epithelium around a lumen
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosge.synthetic.anatomy import GLAND, IMMUNE, NECROSIS, STROMA, TUMOUR, Anatomy
from histosge.synthetic.fields import Field, random_field, smoothed
from histosge.synthetic.spec import LATTICE_UM, SyntheticSpec

# Between nuclei of one tissue, before some are left out at random: lymphocytes are packed, stroma is sparse.
SPACING_UM = {TUMOUR: 11.0, STROMA: 21.0, IMMUNE: 7.4, GLAND: 19.0, NECROSIS: 15.0}
"""Fat has none of its own: the few that it shows belong to its texture."""
EPITHELIUM = 7
"""Stamp of the nuclei in a gland's ring; a tissue's own nuclei have the tissue's number."""
GLAND_PITCH_UM = 118.0
DENSITY_UM = 20.0
"""Width of the Gaussian over which nuclei are counted for the truth."""


@dataclass(frozen=True)
class Nuclei:
    """Nuclei of one section, sorted from top to bottom; arrays of one length.

    Parameters
    ----------
    x_um, y_um
        Centres.
    stamp
        Tissue number, or `EPITHELIUM`.
    angle
        Orientation of the long axis, 0..pi.
    """

    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    stamp: NDArray[np.uint8]
    angle: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x_um)


@dataclass(frozen=True)
class Glands:
    """Glands of one section: centres, mean radius, and the wobble's amplitudes and phases ``(n, 3)``."""

    x_um: NDArray[np.float64]
    y_um: NDArray[np.float64]
    radius_um: NDArray[np.float64]
    wobble: NDArray[np.float64]
    phase: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.x_um)

    def outer_um(self, i: int | NDArray[np.integer], angle: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return gland i's outer radius in a direction."""
        waves = sum(
            self.wobble[i, k] * np.cos((k + 2) * angle + self.phase[i, k])
            for k in range(self.wobble.shape[1])
        )
        return np.asarray(self.radius_um[i] * (1 + waves))


def place_cells(spec: SyntheticSpec, anatomy: Anatomy) -> tuple[Nuclei, Glands]:
    """Place nuclei and glands."""
    rng = spec.rng(2)
    glands = _place_glands(spec, anatomy, rng)
    crowding = random_field(anatomy.label.shape, 8, rng)
    parts = [_tissue_nuclei(spec, anatomy, kind, crowding, rng) for kind in SPACING_UM]
    parts = [_outside_glands(part, glands) for part in parts]
    parts.append(_ring_nuclei(glands, rng))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    # From top to bottom, so that a strip finds its nuclei by bisection.
    order = np.argsort(columns[1], kind="stable")
    x, y, stamp, angle = (column[order] for column in columns)
    return Nuclei(x, y, stamp.astype(np.uint8), angle), glands


def density(nuclei: Nuclei, anatomy: Anatomy) -> Field:
    """Return nuclei per square millimetre around every lattice position, ``(n_y, n_x)``."""
    shape = anatomy.label.shape
    edges = [np.arange(n + 1) * LATTICE_UM for n in shape]
    counts, _, _ = np.histogram2d(nuclei.y_um, nuclei.x_um, bins=edges)
    sigma = DENSITY_UM / LATTICE_UM
    near = smoothed(counts.astype(np.float32), sigma)
    # Divided by the tissue near by: an edge is not thinner for the glass beside it.
    share = smoothed(anatomy.tissue.astype(np.float32), sigma)
    return np.asarray(near / np.maximum(share, 0.2) / (LATTICE_UM / 1000) ** 2, dtype=np.float32)


_Part = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def _jittered(
    spec: SyntheticSpec, pitch: float, jitter: float, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return a shaken hexagonal lattice over the slide, ``(x_um, y_um)``."""
    width, height = (side * spec.mpp for side in spec.size_px)
    rows = np.arange(0, height + pitch, pitch * 0.866)  # half the square root of 3: a hexagonal lattice
    cols = np.arange(0, width + pitch, pitch)
    y = np.repeat(rows[:, None], len(cols), axis=1)
    x = cols[None] + (np.arange(len(rows)) % 2)[:, None] * pitch / 2
    x = x + rng.uniform(-jitter, jitter, x.shape) * pitch
    y = y + rng.uniform(-jitter, jitter, y.shape) * pitch
    return x.ravel(), y.ravel()


def _tissue_nuclei(
    spec: SyntheticSpec, anatomy: Anatomy, kind: int, crowding: Field, rng: np.random.Generator
) -> _Part:
    x, y = _jittered(spec, SPACING_UM[kind], 0.36, rng)
    # Drawn for all positions, used for some: the numbers of one tissue do not depend on where the others lie.
    chance = rng.random(len(x))
    turn = rng.standard_normal(len(x))
    here = anatomy.type_at(x, y) == kind
    x, y, chance, turn = x[here], y[here], chance[here], turn[here]
    row, col = _positions(x, y, anatomy)
    kept = chance < np.clip(0.78 + 0.17 * crowding[row, col], 0.35, 1.0)
    x, y, turn, row, col = x[kept], y[kept], turn[kept], row[kept], col[kept]
    # Spindle cells lie along the fibres; all others point anywhere.
    along = kind in (STROMA, GLAND)
    angle = _fibre_angle(anatomy)[row, col] + 0.22 * turn if along else turn * np.pi
    return x, y, np.full(len(x), kind, np.float64), np.mod(angle, np.pi)


def _positions(
    x: NDArray[np.float64], y: NDArray[np.float64], anatomy: Anatomy
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    n_y, n_x = anatomy.label.shape
    row = np.clip(y / LATTICE_UM, 0, n_y - 1).astype(np.int64)
    return row, np.clip(x / LATTICE_UM, 0, n_x - 1).astype(np.int64)


def _fibre_angle(anatomy: Anatomy) -> Field:
    """Return the direction in which fibres run: along the bent texture's rows."""
    along_y, along_x = np.gradient(anatomy.warp_um[0], LATTICE_UM)
    angle = np.arctan2(np.sin(anatomy.texture_angle) - along_x, np.cos(anatomy.texture_angle) + along_y)
    return np.asarray(angle, dtype=np.float32)


def _place_glands(spec: SyntheticSpec, anatomy: Anatomy, rng: np.random.Generator) -> Glands:
    x, y = _jittered(spec, GLAND_PITCH_UM, 0.14, rng)
    radius = rng.uniform(30, 54, len(x))
    turn = np.linspace(0, 2 * np.pi, 8, endpoint=False)
    rim_x, rim_y = (np.add.outer(radius, 0 * turn) * f(turn) for f in (np.cos, np.sin))
    inside = anatomy.type_at(x, y) == GLAND
    inside &= (anatomy.type_at(x[:, None] + rim_x, y[:, None] + rim_y) == GLAND).mean(axis=1) > 0.5
    inside &= rng.random(len(x)) < 0.93
    n = int(inside.sum())
    wobble = rng.uniform(-1, 1, (n, 3)) * np.array([0.16, 0.10, 0.05])
    return Glands(x[inside], y[inside], radius[inside], wobble, rng.uniform(0, 2 * np.pi, (n, 3)))


def _outside_glands(part: _Part, glands: Glands) -> _Part:
    from scipy.spatial import cKDTree

    x, y, stamp, angle = part
    if not len(glands) or not len(x):
        return part
    apart, nearest = cKDTree(np.column_stack([glands.x_um, glands.y_um])).query(np.column_stack([x, y]))
    nearest = np.asarray(nearest)
    direction = np.arctan2(y - glands.y_um[nearest], x - glands.x_um[nearest])
    keep = apart > glands.outer_um(nearest, direction) + 3
    return x[keep], y[keep], stamp[keep], angle[keep]


def _ring_nuclei(glands: Glands, rng: np.random.Generator) -> _Part:
    parts = [np.zeros((4, 0))]
    for i in range(len(glands)):
        # One nucleus each 6.2 microns along the ring, at 0.8 of the gland's radius.
        n = int(2 * np.pi * glands.radius_um[i] * 0.8 / 6.2)
        turn = (np.arange(n) + rng.uniform(-0.3, 0.3, n)) * 2 * np.pi / n
        reach = glands.outer_um(i, turn) * rng.normal(0.8, 0.045, n)
        x, y = glands.x_um[i] + reach * np.cos(turn), glands.y_um[i] + reach * np.sin(turn)
        parts.append(np.stack([x, y, np.full(n, float(EPITHELIUM)), np.mod(turn, np.pi)]))
    x, y, stamp, angle = np.concatenate(parts, axis=1)
    return x, y, stamp, angle
