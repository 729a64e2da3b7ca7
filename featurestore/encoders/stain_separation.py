"""From RGB to stains: optical density, then haematoxylin, eosin and what neither explains.

Light absorbed adds up in optical density, not in RGB: there the two dyes are two directions, the
same on every slide here. They are the published average ones, never fitted to the slide at hand,
so that a number means the same on all slides of a cohort.

Terms
    density   -log10 of the transmitted share of light, per colour channel; white is 0
    stain     (haematoxylin, eosin, residual): coordinates of a density along the dyes' directions
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

STAINS = ("haematoxylin", "eosin", "residual")
DYES_RGB = ((0.650, 0.704, 0.286), (0.072, 0.990, 0.105))
"""Density of one unit of haematoxylin and of eosin in R, G, B (Ruifrok and Johnston 2001)."""


def density_table() -> Tensor:
    """Return the optical density of each grey value, shape ``(256,)``: a table is exact on any machine."""
    # 1 is added to both: black has a density, and white has 0.
    grey = np.arange(256, dtype=np.float64)
    return torch.from_numpy((-np.log10((grey + 1.0) / 256.0)).astype(np.float32))


def unmixing() -> Tensor:
    """Return the matrix from densities (R, G, B) to stains, shape ``(3, 3)``, one row a stain."""
    dyes = np.array(DYES_RGB)
    # Perpendicular to both dyes: what neither explains, so that three colours give three coordinates.
    residual = np.cross(dyes[0], dyes[1])
    mixing = np.stack([row / np.linalg.norm(row) for row in (*dyes, residual)])
    return torch.from_numpy(np.linalg.inv(mixing).T.astype(np.float32))


def separate(patches: Tensor, table: Tensor, matrix: Tensor) -> Tensor:
    """Return the stains of patches.

    Parameters
    ----------
    patches
        RGB, uint8, shape ``(n, height, width, 3)``.
    table, matrix
        From `density_table` and `unmixing`, on the patches' device.

    Returns
    -------
    torch.Tensor
        Float32, shape ``(n, 3, height, width)``.
    """
    n, height, width, _ = patches.shape
    planes = patches.permute(0, 3, 1, 2).to(torch.int32, memory_format=torch.contiguous_format)
    density = table.index_select(0, planes.view(-1)).reshape(n, 3, height * width)
    return torch.matmul(matrix, density).reshape(n, 3, height, width)


def facts() -> dict[str, Any]:
    """Return what decides the stains, JSON-ready."""
    return {
        "density": "-log10((grey + 1) / 256)",
        "dyes_rgb": [list(dye) for dye in DYES_RGB],
        "residual": "cross product",
    }
