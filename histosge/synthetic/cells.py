"""Where nuclei and glands lie: jittered lattices, thinned by the composition. Draws no pixel."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosge.synthetic.anatomy import Anatomy
from histosge.synthetic.fields import LATTICE_UM
from histosge.synthetic.spec import SyntheticSpec
from histosge.synthetic.textures import ORIENTATIONS
from histosge.synthetic.tissue_types import GLANDS, TISSUE_TYPES

GLAND_PITCH_UM = 98.0


@dataclass(frozen=True)
class Placed:
    """Things put on a slide, all arrays of one length.

    Parameters
    ----------
    y, x
        Centres in level-0 pixels.
    variant, turn
        Which stamp, and how it is turned.
    gain
        How strongly it is stained.
    """

    y: NDArray[np.int64]
    x: NDArray[np.int64]
    variant: NDArray[np.int64]
    turn: NDArray[np.int64]
    gain: NDArray[np.float64]

    def only(self, keep: NDArray[np.bool_]) -> "Placed":
        """Return some of them."""
        return Placed(self.y[keep], self.x[keep], self.variant[keep], self.turn[keep], self.gain[keep])

    def near(self, rows: NDArray[np.int64], cols: NDArray[np.int64], reach: int) -> NDArray[np.int64]:
        """Return which of them reach into a rectangle of pixels, in a fixed order."""
        inside = (self.y >= rows[0] - reach) & (self.y <= rows[-1] + reach)
        inside &= (self.x >= cols[0] - reach) & (self.x <= cols[-1] + reach)
        return np.flatnonzero(inside)


def place_nuclei(
    rng: np.random.Generator,
    spec: SyntheticSpec,
    anatomy: Anatomy,
    kind: int,
    warps: tuple[NDArray[np.float32], NDArray[np.float32]],
) -> Placed:
    """Place the nuclei of one tissue type; long ones follow the fibres that `warps` ``(x, y)`` bend."""
    pitch = 1000 / np.sqrt(TISSUE_TYPES[kind].nuclei_per_mm2)
    xy_um = _jittered(rng, spec.size_um, pitch, 0.42)
    i, j = _lattice(xy_um, anatomy.tissue.shape)
    keep = rng.random(len(xy_um)) < anatomy.composition[kind][i, j]
    xy_um, i, j = xy_um[keep], i[keep], j[keep]
    # Fibres are the lines on which y + warp_y is constant.
    down, along = np.gradient(warps[1] * spec.mpp / LATTICE_UM)
    angle = np.arctan2(-along, 1 + down)[i, j] + 0.2 * rng.standard_normal(len(i))
    turn = np.round(angle / np.pi * ORIENTATIONS).astype(int) % ORIENTATIONS
    return _placed(rng, xy_um / spec.mpp, turn)


def place_glands(rng: np.random.Generator, spec: SyntheticSpec, anatomy: Anatomy) -> Placed:
    """Place glands where most of their surroundings are of the gland type."""
    xy_um = _jittered(rng, spec.size_um, GLAND_PITCH_UM, 0.15)
    around = anatomy.composition[GLANDS]
    shares = []
    for dx, dy in ((0, 0), (24, 0), (-24, 0), (0, 24), (0, -24)):
        i, j = _lattice(xy_um + np.array([dx, dy]), anatomy.tissue.shape)
        shares.append(around[i, j])
    keep = np.mean(shares, axis=0) > 0.7
    return _placed(rng, xy_um[keep] / spec.mpp, rng.integers(0, 4, int(keep.sum())))


def _jittered(
    rng: np.random.Generator, size_um: tuple[float, float], pitch: float, jitter: float
) -> NDArray[np.float64]:
    """Return ``(x, y)`` on a lattice with every other row shifted, each moved by up to `jitter` pitches."""
    cols, rows = (int(np.ceil(side / pitch)) for side in size_um)
    y, x = np.mgrid[0:rows, 0:cols].astype(np.float64)
    x += 0.5 * (y % 2)
    xy = np.stack([x, y], axis=-1).reshape(-1, 2) + rng.uniform(-jitter, jitter, (rows * cols, 2))
    return xy * pitch


def _lattice(
    xy_um: NDArray[np.float64], shape: tuple[int, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    at = np.floor(xy_um / LATTICE_UM).astype(int)
    return np.clip(at[:, 1], 0, shape[0] - 1), np.clip(at[:, 0], 0, shape[1] - 1)


def _placed(rng: np.random.Generator, xy_px: NDArray[np.float64], turn: NDArray[np.int64]) -> Placed:
    n = len(xy_px)
    x, y = np.round(xy_px.T).astype(int)
    gain = np.clip(1 + 0.14 * rng.standard_normal(n), 0.6, 1.4)
    return Placed(y, x, rng.integers(0, 1 << 16, n), turn, gain)
