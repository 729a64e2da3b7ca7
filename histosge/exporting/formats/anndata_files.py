"""AnnData, as ``.h5ad`` or ``.zarr``: one row per patch, ready for scanpy and squidpy.

`X` is streamed band by band. ``obsm["spatial"]`` is (x, y) in level-0 pixels; ``uns["spatial"]`` is laid out
as ``scanpy.read_visium`` does; an AnnData of expression holds log1p(CP10k).
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.exchange.hdf5_file import whole_hdf5
from featurestore.slides.protocol import Slide
from histosge.exporting.export_format import ExportFormat, ExportItem, ExportSettings
from histosge.exporting.open_tables import table_of_map
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.slide_picture import small_picture
from histosge.exporting.whole_zarr_folder import whole_zarr_folder
from histosge.prediction.stored_map import StoredMap


def write_anndata(table: PatchTable, path: Path, slide: Slide | None = None) -> int:
    """Write one slide's table; return the number of rows.

    Parameters
    ----------
    path
        Ends in ``.zarr`` for a folder, anything else is an HDF5 file. It appears when it is complete.
    slide
        For the picture in ``uns["spatial"]``; the patches' mean colours without one.
    """
    import dask

    data = annotated(table)
    grid = table.grid
    data.obsm["spatial"] = table.xy_um / grid.slide_mpp
    picture = small_picture(slide, table)
    data.uns["spatial"] = {
        table.slide_id: {
            "images": {"hires": np.asarray(picture.pixels)},
            "scalefactors": {
                # scanpy draws a circle of this diameter: the stride, so that neighbouring patches touch.
                "spot_diameter_fullres": grid.stride_um / grid.slide_mpp,
                "tissue_hires_scalef": grid.slide_mpp / picture.mpp,
            },
            "metadata": {"mpp": grid.slide_mpp, "spot_diameter_um": grid.stride_um},
        }
    }
    # One band at a time: threads would hold as many as there are processors.
    with dask.config.set(scheduler="synchronous"), warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
        if path.suffix == ".zarr":
            with whole_zarr_folder(path) as partial:
                data.write_zarr(partial)
        else:
            _write_hdf5(data, path)
    return len(table)


def _write_hdf5(data: Any, path: Path) -> None:
    from anndata.io import write_elem

    data.strings_to_categoricals()  # as AnnData.write_h5ad does, which takes no open file
    with whole_hdf5(path) as opened:

        def checked(band: Any) -> Any:
            opened.check()
            return band

        # `meta` states the result's type: without it dask calls `checked` on an empty array to find out.
        data.X = data.X.map_blocks(checked, meta=data.X._meta)
        write_elem(opened.file, "/", data)


def annotated(table: PatchTable) -> Any:
    """Return a table as AnnData with a lazy `X`: rows, columns, and what is known of each."""
    import anndata
    import pandas as pd

    xy_um = table.xy_um
    obs = pd.DataFrame(
        {"row": table.rows, "col": table.cols, "x_um": xy_um[:, 0], "y_um": xy_um[:, 1]},
        index=pd.Index(table.ids),
    )
    if table.tissue is not None:
        # Patches at the rim are half background: whoever clusters or averages may leave them out.
        obs["tissue"] = (table.tissue[table.kept] / 255).astype(np.float32)
        obs["rim"] = table.at_rim
    for name, values in table.per_patch.items():
        obs[name] = values[table.kept]
    var = pd.DataFrame(dict(table.per_column), index=pd.Index(list(table.names)))
    # X stays lazy: it is written band by band.
    data = anndata.AnnData(X=table.to_dask(), obs=obs, var=var)
    data.uns["histosge"] = {
        "made_by": dict(table.made_by),
        "values": "log1p of counts per 10,000" if table.kind == "expression" else "embedding",
    }
    if table.kind == "expression":
        # scanpy's mark for logarithms: without it some of its functions take them again, or warn.
        data.uns["log1p"] = {"base": np.e}
    return data


def write_h5ad(stored_map: StoredMap, path: str | Path) -> int:
    """Write a map as AnnData, one row per tissue patch; return the number of rows.

    `X` is log1p(CP10k), float32; ``obsm["spatial"]`` is (x, y) in level-0 pixels, as scanpy expects;
    ``obs`` has `row`, `col`, the centre in microns and, where the model predicts it, the log of total counts;
    ``var`` has each gene's `half_width`, `trust` and whether it is `trusted`. A patch without a prediction is left out.
    """
    return write_anndata(table_of_map(stored_map), Path(path))


def _write(items: Sequence[ExportItem], path: Path, settings: ExportSettings) -> str:
    (item,) = items
    write_anndata(item.table, path, item.slide)
    return item.table.size_in_words


RECORD = ExportFormat(
    "h5ad",
    "AnnData with a row per patch (scanpy, squidpy), in Zarr where OUT ends in .zarr",
    ".h5ad",
    _write,
    also=(".zarr",),
    wants_slide=True,
)
