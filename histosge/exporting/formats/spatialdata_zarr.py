"""SpatialData: the slide's picture, patches as squares and measured spots, each with its table. Needs the extra.

Per slide one coordinate system, named after it, in microns from the slide's top-left: squares are stored in
it, the picture has a scale. The table's `X` and the picture are streamed.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.expression.loaded_expression import unique_names
from histosge.data.genes import log_cp10k
from histosge.data.sections import Spots
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.formats.anndata_files import annotated
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.slide_picture import SlidePicture, lazy_picture
from histosge.exporting.whole_zarr_folder import whole_zarr_folder
from histosge.extras import load_extra

SMALLEST_PX = 1024
"""Levels of the picture are added until its longer side is at most this: one chunk."""


def write_spatialdata(items: Sequence[ExportItem], path: Path, mpp: float = 2.0) -> list[str]:
    """Write one SpatialData with the elements of all slides; return their names.

    Parameters
    ----------
    items
        The tables; the slide of each, for its picture, where None gives the patches' mean colours; and its measured spots.
    mpp
        Of the picture, where the slide is finer.
    """
    load_extra("spatialdata", "writing SpatialData")
    import dask

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its dependencies deprecate each other
        import spatialdata

        images, shapes, annotations = {}, {}, {}
        for item in items:
            table, slide = item.table, item.slide
            region = f"{table.slide_id}_patches"
            images[f"{table.slide_id}_image"] = _image(lazy_picture(slide, table, mpp), table.slide_id)
            shapes[region] = _squares(table)
            annotations[f"{table.slide_id}_{table.kind}"] = _annotation(table, region)
            if item.spots is not None and len(item.spots):
                region = f"{table.slide_id}_spots"
                shapes[region] = _spot_shapes(item.spots)
                annotations[f"{table.slide_id}_measured"] = _measured(item.spots, region)
        data = spatialdata.SpatialData(images=images, shapes=shapes, tables=annotations)
        # One chunk at a time: dask's threads would hold as many as there are processors.
        with whole_zarr_folder(path) as partial, dask.config.set(scheduler="synchronous"):
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
        geometry=shapely.box(x - half, y - half, x + half, y + half), index=_instance_ids(table)
    )
    return ShapesModel.parse(frame, transformations={table.slide_id: Identity()})


def _instance_ids(table: PatchTable) -> NDArray[np.int64]:
    """Return a whole number for each patch, its place in the grid counted row by row: napari-spatialdata takes no text."""
    return np.asarray(table.rows * table.grid.n_cols + table.cols, dtype=np.int64)


def _annotation(table: PatchTable, region: str) -> Any:
    import pandas as pd
    from spatialdata.models import TableModel

    data = annotated(table)
    data.obs["region"] = pd.Categorical([region] * len(table))
    data.obs["instance_id"] = _instance_ids(table)
    data.obsm["spatial"] = table.xy_um
    return TableModel.parse(data, region=region, region_key="region", instance_key="instance_id")


def _spot_shapes(spots: Spots) -> Any:
    """Return spots as circles, or bins as squares, in microns."""
    import geopandas
    import shapely
    from spatialdata.models import ShapesModel
    from spatialdata.transformations import Identity

    (x, y), half = spots.xy_um.T, spots.diameter_um / 2
    if spots.shape == "square":
        frame = geopandas.GeoDataFrame(geometry=shapely.box(x - half, y - half, x + half, y + half))
    else:
        frame = geopandas.GeoDataFrame({"radius": np.full(len(spots), half)}, geometry=shapely.points(x, y))
    return ShapesModel.parse(frame, transformations={spots.slide_id: Identity()})


def _measured(spots: Spots, region: str) -> Any:
    """Return spots as the maps have their patches, log1p(CP10k), with the raw counts as a layer."""
    import anndata
    import pandas as pd
    from spatialdata.models import TableModel

    obs = pd.DataFrame(
        {
            "region": pd.Categorical([region] * len(spots)),
            "instance_id": np.arange(len(spots), dtype=np.int64),
            "total_counts": np.asarray(spots.counts.sum(axis=1)).ravel(),
        },
        index=pd.Index(unique_names([str(name) for name in spots.barcodes])),
    )
    data = anndata.AnnData(
        X=sparse.csr_matrix(log_cp10k(spots)),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(unique_names(spots.genes))),
    )
    data.layers["counts"] = sparse.csr_matrix(spots.counts)
    data.obsm["spatial"] = spots.xy_um
    data.uns["log1p"] = {"base": np.e}
    data.uns["histosge"] = {"values": "log1p of counts per 10,000, measured"}
    return TableModel.parse(data, region=region, region_key="region", instance_key="instance_id")


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    return ", ".join(write_spatialdata(items, path, settings.picture_mpp))


RECORD = ExportFormat(
    "spatialdata",
    "picture, patches as squares, measured spots and tables of every slide, in one SpatialData (needs the extra)",
    ".zarr",
    _write,
    one_for_all=True,
    wants_slide=True,
    wants_spots=True,
)
