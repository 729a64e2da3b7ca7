"""From tissue, nuclei and glands to H&E pixels, a strip of rows at a time.

Stains add up in optical density (Beer-Lambert) and become colour through one table. A strip does not
depend on how the slide was cut, so a slide of any size is painted in the memory of one strip.

Terms
    strip   whole rows of the slide, ``(rows, width)`` pixels
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosge.synthetic.anatomy import FINE_UM, Anatomy
from histosge.synthetic.cells import Glands, Nuclei
from histosge.synthetic.fields import Field, interpolate, random_field
from histosge.synthetic.spec import LATTICE_UM, Donor, SyntheticSpec
from histosge.synthetic.textures import (
    FULL_DENSITY,
    JITTER_PX,
    ORIENTATIONS,
    TEXTURE_PX,
    TEXTURE_UM,
    VARIANTS,
    make_jitter,
    make_stamps,
    make_textures,
    to_byte,
)

HAEMATOXYLIN = (0.64, 0.71, 0.29)
EOSIN = (0.13, 0.89, 0.41)
"""Optical density of one unit of stain in R, G, B."""
WHITE = (246, 243, 246)
Bytes = NDArray[np.uint8]
BENDING = np.array([0.3, 0.3, 1.0, 0.3, 1.0, 0.25, 0.4], np.float32)
"""Share of the warp that each tissue's texture follows: fibres bend, vacuoles do not."""


@dataclass(frozen=True)
class Staining:
    """How strongly a slide took the stains, over the lattice, and the colours they make.

    Parameters
    ----------
    strength
        Of haematoxylin and eosin, around 1: ``(2, n_y, n_x)``.
    haze
        Eosin left on the glass, density: ``(n_y, n_x)``.
    colours
        RGB of every (haematoxylin, eosin) pair of bytes, ``(65536, 3)``.
    """

    strength: Field
    haze: Field
    colours: Bytes


def draw_staining(spec: SyntheticSpec, anatomy: Anatomy) -> Staining:
    """Draw the staining of one slide: slow changes, a halo beside the tissue, its own pair of hues."""
    rng = spec.rng(3)
    shape = anatomy.label.shape
    side = min(shape)
    strength = np.stack(
        [level * (1 + 0.07 * random_field(shape, side / 6, rng)) for level in rng.uniform(0.92, 1.08, 2)]
    )
    if spec.donor is not None:
        strength *= np.array(spec.donor.stain)[:, None, None]
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    angle = rng.uniform(0, 2 * np.pi)
    at_y, at_x = (0.5 + 0.42 * np.sin(angle)) * shape[0], (0.5 + 0.42 * np.cos(angle)) * shape[1]
    halo = np.exp(-(((y - at_y) / (0.20 * side)) ** 2) - ((x - at_x) / (0.14 * side)) ** 2)
    slow = np.maximum(0, 0.02 + 0.012 * random_field(shape, side / 5, rng))
    haze = slow + 0.09 * halo * (1 + 0.3 * random_field(shape, side / 16, rng))
    return Staining(
        strength.astype(np.float32), np.maximum(haze, 0).astype(np.float32), _colours(rng, spec.donor)
    )


def _colours(rng: np.random.Generator, donor: Donor | None) -> Bytes:
    dyes = np.array([HAEMATOXYLIN, EOSIN]) * rng.uniform(0.95, 1.05, (2, 3))
    lamp, gamma = np.ones(3), 1.0
    if donor is not None:
        dyes, lamp, gamma = dyes * np.array(donor.hue), np.array(donor.lamp), donor.gamma
    # Beer-Lambert: densities of the stains add up, and light falls by a power of ten with them.
    pairs = np.stack(np.meshgrid(np.arange(256), np.arange(256), indexing="ij"), axis=-1).reshape(-1, 2)
    density = pairs * (FULL_DENSITY / 255) @ dyes
    light = np.array(WHITE) * lamp * 10.0**-density
    # Without a donor nothing is raised to a power: 1.0 would change the last bit of some.
    light = light if donor is None else 255 * (light / 255) ** gamma
    return np.asarray(np.floor(light + 0.5).astype(np.uint8))


