"""The picture under the patches: the slide itself where it can be opened, else the mean colours of the patches.

A picture's top-left corner is the slide's.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import FeatureStoreError
from featurestore.grid import PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.storage.store import Store
from histosge.exporting.patch_table import PatchTable

# Read at once from the slide: with three bytes a pixel 3 MB, and few of the file's own tiles are decoded twice.
TILE_PX = 1024
HIRES_PX = 2000
"""Longer side of the picture that scanpy plots on, as Space Ranger makes it."""


@dataclass(frozen=True)
class SlidePicture:
    """Pixels with a scale.

    Parameters
    ----------
    pixels
        RGB ``(height, width, 3)``, uint8: numpy, or dask where it is read tile by tile.
    mpp
        Microns per pixel.
    is_slide
        Whether it is the slide's, and not patches' mean colours.
    """

    pixels: Any
    mpp: float
    is_slide: bool


def find_slide(table: PatchTable, store: str | None, url: str) -> tuple[Slide | None, str]:
    """Open a table's slide from the source in a feature store; None and a remark if it cannot be reached.

    Parameters
    ----------
    store
        Feature store with the slide; None if the user named none.
    url
        Where the table is from: a feature store names its own sources.
    """
    place = store or (url if table.kind == "embedding" else None)
    fallback = f"{table.slide_id}: the patches' mean colours are used as the picture"
    if place is None:
        return None, f"{fallback}; for the slide itself name the feature store with --store"
    # An export without the slide is still of use, so what a file or a server does is a remark here.
    try:
        record = Store.open(place).slide(table.slide_id)
        return open_slide(record.source, record.mpp), ""
    except FeatureStoreError as error:
        return None, f"{fallback}, as the slide cannot be reached: {error}"


def lazy_picture(slide: Slide | None, table: PatchTable, mpp: float) -> SlidePicture:
    """Return the slide at about an mpp (never finer than it is) as a dask array of tiles, or the mean colours."""
    if slide is None:
        return mean_colours(table)
    import dask
    import dask.array

    mpp = max(mpp, slide.mpp)  # finer than the slide is, pixels would be made up
    width, height = (max(1, int(side * slide.mpp / mpp)) for side in slide.size_px)

    def tile(x: int, y: int) -> Any:
        w, h = min(TILE_PX, width - x), min(TILE_PX, height - y)
        read = dask.delayed(slide.read_region)(x, y, w, h, mpp)
        return dask.array.from_delayed(read, shape=(h, w, 3), dtype=np.uint8)

    rows = [[tile(x, y) for x in range(0, width, TILE_PX)] for y in range(0, height, TILE_PX)]
    whole = dask.array.concatenate([dask.array.concatenate(row, axis=1) for row in rows], axis=0)
    return SlidePicture(whole, mpp, True)


def small_picture(slide: Slide | None, table: PatchTable) -> SlidePicture:
    """Return the slide no larger than `HIRES_PX`, in memory, or the mean colours."""
    if slide is None:
        return mean_colours(table)
    mpp = max(slide.mpp, max(slide.size_px) * slide.mpp / HIRES_PX)
    width, height = (max(1, int(side * slide.mpp / mpp)) for side in slide.size_px)
    return SlidePicture(slide.read_region(0, 0, width, height, mpp), mpp, True)


def mean_colours(table: PatchTable) -> SlidePicture:
    """Return the patches' mean colours, as `on_slide` lays them."""
    return SlidePicture(on_slide(table.rgb, table.grid, 255), table.grid.stride_um / 2, False)


def on_slide(plane: NDArray[Any], grid: PatchGrid, fill: float) -> NDArray[Any]:
    """Lay one value per patch on the slide: 2 x 2 pixels of half the grid's step each.

    Half steps, because the first patch's stride cell starts ``(patch - stride) / 2`` from the slide's corner.

    Parameters
    ----------
    plane
        ``(n_rows, n_cols)`` or with channels behind.
    fill
        For the pixels before the first patch.
    """
    left, top = (
        round((grid.patch_um - grid.stride_um + 2 * origin) / grid.stride_um) for origin in grid.origin_um
    )
    grown = plane.repeat(2, axis=0).repeat(2, axis=1)
    # Patches smaller than their step: the first one's cell starts left of the slide.
    inside = grown[max(-top, 0) :, max(-left, 0) :]
    pad = ((max(top, 0), 0), (max(left, 0), 0)) + ((0, 0),) * (plane.ndim - 2)
    return np.pad(inside, pad, constant_values=fill)
