"""Statistics over positions: what turns maps into numbers, finite on any flat map.

A sum that ends in a single number is shared out among torch's threads, and then its last bit depends on how
many there are. So several maps are always reduced at once, each by one thread.

Terms
    map   one value a position, shape ``(..., positions)`` or ``(..., height, width)``
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

FLOOR = 1e-3
"""Added to a spread before dividing by it: below a grey step, so that a flat map gives 0 and no noise."""
ALIGNED = 16
"""Values to a multiple of which the rows of a product are filled up with zeros, or a patch's last bits would depend on its
place in a batch."""
SKEW_LIMIT = 10.0
"""One speck of dust on clean glass has a skewness of hundreds, and would pull a linear model with it."""


@dataclass(frozen=True)
class Moments:
    """Moments of maps over their positions, from which `sd`, `skew` and `correlation` follow without the maps.

    Parameters
    ----------
    mean
        Shape ``(n, maps)``.
    products
        Mean products of each two maps, centred, ``(n, maps, maps)``.
    cubes
        Mean cubes of the first maps, centred, ``(n, some maps)``.
    """

    mean: Tensor
    products: Tensor
    cubes: Tensor

    @classmethod
    def from_maps(cls, maps: Tensor, skewed: int) -> "Moments":
        """Reduce maps ``(n, maps, positions)``; cubes of the first `skewed` ones."""
        mean = maps.mean(-1)
        # Centred first: moments of raw values cancel to noise on nearly flat maps.
        centred = maps - mean.unsqueeze(-1)
        products = _products(centred)
        some = centred[:, :skewed]
        return cls(mean, products.div_(maps.shape[2]), (some * some).mul_(some).mean(-1))

    @property
    def sd(self) -> Tensor:
        """Standard deviations, ``(n, maps)``."""
        return self.products.diagonal(dim1=1, dim2=2).sqrt()

    @property
    def skew(self) -> Tensor:
        """Skewness of the first maps, cut at `SKEW_LIMIT`."""
        found = self.cubes / (self.sd[:, : self.cubes.shape[1]] + FLOOR) ** 3
        return found.clamp(-SKEW_LIMIT, SKEW_LIMIT)

    def correlation(self, ones: Sequence[int], others: Sequence[int]) -> Tensor:
        """Return the correlation of each of `ones` with its counterpart, ``(n, pairs)``; 0 where either is flat."""
        a, b = list(ones), list(others)
        sd = self.sd + FLOOR
        return self.products[:, a, b] / (sd[:, a] * sd[:, b])


def _products(maps: Tensor) -> Tensor:
    """Return the products of each two maps, ``(n, maps, maps)``, of ``(n, maps, positions)``."""
    # MKL shares a lone product out among its threads, on some processors along the positions: the last bits would depend
    # on the number of threads. Of several products each is computed by one thread.
    parts = 2 if len(maps) == 1 else 1
    # It adds up in another order where a row does not begin at a multiple of 64 bytes.
    missing = -maps.shape[2] % (parts * ALIGNED)
    aligned = pad(maps, (0, missing)) if missing else maps
    n, n_maps, length = aligned.shape
    of_parts = aligned.reshape(n, n_maps, parts, length // parts).transpose(1, 2).flatten(0, 1)
    products = torch.bmm(of_parts, of_parts.transpose(1, 2))
    return products.reshape(n, parts, n_maps, n_maps).sum(1) if parts > 1 else products


def spread(values: Tensor) -> Tensor:
    """Return the standard deviation over the last dimension."""
    centred = values - values.mean(-1, keepdim=True)
    return centred.mul_(centred).mean(-1).sqrt()


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
    # Counts below 2^24 are exact as floats, in which they are compared with what is wanted.
    at = torch.searchsorted(reached.float(), wanted.expand(n, channels, -1).contiguous())
    inside = counts.gather(2, at)
    before = reached.gather(2, at) - inside
    return low + step * (at + (wanted - before) / inside)


def facts() -> dict[str, Any]:
    """Return what decides the numbers, JSON-ready."""
    return {"floor": FLOOR, "skew_limit": SKEW_LIMIT}
