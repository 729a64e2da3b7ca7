"""Maps of many names on many slides inside one page: packed by Python, drawn by the page's own script.

A plane is one name's values on one slide. Its values are stored as whole numbers of 0 to 254 over the plane's own range
(255: none), so a value is known to 1/508 of that range. All planes of a slide are deflated as one piece, which the page
unpacks when it first shows the slide. No value is computed here.
"""

import base64
import io
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from histosge.reporting.plots import COLOURS

LEVELS = 254
"""Steps of a plane's range; 255 is kept for a missing value."""


@dataclass(frozen=True)
class Values:
    """One name on one slide: at its spots, at its cells, and the ends of the colours.

    Parameters
    ----------
    measured, predicted
        Shapes ``(n_spots,)`` and ``(n_cells,)``; NaN where there is no value.
    limits
        Of the colours, in the values' unit.
    """

    measured: NDArray[np.float32]
    predicted: NDArray[np.float32]
    limits: tuple[float, float]


@dataclass(frozen=True)
class SlideMaps:
    """All maps of one slide.

    Parameters
    ----------
    slide_id, names
        Whose maps, and of what.
    notes
        One for each name, shown beside it.
    values
        One for each name, read once.
    spot_xy_um, spot_um
        Centres of the spots, ``(n_spots, 2)`` microns from the slide's top-left, and their diameter.
    rows, cols
        Place of each cell in the grid of cells, ``(n_cells,)`` each.
    picture
        The slide, one pixel a cell, ``(n_rows, n_cols, 3)``, uint8.
    step_um, corner_um
        Side of a cell, and ``(x, y)`` of the first one's corner, in microns.
    pooled, spot_step
        A cell is the mean of so many patches each way; of so many spots one is shown.
    """

    slide_id: str
    names: tuple[str, ...]
    notes: tuple[str, ...]
    values: Iterator[Values]
    spot_xy_um: NDArray[np.float64]
    spot_um: float
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    picture: NDArray[np.uint8]
    step_um: float
    corner_um: tuple[float, float]
    pooled: int = 1
    spot_step: int = 1

    def pack(self) -> "PackedMaps":
        """Return the maps as the page stores them; `values` are used up."""
        planes, scales = bytearray(), []
        for each in self.values:
            scale: list[float] = []
            for values in (each.measured, each.predicted):
                low, high, levels = _levels(values)
                planes += levels.tobytes()
                scale += [low, high]
            scales.append([*scale, *each.limits])
        document = {
            "id": self.slide_id,
            "notes": self.notes,
            "scales": _base64(np.asarray(scales, "<f4").tobytes()),
            "spots": _base64(np.asarray(self.spot_xy_um, "<f4").tobytes()),
            "spotUm": self.spot_um,
            "places": _base64(np.stack([self.rows, self.cols], axis=1).astype("<u2").tobytes()),
            "size": list(self.picture.shape[:2]),
            "stepUm": self.step_um,
            "cornerUm": list(self.corner_um),
            "pooled": self.pooled,
            "spotStep": self.spot_step,
            "picture": f"data:image/png;base64,{_base64(_png(self.picture))}",
            "planes": _base64(zlib.compress(bytes(planes), 9)),
        }
        return PackedMaps(self.slide_id, self.names, document)


@dataclass(frozen=True)
class PackedMaps:
    """All maps of one slide as the page stores them; small enough to be kept for every slide."""

    slide_id: str
    names: tuple[str, ...]
    document: dict[str, Any]


@dataclass(frozen=True)
class ValueMaps:
    """Maps that a page shows for the name that its reader chooses in a `Lookup`.

    Parameters
    ----------
    slides
        In the order in which they are shown.
    unit
        Of the values.
    measured, predicted
        Titles of the two maps of a slide.
    missing
        Said of a name without maps; ``NAME`` in it stands for the name.
    """

    slides: tuple[PackedMaps, ...]
    unit: str
    measured: str
    predicted: str
    missing: str

    @property
    def json(self) -> str:
        """Return everything for the page's script; no text in it can end the script."""
        # Names once: of thousands of genes on a hundred slides they would be most of the page.
        names = list(dict.fromkeys(name for slide in self.slides for name in slide.names))
        number = {name: i for i, name in enumerate(names)}
        colours = mpl.colormaps[COLOURS](np.arange(256), bytes=True)[:, :3]
        values = {
            "unit": self.unit,
            "measured": self.measured,
            "predicted": self.predicted,
            "missing": self.missing,
            "names": names,
            "colours": _base64(np.ascontiguousarray(colours).tobytes()),
            "slides": [
                slide.document | {"names": [number[name] for name in slide.names]} for slide in self.slides
            ],
        }
        return script_json(values)


def script_json(values: Any) -> str:
    """Return a value as JSON that can stand in a script element: no text in it ends the element."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _levels(values: NDArray[np.float32]) -> tuple[float, float, NDArray[np.uint8]]:
    """Return the range of values, and the values as whole numbers over it."""
    known = np.isfinite(values)
    if not known.any():
        return 0.0, 0.0, np.full(len(values), 255, np.uint8)
    low, high = float(values[known].min()), float(values[known].max())
    span = (high - low) or 1.0
    scaled = np.where(known, (values - np.float32(low)) / np.float32(span) * LEVELS, 255)
    return low, high, np.rint(scaled).clip(0, 255).astype(np.uint8)


def _png(picture: NDArray[np.uint8]) -> bytes:
    target = io.BytesIO()
    Image.fromarray(picture).save(target, format="png", optimize=True)
    return target.getvalue()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode("ascii")
