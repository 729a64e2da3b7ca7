"""Check a store against its specification: every rule of docs/SPEC.md has its check here.

Nothing is repaired; each problem comes with the command that repairs it. Blocks are read by zarr alone, not by our own
reader, so that a store which passes can be read without us.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr

from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import AccessError, FeatureStoreError, first_line
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
        What to do: a command, where one does it.
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
        Empty if the store is complete and undamaged.

    Raises
    ------
    StoreNotFoundError, StoreError
        If there is no store at `url`.
    """
    store = Store.open(url)
    return [problem for slide_id in store.slide_ids() for problem in _check_slide(store, slide_id, deep=deep)]


def _check_slide(store: Store, slide_id: str, *, deep: bool) -> Iterator[Problem]:
    embed_again = "run the same histosge embed again"
    attrs = read_attrs(store.location, slide_id).get("slide")
    if not attrs:
        yield Problem(slide_id, "the slide's group has no slide attributes", embed_again)
        return
    wanted = {"source", "size_px", "mpp", "fingerprint"}
    if wanted - set(attrs):
        yield Problem(
            slide_id, f"slide attributes lack {sorted(wanted - set(attrs))}", _remove_command(store, slide_id)
        )
    for grid_key in store.location.folders(slide_id):
        if is_segment(grid_key):
            yield from _check_grid(store, slide_id, grid_key, deep=deep)


def _check_grid(store: Store, slide_id: str, grid_key: str, *, deep: bool) -> Iterator[Problem]:
    path = grid_path(slide_id, grid_key)
    attrs = read_attrs(store.location, path)
    if not attrs.get("grid"):
        yield Problem(path, "the grid was not written completely", "run the same histosge embed again")
        return
    remove_it = _remove_command(store, slide_id, grid_key)
    grid = PatchGrid.from_attrs(attrs["grid"])
    if grid.spec.key != grid_key:
        yield Problem(path, f"attributes describe grid {grid.spec.key}", remove_it)
    arrays: dict[str, Any] = {}
    for name, (dims, dtype) in GRID_ARRAYS.items():
        try:
            array = zarr.open_array(store.location.zarr(read_only=True), path=f"{path}/{name}", mode="r")
            values = np.asarray(array[...])
        except FileNotFoundError:
            yield Problem(f"{path}/{name}", "the array is missing", remove_it)
            continue
        except AccessError:
            raise  # a refusal of the server's says nothing about the array
        except ValueError as error:  # a checksum that does not fit, or a shape that cannot be decoded
            yield Problem(f"{path}/{name}", f"damaged: {first_line(error)}", remove_it)
            continue
        sizes = {"y": grid.n_rows, "x": grid.n_cols, "channel": 3}
        expected = tuple(sizes[dim] for dim in dims)
        if values.shape != expected or values.dtype != dtype:
            what = f"is {values.dtype} {values.shape}, should be {dtype} {expected}"
            yield Problem(f"{path}/{name}", what, remove_it)
            continue
        arrays[name] = values
    if set(arrays) != set(GRID_ARRAYS):
        return
    # Compared exactly, since they were computed from the same attributes by the same code.
    for name, centres in (("y", grid.y_um), ("x", grid.x_um)):
        if not np.array_equal(arrays[name], centres):
            yield Problem(f"{path}/{name}", "coordinates disagree with the grid's attributes", remove_it)
    stored = StoredGrid(slide_id, grid, arrays["tissue"], arrays["rgb"])
    for encoder_slug in store.encoder_slugs(slide_id, grid_key):
        yield from _check_embedding(store, stored, encoder_slug, deep=deep)


def _check_embedding(store: Store, stored: StoredGrid, encoder_slug: str, *, deep: bool) -> Iterator[Problem]:
    grid_key = stored.grid.spec.key
    path = f"{grid_path(stored.slide_id, grid_key)}/{encoder_slug}/embedding"
    remove_it = _remove_command(store, stored.slide_id, grid_key, encoder_slug)
    try:
        array = BlockArray.open(store.location, path)
    except AccessError:
        raise
    except (FeatureStoreError, ValueError, KeyError, TypeError) as error:
        yield Problem(path, f"the array's metadata cannot be read: {first_line(error)}", remove_it)
        return
    attrs = array.attrs.get("encoder") or {}
    yield from _check_identity(path, attrs, encoder_slug, remove_it)
    expected = (*stored.grid.shape, attrs.get("dim", array.shape[2]))
    if array.shape != expected or array.dtype != np.float16 or array.dims != EMBEDDING_DIMS:
        what = f"is {array.dtype} {array.shape} {array.dims}, should be float16 {expected} {EMBEDDING_DIMS}"
        yield Problem(path, what, remove_it)
        return
    planned = stored.planned(array.block_shape)
    embed_again = "run the same histosge embed again"
    missing = array.missing(planned)
    for block in missing:
        yield Problem(f"{path}/c/{block.index[0]}/{block.index[1]}", "the block is missing", embed_again)
    extra = array.done() - {block.index for block in planned}
    for index in sorted(extra):
        yield Problem(f"{path}/c/{index[0]}/{index[1]}", "a block without tissue has an object", remove_it)
    if deep:
        yield from _check_blocks(array, stored, [b for b in planned if b not in set(missing)], embed_again)


def _check_identity(path: str, attrs: dict[str, Any], encoder_slug: str, remove_it: str) -> Iterator[Problem]:
    # A fingerprint alone could be copied from another encoder: it must be that of the facts beside it.
    missing = {"key", "dim", "facts", "fingerprint"} - set(attrs)
    if missing:
        yield Problem(path, f"encoder attributes lack {sorted(missing)}", remove_it)
        return
    identity = EncoderIdentity(attrs["key"], int(attrs["dim"]), attrs["facts"])
    if identity.fingerprint != attrs["fingerprint"]:
        what = (
            f"fingerprint {attrs['fingerprint'][:16]} is not that of its facts, {identity.fingerprint[:16]}"
        )
        yield Problem(path, what, remove_it)
    if slug(identity.key) != encoder_slug:
        yield Problem(path, f"embeddings of {identity.key!r} are stored under {encoder_slug!r}", remove_it)


def _check_blocks(
    array: BlockArray, stored: StoredGrid, blocks: list[Any], embed_again: str
) -> Iterator[Problem]:
    tissue = stored.is_tissue
    for block in blocks:
        path = f"{array.path}/c/{block.index[0]}/{block.index[1]}"
        replace_it = f"remove {path}, then {embed_again}"
        try:
            values = array.read(block.rows, block.cols)
        except AccessError:
            raise
        except (ValueError, RuntimeError) as error:
            yield Problem(path, f"damaged: {first_line(error)}", replace_it)
            continue
        background = ~tissue[block.slices]
        if np.isfinite(values[background]).any():
            yield Problem(path, "background patches hold numbers; they should be NaN", replace_it)
        if np.isinf(values).any():
            yield Problem(
                path, f"{int(np.isinf(values).any(axis=2).sum())} patches hold infinity", replace_it
            )


def _remove_command(store: Store, slide_id: str, grid_key: str = "", encoder_slug: str = "") -> str:
    command = f"histosge rm {store.location.label} --slide {slide_id}"
    command += f" --grid {grid_key}" if grid_key else ""
    return command + (f" --encoder {encoder_slug}" if encoder_slug else "")
