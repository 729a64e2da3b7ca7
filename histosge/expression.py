"""Measured expression -> `Spots`: from an ``.h5ad``, or a Space Ranger output folder (1.x and 2.x).

Only reading and refusing: choosing genes and normalising are in `genes`, the fit to the slide in `fit_check`.

Terms
    frame   ``obsm["spatial"]`` and Space Ranger's ``pxl_*_in_fullres`` are level-0 pixels; `Spots.xy_um` is
            microns from the slide's top-left
"""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse

from histosge.errors import ExpressionError
from histosge.sections import Spots

VISIUM_SPOT_UM = 55.0
"""Diameter of a Visium spot: assumed where a file does not say its own."""
POSITION_COLUMNS = (
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)


def read_expression(path: str, slide_id: str, donor: str, slide_mpp: float) -> Spots:
    """Read the spots of one section.

    Parameters
    ----------
    path
        An ``.h5ad`` with ``obsm["spatial"]`` in level-0 pixels, or a Space Ranger output folder (or the
        run's folder that holds ``outs/``).
    slide_id, donor
        Whose spots.
    slide_mpp
        Microns per level-0 pixel.

    Returns
    -------
    Spots
        In the file's order; spots off tissue (``in_tissue`` 0) or without coordinates are left out. Gene
        names that occur twice get ``-1``, ``-2`` ... appended.

    Raises
    ------
    ExpressionError
        If it cannot be read, has no coordinates, or does not hold raw counts.
    """
    place = Path(path)
    if place.is_dir():
        return _space_ranger(place, slide_id, donor, slide_mpp)
    if place.suffix.lower() == ".h5ad":
        return _h5ad(place, slide_id, donor, slide_mpp)
    raise ExpressionError(f"{path} is neither an .h5ad nor a Space Ranger folder; give one of these")


def _h5ad(path: Path, slide_id: str, donor: str, slide_mpp: float) -> Spots:
    import anndata

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UserWarning)
            warnings.simplefilter("ignore", category=FutureWarning)
            data = anndata.read_h5ad(path)
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
    source = data.layers.get("counts", data.X)
    keep = np.ones(data.n_obs, dtype=bool)
    if "in_tissue" in data.obs:
        keep &= data.obs["in_tissue"].to_numpy().astype(float) > 0
    spots = Spots(
        slide_id,
        donor,
        data.obs_names.to_numpy().astype(str),
        xy[:, :2] * slide_mpp,
        _spot_diameter(data.uns.get("spatial", {}), slide_mpp),
        _counts(source, path),
        _unique(data.var_names.astype(str).tolist()),
    )
    return _located(spots, keep, path)


def _spot_diameter(spatial: Any, slide_mpp: float) -> float:
    """Return a spot's diameter in microns from ``uns["spatial"]``, or Visium's."""
    for library in spatial.values() if isinstance(spatial, Mapping) else ():
        pixels = library.get("scalefactors", {}).get("spot_diameter_fullres")
        if pixels:
            return float(pixels) * slide_mpp
        microns = library.get("metadata", {}).get("spot_diameter_um")
        if microns:
            return float(microns)
    return VISIUM_SPOT_UM


def _counts(matrix: Any, path: Path) -> sparse.csr_matrix:
    counts = sparse.csr_matrix(matrix)
    values = counts.data
    if not np.isfinite(values).all() or (values < 0).any():
        raise ExpressionError(f"{path}: counts hold negative or missing values; give the raw counts")
    if not np.array_equal(values, np.round(values)):
        raise ExpressionError(
            f"{path}: counts look normalised (e.g. {values[values != np.round(values)][0]:.3f}); "
            'put the raw counts in X or layers["counts"]'
        )
    if values.sum() == 0:
        raise ExpressionError(f"{path}: all counts are zero")
    return counts.astype(np.float32)


