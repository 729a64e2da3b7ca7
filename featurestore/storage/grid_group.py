"""Write the group of a grid: positions, tissue, mean colours and quality flags of its patches."""

from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError

from featurestore.grid import PatchGrid
from featurestore.location import Location
from featurestore.storage.layout import GRID_ARRAYS, QUALITY, QUALITY_ARRAY, grid_path
from featurestore.storage.zarr_metadata import open_array, write_group
from featurestore.tissue.flags import flag_attrs
from featurestore.tissue.survey import Survey


def write_grid(
    location: Location, slide_id: str, grid: PatchGrid, survey: Survey, software: dict[str, str]
) -> None:
    """Write the arrays of a grid, then its attributes.

    Parameters
    ----------
    software
        Package -> version, of what made the survey.
    """
    path = grid_path(slide_id, grid.spec.key)
    values: dict[str, NDArray[Any]] = {
        "y": grid.y_um,
        "x": grid.x_um,
        "tissue": survey.tissue,
        "rgb": survey.rgb,
    }
    for name, (dims, dtype) in GRID_ARRAYS.items():
        attrs: dict[str, Any] = {"units": "micrometer"} if name in dims else {}
        _write_array(location, f"{path}/{name}", np.asarray(values[name], dtype=dtype), dims, attrs)
    if survey.quality is not None:
        dims, dtype = QUALITY_ARRAY
        quality = np.asarray(survey.quality, dtype=dtype)
        _write_array(location, f"{path}/{QUALITY}", quality, dims, flag_attrs())
    facts: dict[str, Any] = {
        "grid": grid.to_attrs(),
        "tissue": dict(survey.method),
        "software": dict(software),
    }
    if survey.skip:
        facts["skip"] = list(survey.skip)
    # Last, since a grid counts as written once its group has attributes: a killed run leaves arrays without them.
    write_group(location, path, facts)


def _write_array(
    location: Location, path: str, values: NDArray[Any], dims: tuple[str, ...], attrs: dict[str, Any]
) -> None:
    """Write a small array as one object; an existing one is replaced.

    It is replaced in place, not removed first, since another run of the same command may be reading it.
    """
    store = location.zarr()
    try:
        zarr.create_array(
            store,
            name=path,
            data=values,
            chunks=values.shape,
            compressors=[Crc32cCodec()],
            dimension_names=dims,
            attributes=attrs,
        )
    except ContainsArrayError:
        array = open_array(location, path, read_only=False)
        if array.shape != values.shape or array.dtype != values.dtype:
            location.remove(path)
            _write_array(location, path, values, dims, attrs)
            return
        array[...] = values
