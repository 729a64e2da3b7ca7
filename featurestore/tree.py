"""A store as a lazy xarray DataTree: every slide, grid and encoder by its path."""

import warnings
from typing import Any, cast

import xarray as xr
from zarr.errors import ZarrUserWarning

from featurestore.store import Store


def open_store(url: str) -> xr.DataTree:
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
        answers. Slides that could not be opened are not in it.

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no feature store at `url`.
    """
    store = Store.open(url)
    trees = {}
    for slide_id in store.slide_ids():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=ZarrUserWarning)
            trees[slide_id] = xr.open_datatree(
                cast(Any, store.location.zarr(read_only=True)),
                engine="zarr",
                group=slide_id,
                consolidated=True,
            )
    return xr.DataTree.from_dict({f"/{slide_id}": tree for slide_id, tree in trees.items()})
