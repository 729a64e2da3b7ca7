"""A store as a lazy xarray DataTree: every slide, grid and encoder by its path.

A slide costs one request for its consolidated metadata, and two for the coordinates of each grid.
"""

import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, cast

import xarray as xr
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
    slide = Location(f"{location.url.rstrip('/')}/{slide_id}").zarr(read_only=True)
    opened = partial(xr.open_datatree, cast(Any, slide), engine="zarr", zarr_format=3, chunks={})
    try:
        try:
            return opened(consolidated=True)
        except StoreError:
            raise
        except ValueError:  # the run that planned the slide was killed before it consolidated the metadata
            return opened(consolidated=False)
    except FileNotFoundError:
        return None  # a folder that is no slide: of a remote store they are not looked for
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(
            f"{document_label(location, slide_id)} is damaged: {first_line(error)}"
        ) from error
