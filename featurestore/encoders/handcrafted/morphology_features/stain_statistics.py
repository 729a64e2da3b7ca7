"""How much of each stain, and how it is distributed over the pixels of a patch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from featurestore.encoders.handcrafted.colour import feature_names as colour_names
from featurestore.encoders.handcrafted.morphology_features.moments import Moments, percentiles
from featurestore.encoders.stain_separation import STAINS

PERCENTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
HISTOGRAM = (-0.6, 2.6, 640)
"""Lowest and highest stain, and bins, of 0.005 each; the unmixing gives negative stains, too."""
_PAIRS = ((0, 0, 1), (1, 2, 2))
"""First and second stain of each correlation."""


def names() -> tuple[str, ...]:
    """Return the names of what `describe` returns."""
    found = [*colour_names()]
    found += [f"{stain}.{stat}" for stat in ("mean", "sd", "skew") for stain in STAINS]
    found += [f"{stain}.p{round(share * 100):02d}" for stain in STAINS for share in PERCENTILES]
    found += [f"correlation.{STAINS[a]}-{STAINS[b]}" for a, b in zip(*_PAIRS, strict=True)]
    return tuple(found)


def reduce(half: Tensor) -> list[Tensor]:
    """Reduce stains at half scale, where their noise is a half, ``(n, 3, height, width)``, to what `describe` takes."""
    maps = half.flatten(2)
    moments = Moments.from_maps(maps, len(STAINS))
    return [moments.mean, moments.products, moments.cubes, percentiles(maps, PERCENTILES, *HISTOGRAM)]


def describe(colours: Tensor, reduced: Sequence[Tensor]) -> Tensor:
    """Return the numbers that `names` lists; `colours` is what `colour` makes of the patches, ``(n, 6)``."""
    mean, products, cubes, shares = reduced
    moments = Moments(mean, products, cubes)
    parts = [colours, mean, moments.sd, moments.skew, shares.flatten(1), moments.correlation(*_PAIRS)]
    return torch.cat(parts, dim=1)


def facts() -> dict[str, Any]:
    """Return what decides the numbers, JSON-ready."""
    return {"percentiles": list(PERCENTILES), "histogram": list(HISTOGRAM)}