class Painter:
    """Paints strips of one section.

    Parameters
    ----------
    spec, anatomy, nuclei, glands
        What to paint.
    """

    def __init__(self, spec: SyntheticSpec, anatomy: Anatomy, nuclei: Nuclei, glands: Glands) -> None:
        rng = spec.rng(4)
        self._spec, self._anatomy, self._nuclei, self._glands = spec, anatomy, nuclei, glands
        self._staining = draw_staining(spec, anatomy)
        self._textures = make_textures().ravel()
        self._stamps = make_stamps(spec.mpp)
        self._variant = rng.integers(0, VARIANTS, len(nuclei))
        self._margin = max(stamp.shape[-1] for stamp in self._stamps.values()) // 2 + 1

    def strips(self, rows: int) -> Iterator[Bytes]:
        """Yield the slide from top to bottom as RGB strips, ``(<= rows, width, 3)``."""
        for top in range(0, self._spec.size_px[1], rows):
            yield self.strip(top, min(top + rows, self._spec.size_px[1]))

    def strip(self, top: int, stop: int) -> Bytes:
        """Return pixel rows ``top`` to ``stop`` as RGB, ``(stop - top, width, 3)``."""
        # A margin as wide as the largest stamp: nuclei of neighbouring strips reach into this one.
        margin = self._margin
        haematoxylin, eosin = self._tissue(top - margin, stop + margin)
        for i in range(len(self._glands)):
            _paint_gland(self._glands, i, (haematoxylin, eosin), (top - margin, -margin), self._spec.mpp)
        self._paint_nuclei(haematoxylin, top, stop)
        around = (slice(margin - 1, 1 - margin), slice(margin - 1, 1 - margin))
        return self._colour(_blurred(haematoxylin[around]), _blurred(eosin[around]), top)

    def _tissue(self, top: int, stop: int) -> tuple[Bytes, Bytes]:
        """Return the textures of a strip with its margins as bytes of both stains."""
        mpp, turn = self._spec.mpp, self._anatomy.texture_angle
        rows = np.arange(top, stop)
        cols = np.arange(-self._margin, self._spec.size_px[0] + self._margin)
        kind = self._kinds(rows, cols)
        bending = np.take(BENDING / TEXTURE_UM, kind)
        y_um, x_um = (rows + 0.5) * mpp, (cols + 0.5) * mpp
        y, x = (y_um / TEXTURE_UM)[:, None].astype(np.float32), (x_um / TEXTURE_UM).astype(np.float32)
        ways = ((np.cos(turn), -np.sin(turn)), (np.sin(turn), np.cos(turn)))
        index = kind.astype(np.int32)
        for warp, (by_y, by_x) in zip(self._anatomy.warp_um, ways, strict=True):
            place = interpolate(warp, y_um / LATTICE_UM, x_um / LATTICE_UM)
            place *= bending
            place += y * np.float32(by_y)
            place += x * np.float32(by_x)
            # TEXTURE_PX is a power of two: the mask wraps places around, those left of the slide's edge as well.
            index *= TEXTURE_PX
            index += place.astype(np.int32) & (TEXTURE_PX - 1)
        # Both stains in one number, so that each pixel is looked up once.
        packed = np.take(self._textures, index)
        return (packed >> 8).astype(np.uint8), packed.astype(np.uint8)

    def _kinds(self, rows: NDArray[np.int64], cols: NDArray[np.int64]) -> Bytes:
        """Return the tissue of every pixel, borders made ragged."""
        fine = self._anatomy.fine
        places = []
        for jitter, at, n in zip(make_jitter(), (rows[:, None], cols), fine.shape, strict=True):
            around = np.arange(at.min() - JITTER_PX, at.max() + JITTER_PX + 1) + 0.5
            line = np.clip(np.floor(around * (self._spec.mpp / FINE_UM)), 0, n - 1).astype(np.int32)
            aside = np.take(jitter[rows % TEXTURE_PX], cols % TEXTURE_PX, axis=1)
            aside += (at - at.min() + JITTER_PX).astype(np.int32)
            places.append(np.take(line, aside))
        places[0] *= fine.shape[1]
        places[0] += places[1]
        return np.take(fine, places[0])

    def _paint_nuclei(self, haematoxylin: Bytes, top: int, stop: int) -> None:
        mpp, margin, nuclei = self._spec.mpp, self._margin, self._nuclei
        first, last = np.searchsorted(nuclei.y_um, [(top - margin) * mpp, (stop + margin) * mpp])
        part = slice(first, last)
        rows = (nuclei.y_um[part] / mpp).astype(int) - top + margin
        cols = (nuclei.x_um[part] / mpp).astype(int) + margin
        turns = np.round(nuclei.angle[part] / np.pi * ORIENTATIONS).astype(int) % ORIENTATIONS
        height, width = haematoxylin.shape
        each = zip(
            rows.tolist(),
            cols.tolist(),
            nuclei.stamp[part].tolist(),
            turns.tolist(),
            self._variant[part].tolist(),
            strict=True,
        )
        for row, col, kind, turn, variant in each:
            stamp = self._stamps[kind][turn, variant]
            reach = stamp.shape[0] // 2
            y0, x0 = row - reach, col - reach
            y1, x1 = row + reach + 1, col + reach + 1
            if y0 < 0 or x0 < 0 or y1 > height or x1 > width:
                # Cut by the strip's own margin: the missing part lies outside the strip, too.
                cut_y, cut_x = max(-y0, 0), max(-x0, 0)
                stamp = stamp[cut_y : height - y0, cut_x : width - x0]
                y0, x0 = max(y0, 0), max(x0, 0)
            part_ = haematoxylin[y0:y1, x0:x1]
            # The darker of two: nuclei that overlap do not add up to black.
            np.maximum(part_, stamp, out=part_)

    def _colour(self, haematoxylin: Bytes, eosin: Bytes, top: int) -> Bytes:
        mpp, staining = self._spec.mpp, self._staining
        rows = (np.arange(top, top + len(eosin)) + 0.5) * mpp / LATTICE_UM
        cols = (np.arange(eosin.shape[1]) + 0.5) * mpp / LATTICE_UM
        blue = interpolate(staining.strength[0], rows, cols)
        blue *= haematoxylin
        np.minimum(blue, 255, out=blue)
        pink = interpolate(staining.strength[1], rows, cols)
        pink *= eosin
        pink += interpolate(staining.haze * (255 / FULL_DENSITY), rows, cols)
        np.minimum(pink, 255, out=pink)
        index = blue.astype(np.uint16)
        index <<= 8
        index |= pink.astype(np.uint16)
        return np.take(staining.colours, index, axis=0)


