"""AnnData: an ``.h5ad``, or the same as ``.zarr``, with raw counts and ``obsm["spatial"]`` = (x, y) in level-0 pixels."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.layouts.space_ranger import VISIUM_NOTE, theoretical_visium_mpp
from histosge.data.expression.loaded_expression import (
    VISIUM_SPOT_UM,
    LoadedExpression,
    SlideFrame,
    check_zarr_folder,
    make_spots,
    zarr_attributes,
)
from histosge.errors import ExpressionError


def recognises(path: Path) -> bool:
    """Tell whether this is an AnnData file or group."""
    if path.is_dir():
        return zarr_attributes(path).get("encoding-type") == "anndata"
    return path.suffix.lower() == ".h5ad"


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read the spots of one section; spots off tissue (``in_tissue`` 0) are left out."""
    import anndata

    if path.is_dir():
        check_zarr_folder(path)
    try:
        with warnings.catch_warnings():
            # Gene names that occur twice are numbered here; files of older versions are read all the same.
            warnings.simplefilter("ignore", category=UserWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            data = anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)
    except (OSError, KeyError, anndata.io.IORegistryError) as error:
        raise ExpressionError(f"{path} cannot be read as AnnData: {error}") from error
    if "spatial" not in data.obsm:
        held = ", ".join(sorted(data.obsm)) or "nothing"
        raise ExpressionError(
            f'{path} has no obsm["spatial"] (obsm holds {held}); put the spots\' (x, y) in level-0 pixels there'
        )
    xy = np.asarray(data.obsm["spatial"], dtype=np.float64)
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ExpressionError(f'{path}: obsm["spatial"] has shape {xy.shape}; it should be (n_spots, 2)')
    keep = None
    if "in_tissue" in data.obs:
        keep = data.obs["in_tissue"].to_numpy().astype(float) > 0
    diameter, note = spot_diameter(data.uns.get("spatial", {}), frame.mpp)
    # Of a Visium run that scanpy or squidpy wrote, the chip tells more than the file's own scale factors.
    mpp = theoretical_visium_mpp(data.obs, xy[:, :2], diameter / frame.mpp)
    if mpp:
        diameter, note = VISIUM_SPOT_UM, VISIUM_NOTE
    else:
        mpp = _stated_mpp(data.uns.get("spatial", {}))
    spots = make_spots(
        frame,
        path,
        data.obs_names.to_numpy().astype(str),
        xy[:, :2] * frame.mpp,
        data.layers.get("counts", data.X),  # X is often normalised then
        data.var_names.astype(str).tolist(),
        diameter_um=diameter,
        keep=keep,
    )
    return LoadedExpression(spots, "AnnData", mpp, (note,) if note else ())


def spot_diameter(spatial: Any, slide_mpp: float) -> tuple[float, str]:
    """Return a spot's diameter in microns from ``uns["spatial"]``, or Visium's and a note on that."""
    for library in spatial.values() if isinstance(spatial, Mapping) else ():
        pixels = library.get("scalefactors", {}).get("spot_diameter_fullres")
        if pixels:
            return float(pixels) * slide_mpp, ""
        microns = library.get("metadata", {}).get("spot_diameter_um")
        if microns:
            return float(microns), ""
    return VISIUM_SPOT_UM, "the file does not say how wide a spot is: Visium's 55 µm assumed"


def _stated_mpp(spatial: Any) -> float | None:
    """Return the mpp in ``uns["spatial"]``, unless the file calls it an estimate."""
    for library in spatial.values() if isinstance(spatial, Mapping) else ():
        metadata = library.get("metadata", {})
        if metadata.get("mpp") and not metadata.get("mpp_is_estimate"):
            return float(metadata["mpp"])
    return None


RECORD = ExpressionLayout("anndata", "an AnnData .h5ad or .zarr", recognises, read, order=10)
