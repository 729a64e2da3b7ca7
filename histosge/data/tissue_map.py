"""Where the tissue of a slide lies and how it is stained, patch by patch: what spots are compared with.

Terms
    optical density  -log10 of the transmitted light, per colour channel; stains add up in it (Beer-Lambert)
    stain density    the first two principal components of the tissue's optical density: how dark, and which hue
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from featurestore.storage.store import StoredGrid

N_STAINS = 2
"""Stain densities of a patch: as many as H&E has stains."""
# Beyond it a patch holds pen, a fold or the black border of a scan, and would dominate the components.
MAX_DENSITY = 1.0
# Of the Gaussian that smooths stain densities: the radius of a Visium spot with its neighbourhood. Over patches of
# 112 µm and more it does little.
SMOOTHING_UM = 60.0


@dataclass(frozen=True)
class TissueMap:
    """Tissue and colour of a slide's patches, and where these are.

    Parameters
    ----------
    is_tissue
        ``(n_rows, n_cols)``.
    y_um, x_um
        Centres of patches, in microns.
    size_um
        The slide's ``(width, height)``.
    rgb
        Mean colour of each patch, ``(n_rows, n_cols, 3)``, uint8; None where it is not known.
    """

    is_tissue: NDArray[np.bool_]
    y_um: NDArray[np.float64]
    x_um: NDArray[np.float64]
    size_um: tuple[float, float]
    rgb: NDArray[np.uint8] | None = None

    @classmethod
    def from_grid(cls, stored: StoredGrid, size_um: tuple[float, float]) -> Self:
        """Take a stored grid's tissue and colours."""
        return cls(stored.is_tissue, stored.grid.y_um, stored.grid.x_um, size_um, stored.rgb)

    @property
    def step_um(self) -> float:
        """Distance of neighbouring patches."""
        axis = self.x_um if len(self.x_um) > 1 else self.y_um
        return float(axis[1] - axis[0]) if len(axis) > 1 else 1.0

    def inside(self, xy_um: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell which positions lie on the slide."""
        return np.asarray(((xy_um >= 0) & (xy_um <= np.asarray(self.size_um))).all(axis=1))

    def nearest(self, xy_um: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return ``(rows, cols)`` of the patches nearest to positions."""
        return _nearest(self.y_um, self.step_um, xy_um[:, 1]), _nearest(self.x_um, self.step_um, xy_um[:, 0])

    def on_tissue(self, xy_um: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Tell for which positions the nearest patch is tissue; positions off the slide are not on tissue."""
        return np.asarray(self.inside(xy_um) & self.is_tissue[self.nearest(xy_um)])

    def extent_um(self) -> NDArray[np.float64]:
        """``(x, y)`` extent of the tissue; 0 if there is none."""
        rows, cols = np.nonzero(self.is_tissue)
        if len(rows) == 0:
            return np.zeros(2)
        return np.array([np.ptp(self.x_um[cols]), np.ptp(self.y_um[rows])])

    @cached_property
    def stain(self) -> NDArray[np.float64]:
        """Smoothed stain densities of tissue patches, ``(2, n_rows, n_cols)``; 0 elsewhere and without colours."""
        tissue, nothing = self.is_tissue, np.zeros((N_STAINS, *self.is_tissue.shape))
        if self.rgb is None or int(tissue.sum()) <= N_STAINS:
            return nothing
        # + 1: black has a finite density.
        density = np.clip(-np.log10((self.rgb.astype(np.float64) + 1) / 256), 0, MAX_DENSITY)
        density -= density[tissue].mean(axis=0)
        _, axes = np.linalg.eigh(np.cov(density[tissue].T))
        components = np.moveaxis(density @ axes[:, ::-1][:, :N_STAINS], -1, 0) * tissue
        # A normalised convolution: glass beside the tissue must not make its edge pale.
        sigma = SMOOTHING_UM / self.step_um
        weight = gaussian_filter(tissue.astype(np.float64), sigma, mode="constant")
        out = nothing
        for i, values in enumerate(components):
            smooth = gaussian_filter(values, sigma, mode="constant") / np.maximum(weight, 1e-3) * tissue
            deviation = float(smooth[tissue].std())
            out[i] = smooth / deviation if deviation > 1e-9 else 0.0
        return out


def _nearest(centres: NDArray[np.float64], step: float, values: NDArray[np.float64]) -> NDArray[np.int64]:
    # Clipped before the conversion to integers, which positions far off the slide would overflow.
    places = np.clip(np.rint((values - centres[0]) / step), 0, len(centres) - 1)
    return np.asarray(places, dtype=np.int64)