def _blurred(stain_: Bytes) -> Bytes:
    """Blur like an objective, with (1, 2, 1) / 4 down and across; one pixel is lost at each edge."""
    down = stain_[:-2].astype(np.uint16)
    down += stain_[2:]
    down += stain_[1:-1]
    down += stain_[1:-1]
    out = down[:, :-2] + down[:, 2:]
    out += down[:, 1:-1]
    out += down[:, 1:-1]
    out += 8  # half of 16: rounds rather than truncates
    out >>= 4
    return out.astype(np.uint8)


def _paint_gland(
    glands: Glands, i: int, stains: tuple[Bytes, Bytes], origin: tuple[int, int], mpp: float
) -> None:
    """Paint one gland into a strip whose first pixel is `origin` ``(row, col)`` of the slide."""
    haematoxylin, eosin = stains
    reach = glands.radius_um[i] * 1.4
    y0, y1 = (int((glands.y_um[i] + s * reach) / mpp) - origin[0] for s in (-1, 1))
    x0, x1 = (int((glands.x_um[i] + s * reach) / mpp) - origin[1] for s in (-1, 1))
    y0, x0 = max(y0, 0), max(x0, 0)
    y1, x1 = min(y1, eosin.shape[0]), min(x1, eosin.shape[1])
    if y0 >= y1 or x0 >= x1:
        return
    y = (np.arange(y0, y1)[:, None] + origin[0]) * mpp - glands.y_um[i]
    x = (np.arange(x0, x1)[None] + origin[1]) * mpp - glands.x_um[i]
    direction = np.arctan2(y, x)
    far = np.hypot(x, y) / glands.outer_um(i, direction)
    inside = far < 1
    lumen = np.clip((0.52 + 0.03 * np.cos(9 * direction + i) - far) * 30, 0, 1)
    part_h, part_e = haematoxylin[y0:y1, x0:x1], eosin[y0:y1, x0:x1]
    grain = part_e.astype(np.float32) * (FULL_DENSITY / 255) - 0.23
    apical = np.clip((0.72 - far) * 8, 0, 1)
    secretion = (0.03, 0.045, 0.13)[i % 3]
    body_e = (0.29 + 0.30 * grain - 0.06 * apical) * (1 - lumen) + (secretion + 0.05 * grain) * lumen
    body_h = (0.17 + 0.10 * grain - 0.05 * apical) * (1 - lumen) + 0.015
    part_e[inside] = to_byte(body_e.astype(np.float32))[inside]
    part_h[inside] = to_byte(body_h.astype(np.float32))[inside]
