"""Texture: oriented filters over octaves of the haematoxylin and eosin maps.

Each octave is half the scale of the last. At each, quadrature pairs of filters give the strength of
structure about five pixels wide, whatever its exact place; statistics of it are averaged over
orientations, so that a turned slide gives nearly the same numbers.

Terms
    band        mean of the even filters' responses: dark blobs negative, bright blobs positive
    strength    modulus of a quadrature pair at one orientation
    texture     strength, averaged over orientations
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from featurestore.encoders.handcrafted.morphology_features.moments import (
    correlation,
    halve,
    mean_sd,
    mean_sd_skew,
)
from featurestore.encoders.stain_separation import STAINS

OCTAVES = 5
"""Six were tried and gained nothing (see docs/morphology.md)."""
ORIENTATIONS = 4
"""45 degrees apart: statistics over them change little when a slide is turned."""
SIDE = 7
"""Of a filter, pixels: twice the envelope's deviation on each side."""
ENVELOPE = 1.7
"""Standard deviation of the filters' Gaussian, pixels."""
WAVELENGTH = 5.0
"""Of the filters' wave, pixels. 4 was tried and gained nothing."""
FIRST_STRIDE = 2
"""Step at which the finest octave is filtered: its strength varies slowly, and it costs most."""
POOLS = (4, 8)
"""Sides of the squares over which texture is averaged to see how uneven it is, pixels of the filtered map;
at most half the map."""
CHANNELS = 2
"""Haematoxylin and eosin; the residual was tried and gained nothing."""
FIRST_LOWPASS = 2
"""Octave from which on the maps themselves are described: the finer ones' spread is in `stain_statistics`."""
_STATS = ("texture", "texture_sd", "band_skew", "local_anisotropy", "anisotropy")


def names() -> tuple[str, ...]:
    """Return the names of what `measure` returns."""
    stats = (*_STATS, *(f"texture_sd_over_{side}" for side in POOLS))
    found = []
    for octave in range(OCTAVES):
        here = stats if octave < FIRST_LOWPASS else (*stats, "lowpass_sd")
        found += [f"octave{octave}.{stain}.{stat}" for stat in here for stain in STAINS[:CHANNELS]]
        kinds = ("band", "texture") if octave < FIRST_LOWPASS else ("band", "texture", "lowpass")
        found += [f"octave{octave}.correlation.{kind}" for kind in kinds]
        if octave:
            found += [f"octave{octave}.{stain}.texture_with_finer" for stain in STAINS[:CHANNELS]]
    return tuple(found)


def filters() -> Tensor:
    """Return even, then odd filters, shape ``(2 * ORIENTATIONS, 1, SIDE, SIDE)``; a unit wave gives about 1."""
    reach = SIDE // 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1].astype(np.float64)
    envelope = np.exp(-(x**2 + y**2) / (2 * ENVELOPE**2))
    even, odd = [], []
    for angle in np.arange(ORIENTATIONS) * np.pi / ORIENTATIONS:
        phase = 2 * np.pi / WAVELENGTH * (x * np.cos(angle) + y * np.sin(angle))
        wave = np.cos(phase)
        # The even wave has a mean under the envelope; without it the filter would respond to a flat map.
        wave = envelope * (wave - (envelope * wave).sum() / envelope.sum())
        even.append(wave * 2 / envelope.sum())
        odd.append(envelope * np.sin(phase) * 2 / envelope.sum())
    return torch.from_numpy(np.stack(even + odd)[:, None].astype(np.float32))


def measure(stains: Tensor, half: Tensor, bank: Tensor) -> Tensor:
    """Describe the texture of maps.

    Parameters
    ----------
    stains, half
        Stains at full and at half scale, ``(n, 3, height, width)``.
    bank
        From `filters`, on the maps' device.
    """
    band, strength = _filtered(stains[:, :CHANNELS], bank, FIRST_STRIDE)
    # At stride 2 its maps have the size of the next octave's already: only later octaves are halved to be compared.
    finer = strength.mean(2)
    parts = _statistics(band, strength, finer, None)
    maps = half[:, :CHANNELS]
    for octave in range(1, OCTAVES):
        if octave > 1:
            maps, finer = halve(maps), halve(finer)
        band, strength = _filtered(maps, bank, 1)
        texture = strength.mean(2)
        parts += _statistics(band, strength, texture, maps if octave >= FIRST_LOWPASS else None)
        height, width = maps.shape[2:]
        parts.append(correlation(finer[..., :height, :width].flatten(2), texture.flatten(2)))
        finer = texture
    return torch.cat(parts, dim=1)


def _filtered(maps: Tensor, bank: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Return the band ``(n, c, y, x)`` and the strengths ``(n, c, orientation, y, x)``."""
    n, channels, height, width = maps.shape
    reach = SIDE // 2
    # Replicated edges: zeros would be a sharp border of clear glass around every patch.
    padded = pad(maps.reshape(n * channels, 1, height, width), (reach,) * 4, mode="replicate")
    found = conv2d(padded, bank, stride=stride)
    found = found.reshape(n, channels, 2, ORIENTATIONS, *found.shape[-2:])
    even, odd = found[:, :, 0], found[:, :, 1]
    return even.mean(2), (even * even + odd * odd).sqrt()


def _statistics(band: Tensor, strength: Tensor, texture: Tensor, lowpass: Tensor | None) -> list[Tensor]:
    flat, band = texture.flatten(2), band.flatten(2)
    mean, sd = mean_sd(flat)
    local = strength.amax(2).flatten(2).mean(-1) - mean
    overall = strength.flatten(3).mean(-1)
    parts = [mean, sd, mean_sd_skew(band)[2], local, overall.amax(2) - overall.amin(2)]
    for side in POOLS:
        # At least two squares a side, or nothing could differ.
        size = [max(1, min(side, length // 2)) for length in texture.shape[2:]]
        parts.append(mean_sd(avg_pool2d(texture, size).flatten(2))[1])
    compared = [band, flat]
    if lowpass is not None:
        compared.append(lowpass.flatten(2))
        parts.append(mean_sd(compared[-1])[1])
    both = torch.stack(compared, dim=1)
    return [*parts, correlation(both[:, :, 0], both[:, :, 1])]


def facts() -> dict[str, Any]:
    """Return what decides the numbers, JSON-ready."""
    return {
        "octaves": OCTAVES,
        "channels": CHANNELS,
        "padding": "replicate",
        "orientations": ORIENTATIONS,
        "side": SIDE,
        "envelope": ENVELOPE,
        "wavelength": WAVELENGTH,
        "first_stride": FIRST_STRIDE,
        "first_lowpass": FIRST_LOWPASS,
        "pools": list(POOLS),
    }
