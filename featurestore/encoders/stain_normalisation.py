"""Stain normalisation: pixels of every slide as if they had been stained and scanned alike, before an encoder sees them.

``macenko`` finds the slide's own directions of haematoxylin and eosin in optical density (Macenko et al. 2009, ISBI), and
gives their amounts the target's directions and strengths. ``reinhard`` shifts and scales each channel of CIE L*a*b* to the
target's mean and standard deviation (Reinhard et al. 2001, with L*a*b* in place of l-alpha-beta, as public tools have it).
Parameters, order of steps and rounding are those of torchstain 1.4 (numpy), so that vectors mean the same in both; its
direction of an eigenvector is arbitrary, and here it is fixed.

A fit is a few numbers. It is made once for a slide and recorded: every worker and every later run applies the same.

Terms
    density   -ln((grey + 1) / IO): natural, unlike `stain_separation`, which has base 10
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from featurestore.documents import convert
from featurestore.encoders.protocol import Encoder, EncoderIdentity
from featurestore.errors import EncoderError, SlideError

METHODS = ("macenko", "reinhard")
VERSION = 1
IO, BETA, ALPHA = 240, 0.15, 1.0
"""Grey value of glass; density from which a channel counts; percent of extreme angles taken as noise: Macenko's values."""
STRONGEST = 99
"""Percentile of each stain's amounts that stands for its strength."""
TARGET_DYES = ((0.5626, 0.2159), (0.7201, 0.8012), (0.4062, 0.5581))
TARGET_STRENGTHS = (1.9705, 1.0308)
"""Reference of Macenko's own code, and of public tools since: density of (haematoxylin, eosin) in R, G, B; strengths."""
TARGET_MEAN = (47.40, 28.94, -12.55)
TARGET_SD = (19.19, 12.44, 9.88)
"""L*a*b* of the tissue of CMU-1-Small-Region.svs, OpenSlide's public test slide (Aperio, H&E): `fit_reinhard` on it."""
MIN_PIXELS = 10_000
"""Tissue pixels that a fit needs: a patch of 224 px has 50,000. From fewer the percentiles are those of single nuclei."""
_MAX_CONDITION = 1e3
"""Of the two dyes' directions. Those of haematoxylin and eosin have about 4; of one dye alone noise decides."""
_RGB_TO_XYZ = np.array(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
)
_WHITE = np.array([0.95047, 1.0, 1.08883])
"""sRGB to CIE XYZ and its white (D65, 2 degrees), as scikit-image has them."""

Normalise = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
"""Pixels ``(..., 3)`` -> pixels of the same shape."""


@dataclass(frozen=True)
class StainFit:
    """What was measured on one slide.

    Parameters
    ----------
    method
        ``macenko`` or ``reinhard``.
    values
        Of Macenko the dyes (R, G, B of haematoxylin, then of eosin) and their two strengths; of Reinhard three means and
        three standard deviations.
    """

    method: str
    values: tuple[float, ...]

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON-ready values; floats are kept to the last bit."""
        return {"method": self.method, "values": list(self.values)}

    def normaliser(self) -> Normalise:
        """Return what turns the slide's pixels into those of the target."""
        return _macenko(self.values) if self.method == "macenko" else _reinhard(self.values)


class _FitAttrs(msgspec.Struct):
    method: str
    values: list[float]


def parse_fit(attrs: Any, label: str) -> StainFit:
    """Return a fit from a store's attributes.

    Raises
    ------
    DocumentError
        If they are no fit.
    EncoderError
        If they are of a method that this version does not know.
    """
    found = convert(attrs, _FitAttrs, label, at="attributes.stain")
    expected = {"macenko": 8, "reinhard": 6}.get(found.method)
    if expected != len(found.values) or not np.isfinite(found.values).all():
        raise EncoderError(
            f"{label} was normalised by {found.method[:40]!r} with {len(found.values)} numbers, which this version "
            "does not know"
        )
    return StainFit(found.method, tuple(found.values))


