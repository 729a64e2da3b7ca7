"""The array of quality flags of a grid: optional, one object. What its bits mean is in `featurestore.tissue.flags`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.documents import DocumentError
from featurestore.location import Location
from featurestore.storage.layout import QUALITY, QUALITY_ARRAY
from featurestore.storage.zarr_metadata import array_from_document, open_array, read_array, read_values


def read_quality(
    location: Location, grid_folder: str, shape: tuple[int, int], document: dict[str, Any] | None = None
) -> NDArray[np.uint8] | None:
    """Read the flags of a grid's patches, ``(n_rows, n_cols)``; None if the grid has none.

    Grids that were imported have none, nor have those that were written before there were flags.

    Parameters
    ----------
    document
        The array's metadata where they were read before; None to look for them.

    Raises
    ------
    DocumentError
        If they are damaged, or of another shape or dtype.
    """
    path = f"{grid_folder}/{QUALITY}"
    if document is not None:
        values = read_values(array_from_document(location, path, document), f"{location.label}/{path}", shape)
    elif location.exists(f"{path}/zarr.json"):
        values = read_array(location, path, shape)
    else:
        return None
    if values.dtype != QUALITY_ARRAY[1]:
        raise DocumentError(
            f"{location.label}/{path} is damaged: it is {values.dtype}, and should be {QUALITY_ARRAY[1]}"
        )
    return values


def replace_quality(location: Location, grid_folder: str, quality: NDArray[np.uint8]) -> None:
    """Replace the flags of a grid that has some, in one object.

    Raises
    ------
    StoreError
        If the grid has none: it was removed meanwhile.
    DocumentError
        If the array is of another shape.
    """
    path = f"{grid_folder}/{QUALITY}"
    array = open_array(location, path, read_only=False)
    if array.shape != quality.shape or array.chunks != array.shape:
        raise DocumentError(
            f"{location.label}/{path} is damaged: it is {array.shape} in chunks of {array.chunks}, and should be "
            f"{quality.shape} in one"
        )
    array[...] = quality
