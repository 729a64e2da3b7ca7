"""TRIDENT and CLAM feature files: ``features (n, dim)`` and ``coords (n, 2)`` in one HDF5 file.

TRIDENT describes the patches in attributes of `coords` (patch_size, patch_size_level0, overlap, magnifications);
CLAM's feature files have none.
"""

import hashlib
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from featurestore.blocks import Block
from featurestore.errors import StoreError, first_line
from featurestore.exchange.external import ExternalEmbeddings
from featurestore.exchange.hdf5_file import whole_hdf5
from featurestore.storage.block_array import check_whole
from featurestore.storage.store import Store

MAGNIFICATION_MPP = 10.0
"""Microns per pixel times magnification, by convention: 40 x is 0.25."""


def read_h5(path: Path) -> ExternalEmbeddings:
    """Read a feature file.

    Raises
    ------
    StoreError
        If it is not an HDF5 file, or has no features and coordinates.
    """
    try:
        with h5py.File(path, "r") as file:
            lacking = {"features", "coords"} - set(file)
            if lacking:
                raise StoreError(f"{path} has no dataset {sorted(lacking)}; it holds {sorted(file)}")
            features = np.squeeze(file["features"][...])
            coords = np.squeeze(file["coords"][...]).astype(np.int64)
            coords_attrs = {name: _plain(value) for name, value in file["coords"].attrs.items()}
            features_attrs = {name: _plain(value) for name, value in file["features"].attrs.items()}
    except OSError as error:
        raise StoreError(f"{path} is not an HDF5 file: {first_line(error)}") from error
    patch: Any = coords_attrs.get("patch_size")
    level0: Any = coords_attrs.get("patch_size_level0")
    step = None
    if patch and level0:
        # The overlap is in pixels of the patch, as the encoder saw it.
        step = (patch - coords_attrs.get("overlap", 0)) * level0 / patch
    size: Any = (coords_attrs.get("level0_width"), coords_attrs.get("level0_height"))
    return ExternalEmbeddings(
        format="TRIDENT" if level0 else "CLAM",
        slide_id=str(coords_attrs.get("name") or path.stem),
        encoder=str(features_attrs.get("encoder") or ""),
        features=features,
        coords_px=coords,
        patch_px=int(patch) if patch and level0 else None,
        patch_level0_px=float(level0) if level0 else None,
        step_px=step,
        size_px=(int(size[0]), int(size[1])) if all(size) else None,
        # Without the folder in which it was written, which says nothing of the vectors.
        facts={"file_sha256": _sha256(path), **{k: v for k, v in coords_attrs.items() if k != "savetodir"}},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode()
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_h5(store: Store, slide_id: str, grid_key: str, encoder: str, path: Path) -> int:
    """Write one embedding as TRIDENT does, block by block; return the number of patches.

    Patches that could not be read are left out. The file appears when it is complete; an existing one is replaced.

    Raises
    ------
    StoreError
        If the slide has no such embedding, or blocks of it are missing or damaged.
    """
    stored, array = store.grid(slide_id, grid_key), store.embedding(slide_id, grid_key, encoder)
    grid, record = stored.grid, store.slide(slide_id)
    planned = stored.planned(array.block_shape)
    check_whole(array, planned, slide_id)
    scale = grid.effective_mpp / grid.slide_mpp
    with whole_hdf5(path) as opened:
        file = opened.file
        dim, n = array.shape[2], 0
        # Shortened at the end: how many patches could be read is known when the last block is.
        most = int(stored.is_tissue.sum())
        features = file.create_dataset("features", (most, dim), "float32", maxshape=(None, dim))
        coords = file.create_dataset("coords", (most, 2), "int64", maxshape=(None, 2))
        for block in planned:
            rows, cols, values = _patches(stored.is_tissue, block, array.read_block(block))
            stop = n + len(values)
            opened.check()
            features[n:stop] = values
            corners = np.stack([cols, rows], axis=1) * grid.spec.stride_px * scale
            coords[n:stop] = np.rint(corners).astype(np.int64)
            n = stop
        features.resize(n, axis=0)
        coords.resize(n, axis=0)
        key = store.identity(slide_id, grid_key, encoder).key
        features.attrs.update({"encoder": key, "name": slide_id})
        coords.attrs.update(
            {
                "patch_size": grid.spec.patch_px,
                "patch_size_level0": round(grid.spec.patch_px * scale),
                "level0_magnification": round(MAGNIFICATION_MPP / grid.slide_mpp),
                "target_magnification": round(MAGNIFICATION_MPP / grid.effective_mpp),
                "overlap": grid.spec.patch_px - grid.spec.stride_px,
                "name": slide_id,
                "savetodir": "",
                "level0_width": record.size_px[0],
                "level0_height": record.size_px[1],
            }
        )
    return n


def _patches(is_tissue: Any, block: Block, values: Any) -> tuple[Any, Any, Any]:
    keep = is_tissue[block.slices] & ~np.isnan(values).any(axis=2)
    rows, cols = np.nonzero(keep)
    return rows + block.rows[0], cols + block.cols[0], values[keep].astype(np.float32)
