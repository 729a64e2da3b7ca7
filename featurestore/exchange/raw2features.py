"""raw2features stores: ``grids/<key>/coords`` and ``features/<model>`` in a Zarr group, format 0.1."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from featurestore.errors import StoreError
from featurestore.exchange.external import ExternalEmbeddings
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
        features = np.asarray(grids[grid_key]["features"][name][...])
        coords = np.asarray(grids[grid_key]["coords"][...]).astype(np.int64)
        source, patching = header["source"], header["patching"]
        facts = {"schema_version": header.get("schema_version"), "model": header.get("models", {}).get(name)}
        # The store does not tell all that decides the vectors, so their content is part of the encoder's identity.
        digest = hashlib.sha256(
            features.tobytes() + coords.tobytes() + json.dumps(facts, sort_keys=True).encode()
        )
        size = (source.get("level_dimensions") or [None])[0]
        return ExternalEmbeddings(
            format="raw2features",
            slide_id=str(source["slide_id"]),
            encoder=name,
            features=features,
            coords_px=coords,
            patch_px=int(patching["patch_px"]),
            patch_level0_px=float(patching["level0_patch"]),
            step_px=float(patching["level0_step"]),
            mpp=float(source["mpp_level0"]),
            size_px=(int(size[0]), int(size[1])) if size else None,
            facts={"content_sha256": digest.hexdigest(), **facts},
        )
    except (KeyError, OSError, ValueError, TypeError) as error:
        if isinstance(error, StoreError):  # a ValueError, too
            raise
        raise StoreError(f"{path} is not a raw2features store: {error!r}") from error


def _choose_name(names: list[str], chosen: str | None, what: str, option: str) -> str:
    if chosen in names or (chosen is None and len(names) == 1):
        return chosen or names[0]
    raise StoreError(f"{what}; name one with {option}: {', '.join(names)}")
