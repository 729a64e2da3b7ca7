"""HDF5 feature files of TRIDENT, CLAM and STAMP: vectors ``(n, dim)`` and corners ``(n, 2)`` in one file.

TRIDENT describes the patches in attributes of `coords` (patch_size, patch_size_level0, overlap, magnifications), in
level-0 pixels. CLAM's files have attributes of their own (patch_size, patch_level, downsample), or none. STAMP gives
corners and sides in microns, and its attributes are the file's.
"""

import hashlib
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import StoreError, first_line
from featurestore.exchange.external import ExternalEmbeddings, check_array, stated_number
from featurestore.exchange.hdf5_file import whole_hdf5
from featurestore.storage.block_array import check_whole
from featurestore.storage.store import Store

MAGNIFICATION_MPP = 10.0
"""Microns per pixel times magnification, by convention: 40 x is 0.25."""
FEATURES = ("features", "feats", "patch_embeddings")
"""Names of the vectors: TRIDENT's and CLAM's, and STAMP's two."""
KEPT_ATTRIBUTE = 1000
"""Letters of an attribute that are kept in the store: a name is short, and an array of a million numbers is none."""
# What h5py raises for what a file holds; its own classes differ from release to release.
_H5_ERRORS = (
    OSError,
    RuntimeError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    OverflowError,
    MemoryError,
)


def read_h5(path: Path) -> ExternalEmbeddings:
    """Read a feature file.

    Raises
    ------
    StoreError
        If it is not an HDF5 file, has no features and coordinates, or states what cannot be true.
    """
    try:
        with h5py.File(path, "r") as file:
            name = next((name for name in FEATURES if name in file), FEATURES[0])
            lacking = {name, "coords"} - set(file)
            if lacking:
                held = ", ".join(sorted(file)[:10])
                raise StoreError(f"{path} has no dataset {sorted(lacking)}; it holds: {held or 'nothing'}")
            features, coords = (_dataset(file, part, path) for part in (name, "coords"))
            vectors, corners = (
                _as_rows(features[...], coords.size == 2),
                _as_rows(coords[...], coords.size == 2),
            )
            coords_attrs, features_attrs = _attributes(coords), _attributes(features)
            attrs = {**_attributes(file), **coords_attrs}
    except _H5_ERRORS as error:
        if isinstance(error, StoreError):  # a ValueError, too
            raise
        raise StoreError(f"{path} cannot be read as HDF5: {first_line(error)}") from error
    provenance = {"file_sha256": _sha256(path), **_kept(coords_attrs)}
    slide_id = str(coords_attrs.get("name") or path.stem)
    values: dict[str, Any] = {
        "slide_id": slide_id,
        "features": vectors,
        "corners": corners.astype(np.float64),
    }
    if name != FEATURES[0]:
        return _stamp(path, attrs, {**values, "provenance": {**provenance, **_kept(attrs)}})
    values |= {"encoder": str(features_attrs.get("encoder") or ""), "provenance": provenance}
    is_trident = coords_attrs.get("patch_size_level0") is not None
    return (_trident if is_trident else _clam)(path, coords_attrs, values)


def _trident(path: Path, attrs: dict[str, Any], values: dict[str, Any]) -> ExternalEmbeddings:
    label = str(path)
    patch = stated_number(attrs, "patch_size", label, at_least=1)
    level0 = stated_number(attrs, "patch_size_level0", label)
    # 0 is the usual overlap, and no positive number.
    overlap = (stated_number(attrs, "overlap", label) if attrs.get("overlap") else None) or 0.0
    step = None
    if patch and level0:
        if overlap >= patch:
            raise StoreError(f"{label}: an overlap of {overlap:g} px, and patches of {patch:g} px")
        # The overlap is in pixels of the patch, as the encoder saw it.
        step = (patch - overlap) * level0 / patch
        overlap = overlap * level0 / patch
    return ExternalEmbeddings(
        format="TRIDENT",
        patch_px=int(patch) if patch and level0 else None,
        patch_side=level0,
        step=step,
        overlap=overlap,
        size_px=_size(attrs, ("level0_width", "level0_height"), label),
        **values,
    )


