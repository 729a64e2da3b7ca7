"""Nuclei: dark blobs of haematoxylin, counted by size and by contrast, without a segmentation.

Differences of Gaussians at half scale respond most where a blob's radius is about 1.4 sigma. A nucleus
is a position where the response is greatest among its neighbours and among all sizes.

Terms
    sigma      of the smaller Gaussian, pixels at half scale; radius in patch pixels is about 2.8 sigma
    contrast   the response at a blob, in units of haematoxylin
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from featurestore.encoders.handcrafted.morphology_features.moments import FLOOR

# Half an octave apart: radii of 2.8 to 11 patch pixels.
SIGMAS = (1.0, 1.41, 2.0, 2.83, 4.0)
COARSEST = 5.66
"""Sigma of the larger Gaussian at the last size; at the others it is the next size's."""
CONTRASTS = (0.03, 0.08, 0.16)
NEIGHBOURS = 5
"""Side of the square within which a blob must be the greatest."""
BLOCK = 16
"""Positions that one product of the blur gives: 8 took as long, 28 a fifth longer."""
PER_PX = 10_000
"""Densities are blobs for so many patch pixels."""


def names() -> tuple[str, ...]:
    """Return the names of what `describe` returns."""
    found = [f"nuclei.sigma{s:g}.over{c:g}" for s in SIGMAS for c in CONTRASTS]
    found += [f"nuclei.sigma{s:g}.energy" for s in SIGMAS]
    found += [f"nuclei.over{c:g}" for c in CONTRASTS]
    return (
        *found,
        "nuclei.contrast",
        "nuclei.log2_sigma",
        "nuclei.log2_sigma_sd",
        "nuclei.haematoxylin",
        "nuclei.eosin",
    )


def gaussians() -> Tensor:
    """Return one-dimensional Gaussians, finest first, ``(sigmas + 1, 1, side)``."""
    sigmas = (*SIGMAS, COARSEST)
    reach = int(np.ceil(3 * sigmas[-1]))  # 99.7 % of the widest Gaussian
    x = np.arange(-reach, reach + 1, dtype=np.float64)
    rows = np.stack([np.exp(-(x**2) / (2 * s**2)) for s in sigmas])
    return torch.from_numpy((rows / rows.sum(1, keepdims=True)).astype(np.float32))[:, None]


def respond(half: Tensor, blur: "GaussianBlur") -> Tensor:
    """Return differences of Gaussians of haematoxylin, finer minus coarser, ``(n, sigmas, height, width)``."""
    smooth = blur(half[:, :1])
    return smooth[:, :-1] - smooth[:, 1:]


def reduce(response: Tensor, half: Tensor) -> list[Tensor]:
    """Reduce maps to what `describe` takes, one row a patch.

    Parameters
    ----------
    response
        From `respond`.
    half
        Stains at half scale, ``(n, 3, height, width)``.
    """
    n, _, height, width = half.shape
    energy = (response * response).flatten(2).mean(-1).sqrt()
    greatest = response.amax(1)
    is_peak = (greatest == _local_maximum(greatest)).logical_and_(greatest > CONTRASTS[0])
    # Few positions are peaks: what follows is of those alone.
    patch, place = is_peak.flatten(1).nonzero(as_tuple=True)
    at = response.flatten(2)[patch, :, place]
    # Of equal responses at two sizes both count.
    weight = (at == at.amax(1, keepdim=True)).float()
    over = [weight * (at > contrast) for contrast in CONTRASTS]
    size = torch.arange(len(SIGMAS), device=half.device, dtype=torch.float32) / 2
    some = weight.sum(1, keepdim=True)
    contrast = (weight * at).sum(1, keepdim=True)
    values = [
        some,
        contrast,
        weight @ torch.stack([size, size * size], 1),
        some * half.flatten(2)[patch, :2, place],
    ]
    columns = torch.cat([*over, *values], dim=1)
    sums = torch.zeros(n, columns.shape[1], device=half.device).index_add_(0, patch, columns)
    split = len(CONTRASTS) * len(SIGMAS)
    # 4 patch pixels to a position at half scale.
    return [energy, sums[:, :split] * (PER_PX / (4 * height * width)), sums[:, split:]]


def describe(reduced: Sequence[Tensor]) -> Tensor:
    """Return the numbers that `names` lists, ``(n, numbers)``, from what `reduce` returns."""
    energy, density, sums = reduced
    counts = density.reshape(-1, len(CONTRASTS), len(SIGMAS)).transpose(1, 2)
    contrast, size, square, haematoxylin, eosin = (sums[:, 1:] / (sums[:, :1] + FLOOR)).unbind(1)
    size_sd = (square - size**2).clamp_min(0).sqrt()
    single = torch.stack([contrast, size, size_sd, haematoxylin, eosin], dim=1)
    return torch.cat([counts.flatten(1), energy, counts.sum(1), single], dim=1)


class GaussianBlur:
    """Convolve a map with every Gaussian, as products with banded matrices.

    A Gaussian is separable: two passes of `side` products a position instead of one of `side` squared. A block of
    neighbouring positions at once makes a pass a matrix product, twice as fast as a convolution with a kernel that long;
    the zeros of the band change no bit of a sum.

    Parameters
    ----------
    kernels
        From `gaussians`.
    device
        Where the maps are.
    """

    def __init__(self, kernels: Tensor, device: torch.device) -> None:
        self._count, _, side = kernels.shape
        self._reach = side // 2
        band = torch.zeros(self._count, BLOCK, BLOCK + side - 1)
        for place in range(BLOCK):
            band[:, place, place : place + side] = kernels[:, 0]
        self._down = band.to(device)
        self._across = band.flatten(0, 1).T.contiguous().to(device)

    def __call__(self, maps: Tensor) -> Tensor:
        """Return the maps ``(n, 1, height, width)`` after each Gaussian, finest first, ``(n, sigmas, height, width)``."""
        n, _, height, width = maps.shape
        blocks = [-(-length // BLOCK) for length in (height, width)]
        extra = [count * BLOCK - length for count, length in zip(blocks, (height, width), strict=True)]
        side, reach = self._across.shape[0], self._reach
        rows = pad(maps, (reach, reach + extra[1], 0, 0), mode="replicate").unfold(3, side, BLOCK)
        across = (rows.reshape(-1, side) @ self._across).reshape(n, height, blocks[1], self._count, BLOCK)
        across = across.permute(0, 3, 1, 2, 4).flatten(3)[..., :width]
        columns = pad(across, (0, 0, reach, reach + extra[0]), mode="replicate").unfold(2, side, BLOCK)
        down = torch.matmul(self._down.unsqueeze(1), columns.transpose(-1, -2))
        return down.flatten(2, 3)[:, :, :height]


def _local_maximum(maps: Tensor) -> Tensor:
    """Return the maximum over a square around each position: by shifts, as pooling is ten times slower here."""
    reach = NEIGHBOURS // 2
    for dim in (1, 2):
        size = maps.shape[dim]
        around = (reach, reach, 0, 0) if dim == 2 else (0, 0, reach, reach)
        padded = pad(maps, around, mode="replicate")
        maps = padded.narrow(dim, 0, size)
        for shift in range(1, NEIGHBOURS):
            maps = torch.maximum(maps, padded.narrow(dim, shift, size))
    return maps


def facts() -> dict[str, Any]:
    """Return what decides the numbers, JSON-ready."""
    return {
        "sigmas": list(SIGMAS),
        "coarsest": COARSEST,
        "padding": "replicate",
        "contrasts": list(CONTRASTS),
        "neighbours": NEIGHBOURS,
        "per_px": PER_PX,
    }
