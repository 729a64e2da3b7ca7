"""How much of each stain, and how it is distributed over the pixels of a patch."""

from typing import Any

import torch
from torch import Tensor

from featurestore.encoders.handcrafted.morphology_features.moments import (
    correlation,
    mean_sd,
    mean_sd_skew,
    percentiles,
)
from featurestore.encoders.stain_separation import STAINS

PERCENTILES = (0.02, 0.1, 0.25, 0.5, 0.75, 0.9, 0.98)
HISTOGRAM = (-0.6, 2.6, 640)
"""Lowest and highest stain, and bins, of 0.005 each; the unmixing gives negative stains, too."""
_PAIRS = ((0, 0, 1), (1, 2, 2))
"""First and second stain of each correlation."""
COLOURS = ("red", "green", "blue")


def names() -> tuple[str, ...]:
    """Return the names of what `measure` returns."""
    found = [f"{colour}.{stat}" for stat in ("mean", "sd") for colour in COLOURS]
    found += [f"{stain}.{stat}" for stat in ("mean", "sd", "skew") for stain in STAINS]
    found += [f"{stain}.p{round(share * 100):02d}" for stain in STAINS for share in PERCENTILES]
    found += [f"correlation.{STAINS[a]}-{STAINS[b]}" for a, b in zip(*_PAIRS, strict=True)]
    return tuple(found)


def measure(patches: Tensor, half: Tensor) -> Tensor:
    """Describe the pixels.

    Parameters
    ----------
    patches
        RGB, uint8, ``(n, height, width, 3)``.
    half
        Stains at half scale, ``(n, 3, height, width)``.
    """
    n = len(patches)
    # Colours at full scale, as `colour` measures them; stains at half scale, where their noise is a half.
    light = patches.permute(0, 3, 1, 2).reshape(n, 3, -1).float() / 255
    coarse = half.reshape(n, 3, -1)
    parts = [*mean_sd(light), *mean_sd_skew(coarse)]
    parts.append(percentiles(coarse, PERCENTILES, *HISTOGRAM).reshape(n, -1))
    parts.append(correlation(coarse[:, _PAIRS[0]], coarse[:, _PAIRS[1]]))
    return torch.cat(parts, dim=1)


def facts() -> dict[str, Any]:
    """Return what decides the numbers, JSON-ready."""
    return {"percentiles": list(PERCENTILES), "histogram": list(HISTOGRAM)}
