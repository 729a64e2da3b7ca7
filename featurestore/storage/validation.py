"""Check a store against its specification: every rule of docs/SPEC.md has its check here.

Nothing is repaired; each problem comes with the command that repairs it. Blocks are read by zarr alone, not by our own
reader, so that a store which passes can be read without us.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.documents import DocumentError, convert
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import AccessError, StoreError, first_line
from featurestore.grid import PatchGrid
from featurestore.location import Location, PathOrUrl
from featurestore.names import is_segment, slug
from featurestore.storage.block_array import CODING, BlockArray
from featurestore.storage.layout import (
    EMBEDDING_DIMS,
    FAILURES,
    GRID_ARRAYS,
    QUALITY,
    SPOTS,
    grid_path,
)
from featurestore.storage.spots import check_spots
from featurestore.storage.store import Store, StoredGrid
from featurestore.storage.stored_documents import EncoderAttrs, parse_grid
from featurestore.storage.zarr_metadata import document_label, open_array, read_attrs, read_values
from featurestore.tissue.flags import Flag, has_any


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


EMBED_AGAIN = "run the same histosge embed again"


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
    problems = list(check_stray_folders(store.location))
    for slide_id in store.slide_ids():
        if not store.location.exists(f"{slide_id}/zarr.json"):
            continue  # of a remote store it is not looked for, and it is among the stray folders
        problems += check_documents(
            _check_slide(store, slide_id, deep=deep), _remove_command(store, slide_id)
        )
    return problems


def check_documents(problems: Iterator[Problem], fix: str) -> Iterator[Problem]:
    """Yield the problems of a part of a store; a document that is damaged is one more, and ends that part."""
    try:
        yield from problems
    except DocumentError as error:
        # A document's error names the document and its field.
        where, _, what = str(error).partition(" is damaged: ")
        yield Problem(where, f"damaged: {what}" if what else "cannot be opened", fix)


def check_stray_folders(location: Location) -> Iterator[Problem]:
    """Yield the folders of a store that are no part of it."""
    for name in location.folders():
        if name != FAILURES and not (is_segment(name) and location.exists(f"{name}/zarr.json")):
            yield stray_folder(name)


def stray_folder(path: str) -> Problem:
    """Return that a folder is no part of a store."""
    return Problem(path, "the folder is no part of the store; nothing reads it", "remove it")


def _check_slide(store: Store, slide_id: str, *, deep: bool) -> Iterator[Problem]:
    if not read_attrs(store.location, slide_id).get("slide"):
        yield Problem(slide_id, "the slide's group has no slide attributes", EMBED_AGAIN)
        return
    store.slide(slide_id)  # its attributes are of the right types
    for grid_key in store.location.folders(slide_id):
        path = f"{slide_id}/{grid_key}"
        if is_segment(grid_key) and grid_key.startswith(SPOTS):
            slugs = store.encoder_slugs(slide_id, grid_key)
            problems = (
                Problem(where, what, "run the same histosge import again")
                for where, what in check_spots(store.location, slide_id, grid_key, slugs)
            )
            yield from check_documents(problems, _remove_command(store, slide_id, grid_key))
        elif is_segment(grid_key) and store.location.exists(f"{path}/zarr.json"):
            found = _check_grid(store, slide_id, grid_key, deep=deep)
            yield from check_documents(found, _remove_command(store, slide_id, grid_key))
        elif any(store.location.exists(f"{path}/{name}/zarr.json") for name in GRID_ARRAYS):
            yield Problem(path, "the grid was not written completely", EMBED_AGAIN)
        else:
            yield stray_folder(path)


def _check_grid(store: Store, slide_id: str, grid_key: str, *, deep: bool) -> Iterator[Problem]:
    path = grid_path(slide_id, grid_key)
    attrs = read_attrs(store.location, path)
    if not attrs.get("grid"):
        yield Problem(path, "the grid was not written completely", EMBED_AGAIN)
        return
    remove_it = _remove_command(store, slide_id, grid_key)
    grid = parse_grid(attrs["grid"], document_label(store.location, path))
    if grid.spec.key != grid_key:
        yield Problem(path, f"attributes describe grid {grid.spec.key}", remove_it)
    arrays: dict[str, NDArray[Any]] = {}
    yield from check_grid_arrays(store.location, path, grid, remove_it, arrays)
    for name in store.location.folders(path):
        if name in (*GRID_ARRAYS, QUALITY) or (
            is_segment(name) and store.location.exists(f"{path}/{name}/zarr.json")
        ):
            continue
        yield stray_folder(f"{path}/{name}")
    if set(arrays) != set(GRID_ARRAYS):
        return
    yield from _check_quality(store, slide_id, grid, attrs, arrays["tissue"])
    stored = StoredGrid(slide_id, grid, arrays["tissue"], arrays["rgb"])
    for encoder_slug in store.encoder_slugs(slide_id, grid_key):
        found = _check_embedding(store, stored, path, encoder_slug, deep=deep)
        yield from check_documents(found, _remove_command(store, slide_id, grid_key, encoder_slug))


def _check_quality(
    store: Store, slide_id: str, grid: PatchGrid, attrs: dict[str, Any], tissue: NDArray[np.uint8]
) -> Iterator[Problem]:
    """Yield what is wrong with a grid's flags; none at all is right, too."""
    path = f"{grid_path(slide_id, grid.spec.key)}/{QUALITY}"
    embed_anew = f"{_remove_command(store, slide_id, grid.spec.key)}, then {EMBED_AGAIN}"
    try:
        quality = store.quality(slide_id, grid.spec.key, grid.shape)
    except DocumentError as error:
        yield Problem(path, f"damaged: {first_line(error)}", embed_anew)
        return
    if quality is None:
        if attrs.get("skip"):
            yield Problem(path, f"the array is missing, and the grid skips {attrs['skip']}", embed_anew)
        return
    skipped = has_any(quality, Flag.SKIPPED)
    if n := int((tissue[skipped] > 0).sum()):
        yield Problem(path, f"{n} patches are skipped, and their share of tissue is not 0", embed_anew)
    if skipped.any() and not attrs.get("skip"):
        yield Problem(path, f"{int(skipped.sum())} patches are skipped, and the grid skips none", embed_anew)


