"""SpatialData: the slide's picture, the patches as squares, and the table that annotates them. Needs the extra.

Per slide one coordinate system, named after it, in microns from the slide's top-left: squares are stored in
it, the picture has a scale. The table's `X` and the picture are streamed.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from featurestore.slides.protocol import Slide
from featurestore.whole_file import whole_folder
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.formats.anndata_files import annotated
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.slide_picture import SlidePicture, lazy_picture
from histosge.extras import load_extra

SMALLEST_PX = 1024
"""Levels of the picture are added until its longer side is at most this: one chunk."""


def write_spatialdata(
    tables: Sequence[PatchTable], slides: Sequence[Slide | None], path: Path, mpp: float = 2.0
) -> list[str]:
    """Write one SpatialData with the elements of all slides; return their names.

    Parameters
    ----------
    slides
        Of each table, for its picture; None gives the patches' mean colours.
    mpp
        Of the picture, where the slide is finer.
    """
    load_extra("spatialdata", "writing SpatialData")
    import dask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies deprecate each other
        import spatialdata

        images, shapes, annotations = {}, {}, {}
        for table, slide in zip(tables, slides, strict=True):
            region = f"{table.slide_id}_patches"
            images[f"{table.slide_id}_image"] = _image(lazy_picture(slide, table, mpp), table.slide_id)
            shapes[region] = _squares(table)
            annotations[f"{table.slide_id}_{table.kind}"] = _annotation(table, region)
        data = spatialdata.SpatialData(images=images, shapes=shapes, tables=annotations)
        # One chunk at a time: dask's threads would hold as many as there are processors.
        with whole_folder(path) as partial, dask.config.set(scheduler="synchronous"):
            data.write(partial)
    return [*images, *shapes, *annotations]


def _image(picture: SlidePicture, system: str) -> Any:
    import dask.array
    from spatialdata.models import Image2DModel
    from spatialdata.transformations import Scale

    pixels = dask.array.asarray(picture.pixels).transpose(2, 0, 1)
    levels = 0
    while max(pixels.shape[1:]) / 2**levels > SMALLEST_PX:
        levels += 1
    # A scale alone places the picture: its top-left corner is the slide's, where microns are counted from.
    return Image2DModel.parse(
        pixels,
        dims=("c", "y", "x"),
        c_coords=["r", "g", "b"],
        scale_factors=[2] * levels or None,
        chunks=(3, 1024, 1024),
        transformations={system: Scale([picture.mpp, picture.mpp], axes=("x", "y"))},
    )


def _squares(table: PatchTable) -> Any:
    """Return the patches' stride cells: what each patch stands for, side by side, in microns."""
    import geopandas
    import shapely
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    # Stride cells, not whole patches, which overlap where the stride is smaller.
    (x, y), half = table.xy_um.T, table.grid.stride_um / 2
    frame = geopandas.GeoDataFrame(
        geometry=shapely.box(x - half, y - half, x + half, y + half), index=table.ids
    )
    return ShapesModel.parse(frame, transformations={table.slide_id: Identity()})


def _annotation(table: PatchTable, region: str) -> Any:
    import pandas as pd
    from spatialdata.models import TableModel

    data = annotated(table)
    data.obs["region"] = pd.Categorical([region] * len(table))
    data.obs["patch"] = table.ids
    data.obsm["spatial"] = table.xy_um
    return TableModel.parse(data, region=region, region_key="region", instance_key="patch")


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    tables, slides = [item.table for item in items], [item.slide for item in items]
    return ", ".join(write_spatialdata(tables, slides, path, settings.picture_mpp))


RECORD = ExportFormat(
    "spatialdata",
    "picture, patches as squares and a table of every slide, in one SpatialData (needs the extra)",
    ".zarr",
    _write,
    one_for_all=True,
    wants_slide=True,
)