def _clam(path: Path, attrs: dict[str, Any], values: dict[str, Any]) -> ExternalEmbeddings:
    label = str(path)
    patch = stated_number(attrs, "patch_size", label, at_least=1)
    # Sides and sizes are in pixels of the level at which patches were cut; corners are of level 0.
    downsample = stated_number(attrs, "downsample", label)
    size = np.asarray(attrs.get("level_dim", ())).reshape(-1)
    known = patch is not None and downsample is not None
    stated = size.size == 2 and downsample is not None
    width, height = (
        (stated_number({"level_dim": side}, "level_dim", label) for side in size) if stated else (None, None)
    )
    return ExternalEmbeddings(
        format="CLAM",
        patch_px=int(patch) if patch and known else None,
        patch_side=patch * downsample if patch and downsample else None,
        size_px=(round(width * downsample), round(height * downsample))
        if width and height and downsample
        else None,
        size_tolerance_px=2 * (downsample or 1.0),
        **values,
    )


def _stamp(path: Path, attrs: dict[str, Any], values: dict[str, Any]) -> ExternalEmbeddings:
    label = str(path)
    side = stated_number(attrs, "tile_size_um", label)
    if side is None and attrs.get("unit") == "um":
        side = stated_number(attrs, "tile_size", label)  # its name before STAMP 2.1
    if side is None and attrs.get("unit") != "um":
        raise StoreError(
            f"{label} has 'feats' as STAMP writes them, and does not state that its coordinates are microns (attribute "
            "unit or tile_size_um): STAMP before 2.0; extract the features again"
        )
    patch = stated_number(attrs, "tile_size_px", label, at_least=1)
    return ExternalEmbeddings(
        format="STAMP",
        encoder=str(attrs.get("extractor") or ""),
        in_microns=True,
        patch_px=None if patch is None else int(patch),
        patch_side=side,
        step=side,  # STAMP's tiles do not overlap
        # The code that cut and normalised the tiles decides the vectors, too.
        encoder_facts={"code_hash": str(attrs["code_hash"])[:KEPT_ATTRIBUTE]}
        if attrs.get("code_hash")
        else {},
        **values,
    )


def _dataset(file: h5py.File, name: str, path: Path) -> h5py.Dataset:
    """Return a dataset whose numbers are in this file and no more than it can hold."""
    link, found = file.get(name, getlink=True), file.get(name)
    if isinstance(link, h5py.ExternalLink) or not isinstance(found, h5py.Dataset):
        raise StoreError(f"{path}: {name} is no dataset of this file")
    if found.external or found.is_virtual:
        raise StoreError(f"{path}: {name} keeps its numbers in other files; copy them into one (h5repack)")
    if found.shape is None:
        raise StoreError(f"{path}: {name} is empty")
    check_array(f"{path}: {name}", found.shape, found.dtype, path.stat().st_size)
    return found


def _as_rows(values: NDArray[Any], one_patch: bool) -> NDArray[Any]:
    """Return ``(n, k)`` of ``(1, n, k)``; of a single patch also of ``(k,)``."""
    if values.ndim == 3 and values.shape[0] == 1:
        return np.asarray(values[0])
    return values[None] if values.ndim == 1 and one_patch else values


def _attributes(item: Any) -> dict[str, Any]:
    return {str(name): _plain(item.attrs[name]) for name in item.attrs}


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, h5py.Empty):
        return None
    return value.tolist() if isinstance(value, (np.generic, np.ndarray)) else value


def _kept(attrs: dict[str, Any]) -> dict[str, Any]:
    """Return the attributes that a store can hold as JSON, without the folder in which the file was written."""
    return {
        k: v for k, v in attrs.items() if k != "savetodir" and _is_json(v) and len(str(v)) <= KEPT_ATTRIBUTE
    }


def _is_json(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_json(part) for part in value)
    return (
        value is None or isinstance(value, (str, int)) or (isinstance(value, float) and math.isfinite(value))
    )


def _size(attrs: dict[str, Any], names: tuple[str, str], label: str) -> tuple[int, int] | None:
    width, height = (stated_number(attrs, name, label, at_least=1) for name in names)
    return (int(width), int(height)) if width and height else None


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
            corners = np.stack([cols, rows], axis=1) * grid.spec.stride_px * scale + np.asarray(
                grid.origin_px
            )
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