def stain_facts(method: str) -> dict[str, Any]:
    """Return what an encoder's identity records of a method, JSON-ready: its parameters and its target."""
    check_method(method)
    target: dict[str, Any]
    if method == "macenko":
        target = {"dyes_rgb": [list(row) for row in TARGET_DYES], "strengths": list(TARGET_STRENGTHS)}
        parameters: dict[str, Any] = {"io": IO, "beta": BETA, "alpha": ALPHA, "strongest": STRONGEST}
    else:
        target = {"lab_mean": list(TARGET_MEAN), "lab_sd": list(TARGET_SD)}
        parameters = {"space": "CIE L*a*b*, D65"}
    return {"method": method, "version": VERSION, **parameters, "target": target}


class StainedEncoder:
    """An encoder whose pixels are normalised before it is given them: its vectors are those of another encoder.

    What normalises depends on the slide, and one encoder serves several at once. So whoever reads the pixels does it, and
    this only carries the identity.

    Parameters
    ----------
    encoder
        As it was loaded.
    method
        Of the normalisation.
    """

    def __init__(self, encoder: Encoder, method: str) -> None:
        self._encoder = encoder
        own = encoder.identity
        self.identity = EncoderIdentity(own.key, own.dim, {**own.facts, "stain": stain_facts(method)})

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode patches whose pixels have been normalised."""
        return self._encoder.encode(patches)

    def __getattr__(self, name: str) -> Any:
        # What encoders may have besides: start, batch, reading_threads.
        return getattr(self._encoder, name)


def check_method(method: str) -> None:
    """Refuse an unknown method.

    Raises
    ------
    EncoderError
        With those that there are.
    """
    if method not in METHODS:
        raise EncoderError(f"--stain {method[:40]!r} is unknown: choose none, {' or '.join(METHODS)}")


def fit_stain(method: str, pixels: NDArray[np.uint8]) -> StainFit:
    """Measure a slide's stain.

    Parameters
    ----------
    pixels
        RGB of its tissue, ``(n, 3)``.

    Raises
    ------
    SlideError
        If there is too little tissue, or its pixels have only one colour.
    """
    check_method(method)
    if len(pixels) < MIN_PIXELS:
        raise SlideError(
            f"--stain {method} needs {MIN_PIXELS} pixels of tissue to measure the stain, and found {len(pixels)}; use "
            "--stain none, or leave the slide out"
        )
    return fit_macenko(pixels) if method == "macenko" else fit_reinhard(pixels)


def tissue_pixels(patches: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the pixels of patches that absorb light in some channel, ``(n, 3)``: glass would dilute what is measured."""
    pixels = patches.reshape(-1, 3)
    return pixels[(_density_table()[pixels] >= BETA).any(axis=1)]


def fit_macenko(pixels: NDArray[np.uint8]) -> StainFit:
    """Find a slide's dyes, and how strong they are.

    Raises
    ------
    SlideError
        If the pixels do not show two dyes.
    """
    density = _density_table()[pixels.reshape(-1, 3)]
    stained = density[~(density < BETA).any(axis=1)]
    if len(stained) < MIN_PIXELS // 10:
        raise SlideError(
            f"--stain macenko found {len(stained)} pixels with both stains, too few to tell them apart; use --stain "
            "reinhard or none, or leave the slide out"
        )
    _, vectors = np.linalg.eigh(np.cov(stained.T))
    plane = vectors[:, 1:3]
    # The sign of an eigenvector is arbitrary. Towards positive densities, or the angles would wrap at 180 degrees.
    plane = plane * np.where(plane.sum(axis=0) < 0, -1, 1)
    on_plane = stained @ plane
    angles = np.arctan2(on_plane[:, 1], on_plane[:, 0])
    # Along the second column lies the largest spread, so angles are around 90 degrees.
    first, second = (
        plane @ np.array([np.cos(angle), np.sin(angle)])
        for angle in np.percentile(angles, (ALPHA, 100 - ALPHA))
    )
    # Haematoxylin absorbs more red than eosin does.
    dyes = np.column_stack([first, second] if first[0] > second[0] else [second, first])
    amounts = np.linalg.lstsq(dyes, density.T, rcond=None)[0]
    strengths = np.percentile(amounts, STRONGEST, axis=1)
    if not np.isfinite(strengths).all() or (strengths <= 0).any() or np.linalg.cond(dyes) > _MAX_CONDITION:
        raise SlideError(
            "--stain macenko found only one stain on the tissue; use --stain reinhard or none, or leave the slide out"
        )
    return StainFit("macenko", tuple(float(v) for v in (*dyes[:, 0], *dyes[:, 1], *strengths)))


