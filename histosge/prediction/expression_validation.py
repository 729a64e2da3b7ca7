"""Check an expression store against its specification: the second section of docs/SPEC.md.

Grids, blocks and objects follow the rules of a feature store, and are checked by the same code.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.location import PathOrUrl, as_url
from featurestore.names import is_segment
from featurestore.storage.layout import GRID_ARRAYS
from featurestore.storage.store import StoredGrid
from featurestore.storage.stored_documents import parse_grid
from featurestore.storage.validation import (
    Problem,
    check_array_objects,
    check_documents,
    check_grid_arrays,
    check_stray_folders,
    stray_folder,
)
from featurestore.storage.zarr_metadata import document_label, read_attrs
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.stored_map import StoredMap

PREDICT_AGAIN = "run the same histosge predict again"
DIMS = {"expression": ("y", "x", "gene"), "depth": ("y", "x", "library")}


def validate_expression(url: PathOrUrl, *, deep: bool = False) -> list[Problem]:
    """Check an expression store against its specification.

    Parameters
    ----------
    url
        Folder or URL.
    deep
        Read every object and check its checksum; otherwise only metadata and listings.

    Returns
    -------
    list of Problem
        Empty if the store is complete and undamaged.

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no expression store at `url`.
    """
    store = ExpressionStore.open(as_url(url))
    location = store.location
    problems = list(check_stray_folders(location))
    for slide_id in filter(is_segment, location.folders()):
        if not location.exists(f"{slide_id}/zarr.json"):
            continue
        for grid_key in location.folders(slide_id):
            path = f"{slide_id}/{grid_key}"
            if not is_segment(grid_key) or not location.folders(path):
                problems.append(stray_folder(path))
            elif not location.exists(f"{path}/expression/zarr.json"):
                problems.append(Problem(path, "the map was not created completely", PREDICT_AGAIN))
            else:
                found = _check_map(store, slide_id, grid_key, deep=deep)
                problems += check_documents(found, _remove_it(store, path))
    return problems


def _check_map(store: ExpressionStore, slide_id: str, grid_key: str, *, deep: bool) -> Iterator[Problem]:
    path = f"{slide_id}/{grid_key}"
    remove_it = _remove_it(store, path)
    attrs = read_attrs(store.location, path)
    grid = parse_grid(attrs.get("grid"), document_label(store.location, path))
    if grid.spec.key != grid_key:
        yield Problem(path, f"attributes describe grid {grid.spec.key}", remove_it)
    arrays: dict[str, NDArray[Any]] = {}
    yield from check_grid_arrays(store.location, path, grid, remove_it, arrays)
    if set(arrays) != set(GRID_ARRAYS):
        return
    stored = store.map(slide_id, grid_key)
    yield from _check_genes(stored, path, remove_it)
    on_grid = StoredGrid(slide_id, grid, stored.tissue, stored.rgb)
    for array in (stored.array, *([stored.depth] if stored.depth is not None else [])):
        dims = DIMS[array.path.rpartition("/")[2]]
        if array.dtype != np.float16 or array.dims != dims:
            yield Problem(array.path, f"is {array.dtype} {array.dims}, should be float16 {dims}", remove_it)
        else:
            yield from check_array_objects(array, on_grid, PREDICT_AGAIN, remove_it, deep=deep)


def _check_genes(stored: StoredMap, path: str, remove_it: str) -> Iterator[Problem]:
    if len(set(stored.genes)) < len(stored.genes):
        yield Problem(f"{path}/gene", "a gene is named twice", remove_it)
    if not stored.array.attrs.get("made_by"):
        yield Problem(f"{path}/expression", "attributes do not say which model predicted it", remove_it)
    if (stored.half_width is None) != (stored.trust is None):
        yield Problem(path, "has only one of half_width and trust", remove_it)
    if stored.strata is not None and stored.depth is None:
        yield Problem(f"{path}/half_width_by_depth", "there is no depth to choose a half width by", remove_it)
    for name, values in (("half_width", stored.half_width), ("trust", stored.trust)):
        if values is not None and not (np.isfinite(values) & (values >= 0)).all():
            yield Problem(f"{path}/{name}", "holds values that are negative or no numbers", remove_it)


def _remove_it(store: ExpressionStore, path: str) -> str:
    return f"remove {store.location.label}/{path}, then {PREDICT_AGAIN}"
