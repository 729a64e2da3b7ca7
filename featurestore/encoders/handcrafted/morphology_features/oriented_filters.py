"""Texture: oriented filters over octaves of the haematoxylin and eosin maps.

Each octave is half the scale of the last. At each, quadrature pairs of filters give the strength of
structure about five pixels wide, whatever its exact place; statistics of it are averaged over
orientations, so that a turned slide gives nearly the same numbers.

Two rows of positions are filtered at once: eight filters alone fill half of a vector register of AVX-512.

Terms
    band        mean of the even filters' responses: dark blobs negative, bright blobs positive
    strength    modulus of a quadrature pair at one orientation
    texture     strength, averaged over orientations
    phase       positions in even rows, or in odd rows
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, conv2d, pad

from featurestore.encoders.handcrafted.morphology_features.moments import Moments, halve, spread
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
PHASES = 2
"""Rows filtered at once: two fill a register with 16 responses. Four were no faster."""
_STATS = ("texture", "texture_sd", "band_skew", "local_anisotropy", "anisotropy")


def names() -> tuple[str, ...]:
    """Return the names of what `describe` returns."""
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


@dataclass(frozen=True)
class FilterBank:
    """The filters as they are applied, for a step of 2 (the finest octave) and of 1, on one device.

    Each is ``(PHASES * 2 * ORIENTATIONS, 1, SIDE + step, SIDE)``: the filters, and again one step further down. The row
    of zeros that each has changes no bit of a sum.
    """

    coarse: Tensor
    fine: Tensor

    @classmethod
    def from_filters(cls, bank: Tensor, device: torch.device) -> "FilterBank":
        """Lay out what `filters` returns."""
        coarse, fine = (
            torch.cat([pad(bank, (0, 0, 0, step)), pad(bank, (0, 0, step, 0))]).to(device)
            for step in (FIRST_STRIDE, 1)
        )
        return cls(coarse, fine)


Responses = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of one octave: band ``(n, c, positions)``, in any order of positions; texture ``(n, c, height, width)``; means over the
positions: of the strongest orientation ``(n, c)``, and of each one ``(n, c, orientation)``."""


def filter_finest(stains: Tensor, bank: FilterBank) -> Responses:
    """Filter stains at full scale, ``(n, 3, height, width)``."""
    return _filtered(stains[:, :CHANNELS], bank.coarse, FIRST_STRIDE)


def join(pieces: Sequence[Responses]) -> Responses:
    """Return the responses of all patches."""
    band, texture, strongest, strength = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return band, texture, strongest, strength


def reduce(finest: Responses, half: Tensor, bank: FilterBank) -> list[Tensor]:
    """Reduce maps to what `describe` takes, one row a patch.

    Parameters
    ----------
    finest
        From `filter_finest`.
    half
        Stains at half scale, ``(n, 3, height, width)``.
    bank
        On the maps' device.
    """
    found: list[Tensor] = []
    maps, finer = half[:, :CHANNELS], None
    for octave in range(OCTAVES):
        if octave > 1:
            maps = halve(maps)
        band, texture, *overall = _filtered(maps, bank.fine, 1) if octave else finest
        compared = [band, texture.flatten(2)]
        if octave >= FIRST_LOWPASS:
            compared.append(maps.flatten(2))
        if finer is not None:
            compared.append(finer[..., : texture.shape[2], : texture.shape[3]].flatten(2))
        moments = Moments.from_maps(torch.cat(compared, dim=1), CHANNELS)
        halved = halve(texture)
        uneven = [spread(_averaged(texture, halved, side).flatten(2)) for side in POOLS]
        found += [moments.mean, moments.products, moments.cubes, *overall, *uneven]
        # At stride 2 the finest octave's map has the size of the next one's already.
        finer = halved if octave else texture
    return found


_REDUCED = 7
"""Tensors of an octave in what `reduce` returns."""


def describe(reduced: Sequence[Tensor]) -> Tensor:
    """Return the numbers that `names` lists, ``(n, numbers)``, from what `reduce` returns."""
    parts: list[Tensor] = []
    for octave in range(OCTAVES):
        mean, products, cubes, strongest, strength, *uneven = reduced[octave * _REDUCED :][:_REDUCED]
        moments = Moments(mean, products, cubes)
        maps = (
            2 if octave < FIRST_LOWPASS else 3
        )  # band, texture, lowpass: each of haematoxylin, then of eosin
        texture, lowpass = (range(i * CHANNELS, (i + 1) * CHANNELS) for i in (1, 2))
        parts += [mean[:, texture], moments.sd[:, texture], moments.skew]
        parts += [strongest - mean[:, texture], strength.amax(2) - strength.amin(2), *uneven]
        if maps == 3:
            parts.append(moments.sd[:, lowpass])
        parts.append(moments.correlation(range(0, CHANNELS * maps, 2), range(1, CHANNELS * maps, 2)))
        if octave:
            finer = range(CHANNELS * maps, CHANNELS * (maps + 1))
            parts.append(moments.correlation(finer, texture))
    return torch.cat(parts, dim=1)


def _filtered(maps: Tensor, bank: Tensor, step: int) -> Responses:
    """Filter maps ``(n, c, height, width)``."""
    shape, maps = maps.shape[:2], maps.flatten(0, 1)
    height = maps.shape[1]
    reach = SIDE // 2
    rows = -(-height // step)
    below = reach + (step if rows % PHASES else 0)
    # Replicated edges: zeros would be a sharp border of clear glass around every patch.
    padded = pad(maps.unsqueeze(1), (reach, reach, reach, below), mode="replicate")
    found = conv2d(padded, bank, stride=(PHASES * step, step))
    found = found.reshape(len(maps), PHASES, 2, ORIENTATIONS, *found.shape[2:])
    if rows % PHASES:
        # The last row is of no position: in order, it can be cut off.
        found = found.permute(0, 2, 3, 4, 1, 5).flatten(3, 4)[..., :rows, :].unsqueeze(1)
    band = found[:, :, 0].mean(2)
    # In place: these are the largest maps.
    found = found.mul_(found)
    strength = found[:, :, 0].add_(found[:, :, 1]).sqrt_()
    # The rows of the phases, in turn.
    texture = strength.mean(2).transpose(1, 2).flatten(1, 2)
    strongest, by_orientation = strength.amax(2).flatten(1).mean(-1), strength.flatten(3).mean(-1).mean(1)
    band, texture, strongest, by_orientation = (
        part.reshape(*shape, *part.shape[1:])
        for part in (band.flatten(1), texture, strongest, by_orientation)
    )
    return band, texture, strongest, by_orientation


def _averaged(texture: Tensor, halved: Tensor, side: int) -> Tensor:
    """Return means over squares of `side`, or of half the map: at least two squares a side, or nothing could differ."""
    size = [max(1, min(side, length // 2)) for length in texture.shape[2:]]
    if size != [side, side]:
        return avg_pool2d(texture, size)
    found = halved
    for _ in range(side.bit_length() - 2):
        found = halve(found)
    return found


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
