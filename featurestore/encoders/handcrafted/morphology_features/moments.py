"""Statistics over positions: what turns maps into numbers, finite on any flat map.

A sum that ends in a single number is shared out among torch's threads, and then its last bit depends on how
many there are. So several maps are always reduced at once, each by one thread.

Terms
    map   one value a position, shape ``(..., positions)`` or ``(..., height, width)``
"""

from typing import Any

import torch
from torch import Tensor

FLOOR = 1e-3
"""Added to a spread before dividing by it: below a grey step, so that a flat map gives 0 and no noise."""
SKEW_LIMIT = 10.0
"""One speck of dust on clean glass has a skewness of hundreds, and would pull a linear model with it."""


def mean_sd_skew(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, standard deviation and skewness (cut at `SKEW_LIMIT`) over the last dimension."""
    # Moments of centred values: those of raw ones cancel to noise on nearly flat maps.
    mean = values.mean(-1)
    centred = values - mean.unsqueeze(-1)
    square = centred * centred
    sd = square.mean(-1).sqrt()
    skew = (square * centred).mean(-1) / (sd + FLOOR) ** 3
    return mean, sd, skew.clamp(-SKEW_LIMIT, SKEW_LIMIT)


def mean_sd(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation over the last dimension."""
    mean = values.mean(-1)
    centred = values - mean.unsqueeze(-1)
    return mean, (centred * centred).mean(-1).sqrt()


def correlation(one: Tensor, other: Tensor, floor: float = FLOOR) -> Tensor:
    """Return the correlation of two maps over the last dimension; 0 where either is flat."""
    a = one - one.mean(-1, keepdim=True)
    b = other - other.mean(-1, keepdim=True)
    spread = ((a * a).mean(-1).sqrt() + floor) * ((b * b).mean(-1).sqrt() + floor)
    return (a * b).mean(-1) / spread


def halve(maps: Tensor) -> Tensor:
    """Average 2 x 2 neighbours of maps ``(n, c, height, width)``; an odd last row or column is left out."""
    height, width = maps.shape[2] // 2 * 2, maps.shape[3] // 2 * 2
    even, odd = maps[..., 0:height:2, :width], maps[..., 1:height:2, :width]
    # By hand: pooling takes three times as long on a CPU.
    return (even[..., ::2] + even[..., 1::2] + odd[..., ::2] + odd[..., 1::2]) * 0.25


def percentiles(values: Tensor, shares: tuple[float, ...], low: float, high: float, bins: int) -> Tensor:
    """Return percentiles over the last dimension, read from a histogram: a sort would cost ten times more.

    Parameters
    ----------
    values
        Shape ``(n, channels, positions)``.
    shares
        Each in (0, 1).
    low, high, bins
        The histogram; values outside count in its first and last bin.

    Returns
    -------
    torch.Tensor
        Shape ``(n, channels, shares)``, interpolated within a bin.
    """
    n, channels, positions = values.shape
    step = (high - low) / bins
    # Clamped before it is an integer: a float beyond an integer's range has no defined value as one.
    place = ((values - low) / step).clamp(0, bins - 1).long()
    counts = torch.zeros(n, channels, bins, device=values.device, dtype=torch.long)
    # Integers: adding them in any order gives the same counts, whatever the number of threads.
    counts.scatter_add_(2, place, torch.ones_like(place))
    reached = counts.cumsum(2)
    wanted = torch.tensor(shares, device=values.device, dtype=torch.float32) * positions
    at = (reached.unsqueeze(2) < wanted[:, None]).sum(-1)
    inside = counts.gather(2, at)
    before = reached.gather(2, at) - inside
    return low + step * (at + (wanted - before) / inside)


def facts() -> dict[str, Any]:
    """Return what decides the numbers, JSON-ready."""
    return {"floor": FLOOR, "skew_limit": SKEW_LIMIT}
