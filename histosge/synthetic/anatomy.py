"""Where tissue lies and of which type, on the lattice. Draws no pixel and knows no gene.

Terms
    composition   share of each tissue type at a lattice position; sums to 1 on tissue, 0 elsewhere
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from histosge.synthetic.fields import LATTICE_UM, lattice_shape, smooth_noise
from histosge.synthetic.spec import SyntheticSpec
from histosge.synthetic.tissue_types import STROMA, TISSUE_TYPES

TISSUE_SHARE = 0.62
SEPTUM = 0.14
"""Half-width of the stromal septa through tumour, in standard deviations of the field they follow."""


@dataclass(frozen=True)
class Anatomy:
    """The layout of one section.

    Parameters
    ----------
    tissue
        Shape ``(n_y, n_x)``.
    label
        0 = background, else 1 + place in `TISSUE_TYPES`; ``(n_y, n_x)``, uint8.
    composition
        Shape ``(n_types, n_y, n_x)``.
    """

    tissue: NDArray[np.bool_]
    label: NDArray[np.uint8]
    composition: NDArray[np.float32]


def make_anatomy(spec: SyntheticSpec) -> Anatomy:
    """Lay out a section: outline, tissue types, and their mixing at the borders."""
    rng = np.random.default_rng([spec.seed, 1])
    shape = lattice_shape(spec.size_um)
    side_um = min(spec.size_um)
    tissue = _outline(rng, shape, side_um)
    place = _types(rng, tissue, side_um)
    one_hot = np.stack([(place == k) & tissue for k in range(len(TISSUE_TYPES))]).astype(np.float32)
    mixed = np.stack([ndimage.gaussian_filter(plane, 0.7) for plane in one_hot])
    composition = np.where(tissue, mixed / np.maximum(mixed.sum(axis=0), 1e-6), 0).astype(np.float32)
    return Anatomy(tissue, np.where(tissue, place + 1, 0).astype(np.uint8), composition)


def _outline(rng: np.random.Generator, shape: tuple[int, int], side_um: float) -> NDArray[np.bool_]:
    v, u = (np.abs(np.linspace(-1, 1, n)) for n in shape)
    radius = (u[None] ** 2.4 + v[:, None] ** 2.4) ** (1 / 2.4)
    wobble = 0.10 * smooth_noise(rng, shape, 0.11 * side_um / LATTICE_UM)
    fray = 0.018 * smooth_noise(rng, shape, max(1.5, 0.012 * side_um / LATTICE_UM))
    # Glass all around, as on a slide: towards the rim no wobble is strong enough.
    rim = np.maximum(np.maximum(u[None], v[:, None]) - 0.86, 0) * 6
    outside = radius + wobble + fray + rim
    inside = outside <= np.quantile(outside, TISSUE_SHARE)
    parts, count = ndimage.label(inside)
    sizes = np.bincount(parts.ravel(), minlength=count + 1)
    sizes[0] = 0
    return np.asarray(ndimage.binary_fill_holes(parts == sizes.argmax()))


def _types(rng: np.random.Generator, tissue: NDArray[np.bool_], side_um: float) -> NDArray[np.int64]:
    """Return each position's place in `TISSUE_TYPES`: the largest of smooth fields, balanced to the wanted shares."""
    wide = max(40.0, 0.045 * side_um) / LATTICE_UM
    scores = np.stack([smooth_noise(rng, tissue.shape, wide) for _ in TISSUE_TYPES])
    detail = np.stack([smooth_noise(rng, tissue.shape, max(3.0, wide / 5)) for _ in TISSUE_TYPES])
    scores = scores + 0.25 * detail
    septa = np.abs(smooth_noise(rng, tissue.shape, wide * 0.55)) < SEPTUM
    wanted = np.array([kind.share for kind in TISSUE_TYPES])
    bias = np.zeros(len(TISSUE_TYPES))
    inside = scores[:, tissue]
    for _ in range(40):
        held = np.bincount((inside + bias[:, None]).argmax(axis=0), minlength=len(wanted)) / inside.shape[1]
        bias += 0.4 * np.log((wanted + 0.01) / (held + 0.01))
    place = (scores + bias[:, None, None]).argmax(axis=0)
    return np.where(septa & (place == 0), STROMA, place)
