"""Is a store whole? The specification as a program: every rule of docs/SPEC.md has its check here.

Nothing is repaired; each problem names what is wrong and the command that mends it.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import FeatureStoreError
from featurestore.grid import PatchGrid
from featurestore.location import PathOrUrl
from featurestore.names import is_segment, slug
from featurestore.storage.block_array import BlockArray
from featurestore.storage.layout import EMBEDDING_DIMS, GRID_ARRAYS, grid_path
from featurestore.storage.store import Store, StoredGrid
from featurestore.storage.zarr_metadata import read_attrs


@dataclass(frozen=True)
class Problem:
    """One thing that is missing or damaged.

    Parameters
    ----------
    path
        In the store.
    what
        What is wrong, with numbers.
    fix
        The command, or the act, that mends it.
    """

    path: str
    what: str
    fix: str


def validate(url: PathOrUrl, *, deep: bool = False) -> list[Problem]:
    """Check a store against its specification.

    Parameters
    ----------
    url
        Folder or URL.
    deep
        Read every object and check its checksum; otherwise only metadata and listings.

    Returns
    -------
    list of Problem
        Empty if the store is whole.
    """
    store = Store.open(url)
    return [problem for slide_id in store.slide_ids() for problem in _check_slide(store, slide_id, deep=deep)]


def _check_slide(store: Store, slide_id: str, *, deep: bool) -> Iterator[Problem]:
    again = "run the same histosge embed again"
    attrs = read_attrs(store.location, slide_id).get("slide")
    if not attrs:
        yield Problem(slide_id, "the slide's group has no slide attributes", again)
        return
    wanted = {"source", "size_px", "mpp", "fingerprint"}
    if wanted - set(attrs):
        yield Problem(slide_id, f"slide attributes lack {sorted(wanted - set(attrs))}", _rm(store, slide_id))
    for grid_key in store.location.folders(slide_id):
        if is_segment(grid_key):
            yield from _check_grid(store, slide_id, grid_key, deep=deep)


def _check_grid(store: Store, slide_id: str, grid_key: str, *, deep: bool) -> Iterator[Problem]:
    path = grid_path(slide_id, grid_key)
    attrs = read_attrs(store.location, path)
    if not attrs.get("grid"):
        yield Problem(path, "the grid was never written whole", "run the same histosge embed again")
        return
    clear = _rm(store, slide_id, grid_key)
    grid = PatchGrid.from_attrs(attrs["grid"])
    if grid.spec.key != grid_key:
        yield Problem(path, f"attributes describe grid {grid.spec.key}", clear)
    arrays: dict[str, Any] = {}
    for name, (dims, dtype) in GRID_ARRAYS.items():
        try:
            array = zarr.open_array(store.location.zarr(read_only=True), path=f"{path}/{name}", mode="r")
            values = np.asarray(array[...])
        except FileNotFoundError:
            yield Problem(f"{path}/{name}", "the array is missing", clear)
            continue
        except ValueError as error:  # a checksum that does not fit, or a shape that cannot be decoded
            yield Problem(f"{path}/{name}", f"damaged: {error}", clear)
            continue
        sizes = {"y": grid.n_rows, "x": grid.n_cols, "channel": 3}
        expected = tuple(sizes[dim] for dim in dims)
        if values.shape != expected or values.dtype != dtype:
            what = f"is {values.dtype} {values.shape}, should be {dtype} {expected}"
            yield Problem(f"{path}/{name}", what, clear)
            continue
        arrays[name] = values
    if set(arrays) != set(GRID_ARRAYS):
        return
    for name, centres in (("y", grid.y_um), ("x", grid.x_um)):
        if not np.array_equal(arrays[name], centres):
            yield Problem(f"{path}/{name}", "coordinates disagree with the grid's attributes", clear)
    stored = StoredGrid(slide_id, grid, arrays["tissue"], arrays["rgb"])
    for encoder_slug in store.encoder_slugs(slide_id, grid_key):
        yield from _check_embedding(store, stored, encoder_slug, deep=deep)


def _check_embedding(store: Store, stored: StoredGrid, encoder_slug: str, *, deep: bool) -> Iterator[Problem]:
    grid_key = stored.grid.spec.key
    path = f"{grid_path(stored.slide_id, grid_key)}/{encoder_slug}/embedding"
    clear = _rm(store, stored.slide_id, grid_key, encoder_slug)
    try:
        array = BlockArray.open(store.location, path)
    except (FeatureStoreError, ValueError, KeyError, TypeError) as error:
        yield Problem(path, f"the array's metadata cannot be read: {error}", clear)
        return
    attrs = array.attrs.get("encoder") or {}
    yield from _check_identity(path, attrs, encoder_slug, clear)
    expected = (*stored.grid.shape, attrs.get("dim", array.shape[2]))
    if array.shape != expected or array.dtype != np.float16 or array.dims != EMBEDDING_DIMS:
        what = f"is {array.dtype} {array.shape} {array.dims}, should be float16 {expected} {EMBEDDING_DIMS}"
        yield Problem(path, what, clear)
        return
    planned = stored.planned(array.block_shape)
    again = "run the same histosge embed again"
    missing = array.missing(planned)
    for block in missing:
        yield Problem(f"{path}/c/{block.index[0]}/{block.index[1]}", "the block is missing", again)
    extra = array.done() - {block.index for block in planned}
    for index in sorted(extra):
        yield Problem(f"{path}/c/{index[0]}/{index[1]}", "a block without tissue has an object", clear)
    if deep:
        yield from _check_blocks(array, stored, [b for b in planned if b not in set(missing)], again)


def _check_identity(path: str, attrs: dict[str, Any], encoder_slug: str, clear: str) -> Iterator[Problem]:
    missing = {"key", "dim", "facts", "fingerprint"} - set(attrs)
    if missing:
        yield Problem(path, f"encoder attributes lack {sorted(missing)}", clear)
        return
    identity = EncoderIdentity(attrs["key"], int(attrs["dim"]), attrs["facts"])
    if identity.fingerprint != attrs["fingerprint"]:
        what = (
            f"fingerprint {attrs['fingerprint'][:16]} is not that of its facts, {identity.fingerprint[:16]}"
        )
        yield Problem(path, what, clear)
    if slug(identity.key) != encoder_slug:
        yield Problem(path, f"embeddings of {identity.key!r} lie under {encoder_slug!r}", clear)


def _check_blocks(array: BlockArray, stored: StoredGrid, blocks: list[Any], again: str) -> Iterator[Problem]:
    tissue = stored.is_tissue
    for block in blocks:
        path = f"{array.path}/c/{block.index[0]}/{block.index[1]}"
        mend = f"remove {path}, then {again}"
        try:
            values = array.read(block.rows, block.cols)
        except (ValueError, RuntimeError) as error:
            yield Problem(path, f"damaged: {error}", mend)
            continue
        background = ~tissue[block.slices]
        if np.isfinite(values[background]).any():
            yield Problem(path, "background patches hold numbers; they should be NaN", mend)
        if np.isinf(values).any():
            yield Problem(path, f"{int(np.isinf(values).any(axis=2).sum())} patches hold infinity", mend)


def _rm(store: Store, slide_id: str, grid_key: str = "", encoder_slug: str = "") -> str:
    command = f"histosge rm {store.location.label} --slide {slide_id}"
    command += f" --grid {grid_key}" if grid_key else ""
    return command + (f" --encoder {encoder_slug}" if encoder_slug else "")