def check_grid_arrays(
    location: Location, path: str, grid: PatchGrid, fix: str, arrays: dict[str, NDArray[Any]]
) -> Iterator[Problem]:
    """Yield what is wrong with the arrays of a grid.

    Parameters
    ----------
    path
        Of the grid's group.
    fix
        What to do.
    arrays
        Gets those that are as they should be, by name.
    """
    sizes = {"y": grid.n_rows, "x": grid.n_cols, "channel": 3}
    for name, (dims, dtype) in GRID_ARRAYS.items():
        # Compared exactly, since coordinates were computed from the same attributes by the same code.
        centres = {"y": grid.y_um, "x": grid.x_um}.get(name)
        try:
            array = open_array(location, f"{path}/{name}")
            values = read_values(
                array, f"{location.label}/{path}/{name}", tuple(sizes[d] for d in dims), "uf"
            )
        except DocumentError as error:
            yield Problem(f"{path}/{name}", f"damaged: {first_line(error)}", fix)
        except AccessError:
            raise  # a refusal of the server's says nothing about the array
        except StoreError:
            yield Problem(f"{path}/{name}", "the array is missing", fix)
        else:
            if values.dtype != dtype:
                yield Problem(f"{path}/{name}", f"is {values.dtype}, should be {dtype}", fix)
                continue
            if centres is not None and not np.array_equal(values, centres):
                yield Problem(f"{path}/{name}", "coordinates disagree with the grid's attributes", fix)
            arrays[name] = values


