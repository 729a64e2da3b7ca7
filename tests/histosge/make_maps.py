"""Expression maps with known values, without a model: for what reads maps."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.grid import GridSpec, PatchGrid
from featurestore.storage.store import StoredGrid
from histosge.calibration.conformal import Intervals
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.stored_map import StoredMap

GENES = ("EPCAM", "CD3E", "COL1A1")
SPEC = GridSpec(mpp=0.5, patch_px=32, stride_px=16)
BLOCK = (7, 11)
SLIDE_MPP = 0.25
Values = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.floating]]


def ramps(x_um: NDArray[np.float64], y_um: NDArray[np.float64]) -> NDArray[np.floating]:
    """Return a gene that grows to the right, one that grows downwards and a constant one, ``(..., 3)``."""
    return np.stack([x_um / 97, y_um / 89, np.full(x_um.shape, 1.5)], axis=-1)


def make_map(
    folder: Path,
    slide_id: str = "A",
    values: Values = ramps,
    genes: tuple[str, ...] = GENES,
    *,
    size_px: tuple[int, int] = (1120, 880),
    trust: tuple[float, ...] | None = None,
    depth: float | None = None,
    spec: GridSpec = SPEC,
    model: str = "known",
    trained_on: bool | None = None,
) -> StoredMap:
    """Write a whole map of an ellipse of tissue into the expression store at a folder."""
    grid = PatchGrid.for_slide(size_px, SLIDE_MPP, (SLIDE_MPP,), spec)
    x, y = np.meshgrid(grid.x_um, grid.y_um)
    middle = (x.max() + x.min()) / 2, (y.max() + y.min()) / 2
    inside = ((x - middle[0]) / np.ptp(x)) ** 2 + ((y - middle[1]) / np.ptp(y)) ** 2 < 0.2
    tissue = np.where(inside, 255, 0).astype(np.uint8)
    rgb = np.full((*grid.shape, 3), 200, np.uint8)
    intervals = None
    if trust is not None:
        intervals = Intervals(
            np.linspace(0.25, 0.5, len(trust)).astype(np.float32),
            np.array(trust, np.float32),
            0.9,
            31,
            "section",
        )
    stored = ExpressionStore.open_or_create(str(folder)).add_map(
        StoredGrid(slide_id, grid, tissue, rgb),
        genes,
        BLOCK,
        {"model": model, "preset": "dense", "encoder": "e", "slide": slide_id, "genes": len(genes)},
        intervals=intervals,
        depth=depth is not None,
        trained_on=trained_on,
    )
    true = np.where(inside[..., None], values(x, y), np.nan)
    for block in stored.planned():
        if stored.depth is not None:
            stored.depth.write(
                block, np.where(inside, depth, np.nan)[block.slices][..., None].astype(np.float16)
            )
        stored.array.write(block, true[block.slices].astype(np.float16))
    return stored
