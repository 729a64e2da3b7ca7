"""raw2features stores: ``grids/<key>/coords`` and ``features/<model>`` in a Zarr group, format 0.1."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from featurestore.errors import StoreError
from featurestore.exchange.external import ExternalEmbeddings, check_array, stated_number
from featurestore.location import Location

HEADER = "raw2features"


def read_raw2features(path: Path, grid: str | None = None, model: str | None = None) -> ExternalEmbeddings:
    """Read one grid and one model of a store.

    Parameters
    ----------
    grid, model
        Needed where the store holds several.

    Raises
    ------
    StoreError
        If it is not such a store, or several grids or models match.
    """
    try:
        root = zarr.open_group(Location(path).zarr(read_only=True), mode="r")
        grids: Any = root["grids"]
        grid_key = _choose_name(sorted(grids.keys()), grid, f"{path}: several grids", "--grid")
        header: Any = dict(grids[grid_key].attrs)[HEADER]
        models = sorted(grids[grid_key]["features"].keys())
        name = _choose_name(models, model, f"{path}: several models", "--encoder")
        features = _read_array(grids[grid_key]["features"][name], path, f"features/{name}")
        coords = _read_array(grids[grid_key]["coords"], path, "coords")
        source, patching = header["source"], header["patching"]
        about = header.get("models", {}).get(name)
        facts = {"schema_version": header.get("schema_version"), "model": about}
        digest = hashlib.sha256(
            features.tobytes()
            + coords.astype(np.int64).tobytes()
            + json.dumps(facts, sort_keys=True).encode()
        )
        size = (source.get("level_dimensions") or [None])[0]
        patch = stated_number(patching, "patch_px", str(path), at_least=1)
        return ExternalEmbeddings(
            format="raw2features",
            slide_id=str(source["slide_id"]),
            encoder=name,
            features=features,
            corners=coords.astype(np.float64),
            patch_px=None if patch is None else int(patch),
            patch_side=stated_number(patching, "level0_patch", str(path)),
            step=stated_number(patching, "level0_step", str(path)),
            mpp=stated_number(source, "mpp_level0", str(path)),
            size_px=(int(size[0]), int(size[1])) if size else None,
            encoder_facts={"model": about},
            provenance={"content_sha256": digest.hexdigest(), **facts},
        )
    except (KeyError, OSError, ValueError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        if isinstance(error, StoreError):  # a ValueError, too
            raise
        raise StoreError(
            f"{path} is not a raw2features store: {' '.join(repr(error).split())[:200]}"
        ) from error


def _read_array(array: Any, path: Path, name: str) -> NDArray[Any]:
    # Chunks that were never written read as the fill value, so the size of the array has no bound of its own.
    file_bytes = sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    # An object dtype could be unpickled when it is read: refused by its dtype, which is known before.
    check_array(f"{path}: {name}", array.shape, array.dtype, file_bytes)
    return np.asarray(array[...])


def _choose_name(names: list[str], chosen: str | None, what: str, option: str) -> str:
    if chosen in names or (chosen is None and len(names) == 1):
        return chosen or names[0]
    raise StoreError(f"{what}; name one with {option}: {', '.join(names)}")
