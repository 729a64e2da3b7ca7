"""Nuclei: dark blobs of haematoxylin, counted by size and by contrast, without a segmentation.

Differences of Gaussians at half scale respond most where a blob's radius is about 1.4 sigma. A nucleus
is a position where the response is greatest among its neighbours and among all sizes.

Terms
    sigma      of the smaller Gaussian, pixels at half scale; radius in patch pixels is about 2.8 sigma
    contrast   the response at a blob, in units of haematoxylin
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from featurestore.encoders.handcrafted.morphology_features.moments import FLOOR

# Half an octave apart: radii of 2.8 to 11 patch pixels.
SIGMAS = (1.0, 1.41, 2.0, 2.83, 4.0)
COARSEST = 5.66
"""Sigma of the larger Gaussian at the last size; at the others it is the next size's."""
CONTRASTS = (0.03, 0.08, 0.16)
NEIGHBOURS = 5
"""Side of the square within which a blob must be the greatest."""
PER_PX = 10_000
"""Densities are blobs for so many patch pixels."""


def names() -> tuple[str, ...]:
    """Return the names of what `measure` returns."""
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


def measure(half: Tensor, kernels: Tensor) -> Tensor:
    """Describe the nuclei.

    Parameters
    ----------
    half
        Stains at half scale, ``(n, 3, height, width)``.
    kernels
        From `gaussians`, on the same device.
    """
    height, width = half.shape[2:]
    response = _difference_of_gaussians(half[:, :1], kernels)
    greatest = _local_maximum(response.amax(1, keepdim=True))
    peak = (response == greatest) & (response > CONTRASTS[0])
    share = PER_PX / (4 * height * width)  # 4 patch pixels to a position at half scale
    counts = (
        torch.stack([(peak & (response > c)).flatten(2).sum(-1) for c in CONTRASTS], dim=2).float() * share
    )
    energy = (response * response).flatten(2).mean(-1).sqrt()
    weight = peak.float()
    some = _total(weight) + FLOOR

    def at_peaks(values: Tensor) -> Tensor:
        return _total(weight * values) / some

    size = torch.arange(len(SIGMAS), device=half.device, dtype=torch.float32).view(1, -1, 1, 1) / 2
    mean_size = at_peaks(size)
    spread = (at_peaks(size * size) - mean_size**2).clamp_min(0).sqrt()
    single = [at_peaks(response), mean_size, spread, at_peaks(half[:, :1]), at_peaks(half[:, 1:2])]
    return torch.cat([counts.flatten(1), energy, counts.sum(1), torch.stack(single, dim=1)], dim=1)


def _total(maps: Tensor) -> Tensor:
    # Over positions first: many sums at once, each by one thread, so that the bits do not depend on their number.
    return maps.flatten(2).sum(-1).sum(1)


def _difference_of_gaussians(maps: Tensor, kernels: Tensor) -> Tensor:
    """Return the differences of Gaussians, finer minus coarser, ``(n, sigmas, y, x)``."""
    count, _, side = kernels.shape
    reach = side // 2
    padded = pad(maps, (reach,) * 4, mode="replicate")
    # A Gaussian is separable: two passes of `side` products a position instead of one of `side` squared.
    across = conv2d(padded, kernels.unsqueeze(2))
    smooth = conv2d(across, kernels.unsqueeze(3), groups=count)
    return smooth[:, :-1] - smooth[:, 1:]


def _local_maximum(maps: Tensor) -> Tensor:
    """Return the maximum over a square around each position: by shifts, as pooling is ten times slower here."""
    reach = NEIGHBOURS // 2
    for dim in (2, 3):
        size = maps.shape[dim]
        around = (reach, reach, 0, 0) if dim == 3 else (0, 0, reach, reach)
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
