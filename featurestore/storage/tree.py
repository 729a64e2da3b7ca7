"""A store as a lazy xarray DataTree: every slide, grid and encoder by its path.

A slide costs one request for its consolidated metadata, and two for the coordinates of each grid.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast
from uuid import uuid4

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing
from zarr.errors import ZarrUserWarning

from featurestore.documents import DocumentError
from featurestore.errors import StoreError, first_line
from featurestore.location import Location, PathOrUrl
from featurestore.storage.selection import METADATA_THREADS
from featurestore.storage.store import Store
from featurestore.storage.zarr_metadata import ZARR_ERRORS, document_label


def open_store(url: PathOrUrl) -> xr.DataTree:
    """Open a store for analysis; nothing is read until it is used.

    Parameters
    ----------
    url
        Folder or URL.

    Returns
    -------
    xarray.DataTree
        Nodes ``<slide>/<grid>/<encoder>`` with `embedding` (y, x, feature) and coordinates in microns,
        so that ``tree["C2/mpp0.5000_px224_stride224/uni"].embedding.sel(y=1200, x=3400, method="nearest")``
        is the vector of the patch there. Every array is a dask array; one of its chunks is one stored block. Slides
        that could not be opened are not in it.

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no feature store at `url`.
    """
    store = Store.open(url)
    slide_ids = store.slide_ids()
    with warnings.catch_warnings(), ThreadPoolExecutor(METADATA_THREADS) as pool:
        # zarr warns that consolidated metadata is not part of the Zarr format 3; the store's specification says so.
        warnings.simplefilter("ignore", category=ZarrUserWarning)
        trees = dict(zip(slide_ids, pool.map(partial(_open_slide, store.location), slide_ids), strict=True))
    return xr.DataTree.from_dict({f"/{name}": tree for name, tree in trees.items() if tree is not None})


def _open_slide(location: Location, slide_id: str) -> xr.DataTree | None:
    # xarray looks for consolidated metadata at the root of what it is given, so it is given the slide.
    slide = location.below(slide_id).zarr(read_only=True)
    # Without dask at first: what it makes of an array raises zarr's own errors where an object is damaged.
    opened = partial(xr.open_datatree, cast(Any, slide), engine="zarr", zarr_format=3, chunks=None)
    try:
        try:
            tree = opened(consolidated=True)
        except StoreError:
            raise
        except ValueError:  # the run that planned the slide was killed before it consolidated the metadata
            tree = opened(consolidated=False)
        label = f"{location.label}/{slide_id}"
        nodes = {node.path: (f"{label}{node.path}", node.to_dataset(inherit=False)) for node in tree.subtree}
        return xr.DataTree.from_dict({path: _with_dask(*node) for path, node in nodes.items()})
    except FileNotFoundError:
        return None  # a folder that is no slide: of a remote store they are not looked for
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(
            f"{document_label(location, slide_id)} is damaged: {first_line(error)}"
        ) from error


class _StoredValues(BackendArray):
    """An array of the store, whose damaged objects are errors of ours."""

    def __init__(self, variable: xr.Variable, label: str) -> None:
        self._variable, self._label = variable, label
        self.shape, self.dtype = variable.shape, variable.dtype
        # Its name in graphs of dask; one of its values would be made by reading all of them.
        self._token = uuid4().hex

    def __dask_tokenize__(self) -> str:
        return self._token

    def __getitem__(self, key: indexing.ExplicitIndexer) -> NDArray[Any]:
        return cast(
            NDArray[Any],
            indexing.explicit_indexing_adapter(key, self.shape, indexing.IndexingSupport.BASIC, self._read),
        )

    def _read(self, key: tuple[Any, ...]) -> NDArray[Any]:
        try:
            return np.asarray(self._variable[key].values)
        except StoreError:
            raise
        except ZARR_ERRORS as error:
            raise StoreError(f"{self._label} is damaged: {first_line(error)}") from error


def _with_dask(label: str, dataset: xr.Dataset) -> xr.Dataset:
    """Replace every array that is no index by a dask array, one chunk for each stored block."""
    lazy = {}
    for name, variable in dataset.variables.items():
        if name in dataset.indexes or not variable.ndim:
            continue  # read when the slide was opened
        stored = indexing.LazilyIndexedArray(_StoredValues(variable, f"{label.rstrip('/')}/{name}"))
        chunks = {dim: variable.encoding["preferred_chunks"][dim] for dim in variable.dims}
        lazy[name] = xr.Variable(variable.dims, stored, variable.attrs, variable.encoding).chunk(chunks)
    return dataset.assign(lazy)