def _unique(names: list[str]) -> tuple[str, ...]:
    """Append ``-1``, ``-2`` ... to the second, third ... gene of one name."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        again = seen.get(name, -1) + 1
        seen[name] = again
        out.append(f"{name}-{again}" if again else name)
    return tuple(out)


def _located(spots: Spots, keep: NDArray[np.bool_], path: Path) -> Spots:
    keep = keep & np.isfinite(spots.xy_um).all(axis=1)
    if not keep.any():
        raise ExpressionError(f"{path}: none of {len(spots)} spots is on tissue and has coordinates")
    return Spots(
        spots.slide_id,
        spots.donor,
        spots.barcodes[keep],
        spots.xy_um[keep],
        spots.diameter_um,
        spots.counts[keep],
        spots.genes,
    )


def _space_ranger(folder: Path, slide_id: str, donor: str, slide_mpp: float) -> Spots:
    outs = folder / "outs" if (folder / "outs" / "spatial").is_dir() else folder
    positions = _positions(outs)
    barcodes, genes, counts = _matrix(outs)
    scale = outs / "spatial" / "scalefactors_json.json"
    if not scale.is_file():
        raise ExpressionError(
            f"{outs} has no spatial/scalefactors_json.json; give a whole Space Ranger output folder"
        )
    diameter = json.loads(scale.read_text()).get("spot_diameter_fullres")
    joined = pl.DataFrame({"barcode": barcodes}).join(
        positions, on="barcode", how="left", maintain_order="left"
    )
    xy = joined.select("pxl_col_in_fullres", "pxl_row_in_fullres").to_numpy().astype(np.float64)
    on_tissue = joined["in_tissue"].fill_null(0).to_numpy() > 0
    spots = Spots(
        slide_id,
        donor,
        np.asarray(barcodes, dtype=np.str_),
        xy * slide_mpp,
        float(diameter) * slide_mpp if diameter else VISIUM_SPOT_UM,
        counts,
        genes,
    )
    return _located(spots, on_tissue, outs)


def _positions(outs: Path) -> pl.DataFrame:
    for name, header in (("tissue_positions.csv", True), ("tissue_positions_list.csv", False)):
        file = outs / "spatial" / name
        if file.is_file():
            frame = pl.read_csv(file, has_header=header, infer_schema=False)
            if len(frame.columns) != len(POSITION_COLUMNS):
                raise ExpressionError(f"{file} has {len(frame.columns)} columns; Space Ranger writes 6")
            numbers = [pl.col(c).cast(pl.Float64, strict=False) for c in POSITION_COLUMNS[1:]]
            return frame.rename(dict(zip(frame.columns, POSITION_COLUMNS, strict=True))).with_columns(numbers)
    raise ExpressionError(
        f"{outs} has neither spatial/tissue_positions.csv nor spatial/tissue_positions_list.csv; "
        "give a Space Ranger output folder"
    )


def _matrix(outs: Path) -> tuple[list[str], tuple[str, ...], sparse.csr_matrix]:
    """Read the 10x HDF5 matrix: barcodes, gene names, counts ``(n_barcodes, n_genes)``."""
    names = ("filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5")
    file = next((outs / name for name in names if (outs / name).is_file()), None)
    if file is None:
        raise ExpressionError(f"{outs} has no {names[0]}; give a whole Space Ranger output folder")
    try:
        with h5py.File(file) as h5:
            matrix = h5["matrix"]
            barcodes = [b.decode() for b in matrix["barcodes"][:]]
            features = matrix["features"]
            genes = [g.decode() for g in features["name"][:]]
            kinds = np.array([k.decode() for k in features["feature_type"][:]])
            arrays = (matrix["data"][:], matrix["indices"][:], matrix["indptr"][:])
            shape = (len(barcodes), len(genes))
    except (OSError, KeyError) as error:
        raise ExpressionError(f"{file} is no 10x matrix: {error}") from error
    # Stored as columns of barcodes: the same arrays are rows of barcodes.
    counts = sparse.csr_matrix(arrays, shape=shape)
    wanted = np.flatnonzero(kinds == "Gene Expression")
    return barcodes, _unique([genes[i] for i in wanted]), _counts(counts[:, wanted], file)