def fit_reinhard(pixels: NDArray[np.uint8]) -> StainFit:
    """Measure mean and standard deviation of L*, a* and b*.

    Raises
    ------
    SlideError
        If all pixels have one value of some channel.
    """
    lab = _to_lab(pixels.reshape(-1, 3))
    mean, sd = lab.mean(axis=0, dtype=np.float64), lab.std(axis=0, dtype=np.float64)
    if (sd < 1e-3).any():
        raise SlideError(
            "--stain reinhard found tissue of one colour only; use --stain none, or leave the slide out"
        )
    return StainFit("reinhard", tuple(float(v) for v in (*mean, *sd)))


def _density_table() -> NDArray[np.float64]:
    # Plus 1: black would have an infinite density.
    return np.asarray(-np.log((np.arange(256, dtype=np.float64) + 1) / IO))


def _macenko(values: tuple[float, ...]) -> Normalise:
    dyes = np.array([values[:3], values[3:6]]).T
    strengths = np.array(values[6:8]) / np.array(TARGET_STRENGTHS)
    # Amounts by least squares, scaled, in the target's dyes: one matrix from density to density.
    matrix = np.array(TARGET_DYES) @ np.diag(1 / strengths) @ np.linalg.pinv(dyes)
    table, turn = _density_table().astype(np.float32), matrix.T.astype(np.float32)

    def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        density = table[pixels.reshape(-1, 3)] @ turn
        light = np.float32(IO) * np.exp(-density)
        # Cut off, not rounded, as torchstain does; below 0 there is nothing.
        return np.asarray(np.minimum(light, 255).astype(np.uint8).reshape(pixels.shape))

    return normalise


def _reinhard(values: tuple[float, ...]) -> Normalise:
    mean, sd = np.array(values[:3], np.float32), np.array(values[3:6], np.float32)
    factor = np.array(TARGET_SD, np.float32) / sd
    shift = np.array(TARGET_MEAN, np.float32) - mean * factor

    def normalise(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        lab = _to_lab(pixels.reshape(-1, 3)) * factor + shift
        return (_to_rgb(lab) * 255).astype(np.uint8).reshape(pixels.shape)

    return normalise


def _linear_table() -> NDArray[np.float32]:
    """Return the light of each grey value of sRGB, ``(256,)``."""
    grey = np.arange(256) / 255
    return np.where(grey > 0.04045, ((grey + 0.055) / 1.055) ** 2.4, grey / 12.92).astype(np.float32)


def _to_lab(pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
    xyz = _linear_table()[pixels] @ (_RGB_TO_XYZ.T / _WHITE).astype(np.float32)
    curved = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116).astype(np.float32)
    x, y, z = curved[:, 0], curved[:, 1], curved[:, 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=1)


def _to_rgb(lab: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return sRGB, 0..1; colours that it does not have are cut off."""
    y = (lab[:, 0] + 16) / 116
    curved = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], axis=1)
    xyz = np.where(curved > 0.2068966, curved**3, (curved - 16 / 116) / 7.787)
    light = xyz @ (np.linalg.inv(_RGB_TO_XYZ).T * _WHITE[:, None]).astype(np.float32)
    grey = np.where(light > 0.0031308, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055, light * 12.92)
    return np.asarray(np.clip(grey, 0, 1), dtype=np.float32)
