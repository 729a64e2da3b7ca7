"""AnnData: an ``.h5ad``, or the same as ``.zarr``, with raw counts and ``obsm["spatial"]`` = (x, y) in level-0 pixels.

Terms
    library   one section of a file with several: a key of ``uns["spatial"]``, and a value of the column of ``obs``
              that tells each spot's
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from histosge.data.expression.annotated_table import choose_counts, choose_rows
from histosge.data.expression.annotation import Labels, labels_from
from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.foreign_files import check_hdf5, reading
from histosge.data.expression.layouts.space_ranger import VISIUM_NOTE, theoretical_visium_mpp
from histosge.data.expression.loaded_expression import (
    VISIUM_SPOT_UM,
    LoadedExpression,
    SlideFrame,
    check_zarr_folder,
    left_out,
    make_spots,
    parse_flags,
    parse_number,
    zarr_attributes,
)
from histosge.data.expression.section_choice import (
    listed,
)
from histosge.errors import ExpressionError

SAME_DIAMETER = 0.01
"""Relative difference of spot diameters that rounding explains."""


def recognises(path: Path) -> bool:
    """Tell whether this is an AnnData file or group."""
    if path.is_dir():
        return zarr_attributes(path).get("encoding-type") == "anndata"
    return path.suffix.lower() == ".h5ad"


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read the spots of one section; spots off tissue (``in_tissue`` 0) are left out."""
    data = _open(path)
    spatial = data.uns.get("spatial")
    libraries = _libraries(spatial)
    chosen, library, section_note = choose_rows(data.obs, list(libraries), path, frame)
    xy, axes_note = _positions(data, path)
    matrix, genes, counts_note = choose_counts(data, path)
    obs, xy = data.obs[chosen], xy[chosen]
    if not chosen.all():  # a copy of a large matrix is not made for nothing
        matrix = matrix[chosen]
    keep = parse_flags(obs["in_tissue"], path) if "in_tissue" in obs else None
    # Where the names of obs and uns differ, all libraries must state the same.
    scales = [libraries[library]] if library in libraries else list(libraries.values())
    diameter, note = _spot_diameter(scales, frame.mpp, path)
    # Of a Visium run that scanpy or squidpy wrote, the chip tells more than the file's own scale factors.
    mpp = theoretical_visium_mpp(obs, xy, diameter / frame.mpp)
    if mpp:
        diameter, note = VISIUM_SPOT_UM, VISIUM_NOTE
    else:
        mpp = _stated_mpp(scales, path)
    xy_um = xy * frame.mpp
    spots = make_spots(
        frame,
        path,
        obs.index.to_numpy().astype(str),
        xy_um,
        matrix,
        genes,
        diameter_um=diameter,
        keep=keep,
    )
    notes = (section_note, axes_note, counts_note, note, *left_out(xy_um, keep))
    return LoadedExpression(spots, "AnnData", mpp, tuple(note for note in notes if note))


def annotation(path: Path, frame: SlideFrame, column: str) -> Labels:
    """Read a column of ``obs`` for the spots of one section."""
    data = _open(path)
    chosen, _, _ = choose_rows(data.obs, list(_libraries(data.uns.get("spatial"))), path, frame)
    return labels_from(data.obs[chosen], column, path)


def _open(path: Path) -> Any:
    import anndata

    if path.is_dir():
        check_zarr_folder(path)
    else:
        names = check_hdf5(path)
        if not {"obs", "var"} <= names:
            raise ExpressionError(f"{path} is no AnnData file: it holds {listed(sorted(names)) or 'nothing'}")
    with reading(path, "AnnData"), warnings.catch_warnings():
        # Gene names that occur twice are numbered here; files of older versions are read all the same.
        warnings.simplefilter("ignore", category=UserWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
        return anndata.read_zarr(path) if path.is_dir() else anndata.read_h5ad(path)


def _libraries(spatial: Any) -> dict[str, Mapping[str, Any]]:
    """Return what ``uns["spatial"]`` holds for each library."""
    # CELLxGENE's files hold a flag beside the libraries: `is_single`.
    items = spatial.items() if isinstance(spatial, Mapping) else ()
    return {str(name): value for name, value in items if isinstance(value, Mapping)}


def _positions(data: Any, path: Path) -> tuple[NDArray[np.float64], str]:
    """Return ``(n_spots, 2)`` pixels, and a note."""
    if "spatial" not in data.obsm:
        held = listed(sorted(data.obsm)) or "nothing"
        raise ExpressionError(
            f'{path} has no obsm["spatial"] (obsm holds {held}); put the spots\' (x, y) in level-0 pixels there'
        )
    stored = data.obsm["spatial"]
    try:
        xy = np.asarray(stored.toarray() if hasattr(stored, "toarray") else stored, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ExpressionError(f'{path}: obsm["spatial"] holds no numbers: {error}') from error
    if xy.ndim != 2 or xy.shape[1] < 2:
        raise ExpressionError(f'{path}: obsm["spatial"] has shape {xy.shape}; it should be (n_spots, 2)')
    note = 'of obsm["spatial"] only the first two columns are used' if xy.shape[1] > 2 else ""
    return xy[:, :2], note


def _spot_diameter(libraries: list[Mapping[str, Any]], slide_mpp: float, path: Path) -> tuple[float, str]:
    """Return a spot's diameter in microns as the libraries state it, or Visium's and a note on that."""
    found = []
    for library in libraries:
        pixels = parse_number(
            _field(library, "scalefactors", "spot_diameter_fullres"), "spot_diameter_fullres", path
        )
        microns = parse_number(_field(library, "metadata", "spot_diameter_um"), "spot_diameter_um", path)
        if pixels or microns:
            found.append(pixels * slide_mpp if pixels else float(microns or 0))
    if not found:
        return VISIUM_SPOT_UM, "the file does not say how wide a spot is: Visium's 55 µm assumed"
    if max(found) / min(found) - 1 > SAME_DIAMETER:
        raise ExpressionError(
            f"{path}: spots are {min(found):.4g} to {max(found):.4g} µm wide in its libraries, and none is named as the "
            'section\'s; give keys of uns["spatial"] and values of obs one name'
        )
    return found[0], ""


def _field(library: Mapping[str, Any], group: str, name: str) -> Any:
    inner = library.get(group)
    return inner.get(name) if isinstance(inner, Mapping) else None


def _stated_mpp(libraries: list[Mapping[str, Any]], path: Path) -> float | None:
    """Return the mpp in ``uns["spatial"]``, unless the file calls it an estimate."""
    for library in libraries:
        mpp = parse_number(_field(library, "metadata", "mpp"), "mpp", path)
        if mpp and not _field(library, "metadata", "mpp_is_estimate"):
            return mpp
    return None


RECORD = ExpressionLayout(
    "anndata",
    "an AnnData .h5ad or .zarr",
    recognises,
    read,
    order=10,
    has_sections=True,
    annotation=annotation,
)