def _check_embedding(
    store: Store, stored: StoredGrid, grid_folder: str, encoder_slug: str, *, deep: bool
) -> Iterator[Problem]:
    path = f"{grid_folder}/{encoder_slug}/embedding"
    remove_it = _remove_command(store, stored.slide_id, grid_folder.rpartition("/")[2], encoder_slug)
    array = BlockArray.open(store.location, path)
    attrs = array.attrs.get("encoder") or {}
    if not isinstance(attrs, dict):
        yield Problem(path, "attributes.encoder is no object", remove_it)
        return
    yield from _check_identity(path, attrs, encoder_slug, remove_it)
    expected = (*stored.grid.shape, attrs.get("dim", array.shape[2]))
    if array.shape != expected or array.dtype != np.float16 or array.dims != EMBEDDING_DIMS:
        what = f"is {array.dtype} {array.shape} {array.dims}, should be float16 {expected} {EMBEDDING_DIMS}"
        yield Problem(path, what, remove_it)
        return
    if array.n_groups != 1:
        yield Problem(path, f"keeps a block in {array.n_groups} objects, should be 1", remove_it)
        return
    is_compressed = '"blosc"' in array.codecs_text or '"zstd"' in array.codecs_text
    if array.coding.compressed != is_compressed:
        what = f"attributes.{CODING} is {array.coding.name}, and objects are {'' if is_compressed else 'not '}compressed"
        yield Problem(path, what, remove_it)
    yield from check_array_objects(array, stored, EMBED_AGAIN, remove_it, deep=deep)


def check_array_objects(
    array: BlockArray, stored: StoredGrid, again: str, remove_it: str, *, deep: bool
) -> Iterator[Problem]:
    """Yield what is wrong with the objects of an array of blocks, and with how they are coded.

    Parameters
    ----------
    stored
        Grid and tissue, which say what should exist.
    again, remove_it
        What to do about a block that is missing or damaged, and about an array that cannot be mended.
    deep
        Read every object.
    """
    if not array.has_checksum:
        yield Problem(array.path, "objects have no checksum: a damaged one is read as values", remove_it)
    planned = stored.planned(array.block_shape)
    missing = array.missing(planned)
    for block in missing:
        yield Problem(f"{array.path}/c/{block.index[0]}/{block.index[1]}", "the block is missing", again)
    extra = array.done() - {block.index for block in planned}
    for index in sorted(extra):
        what = "a block without tissue has an object"
        yield Problem(f"{array.path}/c/{index[0]}/{index[1]}", what, remove_it)
    if deep:
        yield from _check_blocks(array, stored, [b for b in planned if b not in set(missing)], again)


def _check_identity(path: str, attrs: dict[str, Any], encoder_slug: str, remove_it: str) -> Iterator[Problem]:
    # A fingerprint alone could be copied from another encoder: it must be that of the facts beside it.
    missing = {"key", "dim", "facts", "fingerprint"} - set(attrs)
    if missing:
        yield Problem(path, f"encoder attributes lack {sorted(missing)}", remove_it)
        return
    convert(attrs, EncoderAttrs, path, at="attributes.encoder")
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
        except DocumentError as error:
            yield Problem(path, f"damaged: {first_line(error)}", replace_it)
            continue
        background = ~tissue[block.slices]
        if np.isfinite(values[background]).any():
            yield Problem(path, "background patches hold numbers; they should be NaN", replace_it)
        if not array.coding.is_rounded(values):
            what = f"holds values of more than the {array.coding.bits} bits that its coding has"
            yield Problem(path, what, replace_it)
        if np.isinf(values).any():
            yield Problem(
                path, f"{int(np.isinf(values).any(axis=2).sum())} patches hold infinity", replace_it
            )


def _remove_command(store: Store, slide_id: str, grid_key: str = "", encoder_slug: str = "") -> str:
    command = f"histosge rm {store.location.label} --slide {slide_id}"
    command += f" --grid {grid_key}" if grid_key else ""
    return command + (f" --encoder {encoder_slug}" if encoder_slug else "")
