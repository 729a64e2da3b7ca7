"""One slide's stored embedding as patches in memory: all of them, or block by block with a halo.

Stored blocks are read whole; patches without tissue or without an embedding (NaN) are left out here,
so that no model ever sees them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.byte_cache import ByteCache
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import StoreError
from featurestore.names import slug
from featurestore.storage.block_array import BlockArray, check_whole
from featurestore.storage.float16 import nan_rows, to_float32
from featurestore.storage.store import Store, StoredGrid
from histosge.data.joined_encoders import join_identities, read_at
from histosge.data.sections import Patches

Reduce = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""Turns embeddings ``(n, dim)`` into fewer numbers each, ``(n, fewer)``."""


@dataclass(frozen=True)
class EmbeddedSlide:
    """One slide's embedding, opened: what training and prediction read from.

    Parameters
    ----------
    stored
        Grid, tissue and thumbnail.
    array
        The embedding, ``(y, x, feature)``.
    identity
        Which encoder made it.
    fingerprint
        Of the slide's file.
    others
        The same slide by further encoders, whose embeddings are put beside this one's: `identity` is then that of all.
    """

    stored: StoredGrid
    array: BlockArray
    identity: EncoderIdentity
    fingerprint: str
    others: tuple["EmbeddedSlide", ...] = ()

    @property
    def slide_id(self) -> str:
        """Whose embedding this is."""
        return self.stored.slide_id


def open_embedded(
    store: Store,
    slide_id: str,
    grid_key: str | None,
    encoder_key: str | None,
    others: Sequence[tuple[str | None, str]] = (),
) -> EmbeddedSlide:
    """Open a slide's embedding; grid and encoder may be left out where there is only one.

    Parameters
    ----------
    others
        Grid and encoder of further embeddings, which are put beside the first on its grid; see
        `histosge.data.joined_encoders`. None as a grid: the first one's where it holds the encoder, else the only one.

    Raises
    ------
    AmbiguousSelectionError
        If several fit: they are listed.
    StoreError
        If none fits.
    """
    grid, encoder = store.select(grid_key, encoder_key, slide_id)
    first = EmbeddedSlide(
        store.grid(slide_id, grid),
        store.embedding(slide_id, grid, encoder),
        store.identity(slide_id, grid, encoder),
        store.slide(slide_id).fingerprint,
    )
    if not others:
        return first
    found = tuple(
        open_embedded(store, slide_id, other_grid or _grid_with(store, slide_id, grid, key), key)
        for other_grid, key in others
    )
    identity = join_identities([(slide.identity, slide.stored.grid) for slide in (first, *found)])
    return replace(first, identity=identity, others=found)


def _grid_with(store: Store, slide_id: str, grid: str, encoder_key: str) -> str | None:
    """Return the grid if it holds an encoder, else None."""
    return grid if slug(encoder_key) in store.encoder_slugs(slide_id, grid) else None


def check_complete(slide: EmbeddedSlide) -> None:
    """Refuse a slide that lacks blocks, of any of its encoders.

    Raises
    ------
    StoreError
        With the number of blocks.
    """
    for each in (slide, *slide.others):
        check_whole(each.array, each.stored.planned(each.array.block_shape), each.slide_id)


def load_patches(slide: EmbeddedSlide) -> Patches:
    """Read all tissue patches of a slide, block by block.

    Raises
    ------
    StoreError
        If blocks are missing: nothing would show later that a model was trained on half a slide.
    """
    planned = slide.stored.planned(slide.array.block_shape)
    check_complete(slide)
    return join_parts(slide, [read_tissue(slide, block) for block in planned])


Part = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]


def read_tissue(slide: EmbeddedSlide, block: Block) -> Part:
    """Read rows, cols and embeddings of a block's patches that have one.

    Raises
    ------
    StoreError
        If the block is not there any more: its patches would pass for unreadable ones, and their map for whole.
    """
    rows, cols = np.nonzero(slide.stored.is_tissue[block.slices])
    values = slide.array.read_block(block)[rows, cols]
    readable = ~nan_rows(values)
    # Almost always all are: indexing would copy every embedding.
    if not readable.all():
        # Looked for only where no patch is readable: a request for every block would double what reading costs.
        if not readable.any() and not slide.array.location.exists(slide.array.object_path(block.index)):
            raise StoreError(
                f"block {block.index} of slide {slide.slide_id!r} was removed while the slide was read; "
                "run histosge embed again"
            )
        rows, cols, values = rows[readable], cols[readable], values[readable]
    rows, cols = rows + block.rows[0], cols + block.cols[0]
    return _with_others(slide, (rows, cols, _as_float32(values)))


def _with_others(slide: EmbeddedSlide, part: Part) -> Part:
    """Put the embeddings of a slide's other encoders beside those of a part; patches that lack one are left out."""
    if not slide.others:
        return part
    rows, cols, first = part
    grid = slide.stored.grid
    values = np.hstack([first, *(read_at(s.stored, s.array, grid, rows, cols) for s in slide.others)])
    there = ~nan_rows(values)
    return rows[there], cols[there], values[there]


def _as_float32(values: NDArray[np.float16]) -> NDArray[np.float32]:
    try:
        return to_float32(values)
    except ValueError:  # infinities: rare, and kept as they are
        return values.astype(np.float32)


def join_parts(slide: EmbeddedSlide, parts: list[Part]) -> Patches:
    """Put the parts of blocks together as patches of the slide."""
    dim = parts[0][2].shape[1] if parts else slide.identity.dim
    empty = (np.empty(0, np.int64), np.empty(0, np.int64), np.empty((0, dim), np.float32))
    rows, cols, embedding = (np.concatenate(arrays) for arrays in zip(empty, *parts, strict=True))
    share = (slide.stored.tissue[rows, cols] / np.float32(255)).astype(np.float32)
    return Patches.on_grid(slide.slide_id, slide.stored.grid, rows, cols, embedding, share)


@dataclass(frozen=True)
class Window:
    """The patches of one block with what lies around them.

    Parameters
    ----------
    block
        The block to predict.
    patches
        Its patches and those within the halo.
    own
        Which of `patches` are the block's.
    """

    block: Block
    patches: Patches
    own: NDArray[np.bool_]


def stream_windows(
    slide: EmbeddedSlide, blocks: Sequence[Block], halo_um: float, reduce: Reduce | None = None
) -> Iterator[Window]:
    """Read blocks in row-major order with a halo.

    Memory holds the rows of blocks that a halo spans, not the slide, so each stored block is read once.

    Parameters
    ----------
    halo_um
        Patches up to this far from a block are in its window, in microns.
    reduce
        Applied to embeddings as they are read, once for all windows that they are in.
    """
    planned = {b.index: b for b in slide.stored.planned(slide.array.block_shape)}
    # The block's own row and those above and below that the halo reaches, and one more: while a row of windows is gone
    # through, the blocks of the row before are still needed on the right and those of the next are read on the left.
    rows_of_blocks = 2 + 2 * -(-halo_patches(slide, halo_um) // slide.array.block_shape[0])
    n_blocks = rows_of_blocks * -(-slide.stored.grid.n_cols // slide.array.block_shape[1])
    cache: ByteCache[Part] = ByteCache(n_blocks * _block_bytes(slide, reduce), _part_bytes)
    for block in blocks:
        touched = (planned.get(index) for index in touched_indices(slide, block, halo_um))
        found = (cache.get(b.index, partial(read_part, slide, b, reduce)) for b in touched if b is not None)
        yield cut_window(slide, block, halo_um, found)


def read_part(slide: EmbeddedSlide, block: Block, reduce: Reduce | None) -> Part:
    """Read a block's patches as `read_tissue` does, with their embeddings reduced."""
    rows, cols, embedding = read_tissue(slide, block)
    return rows, cols, embedding if reduce is None else reduce(embedding)


def touched_indices(slide: EmbeddedSlide, block: Block, halo_um: float) -> Iterator[tuple[int, int]]:
    """Yield the indices of the blocks that a block's window touches, also of those that hold no tissue."""
    return _indices(*_window_bounds(slide, block, halo_um), slide.array.block_shape)


def cut_window(slide: EmbeddedSlide, block: Block, halo_um: float, parts: Iterable[Part]) -> Window:
    """Put a block's window together from the parts of the blocks that it touches, in row-major order."""
    rows, cols = _window_bounds(slide, block, halo_um)
    patches = join_parts(slide, [clip_part(part, rows, cols) for part in parts])
    own = _inside(patches.rows, block.rows) & _inside(patches.cols, block.cols)
    return Window(block, patches, own)


def halo_patches(slide: EmbeddedSlide, halo_um: float) -> int:
    """Return how many patches of a slide's grid a halo reaches."""
    return int(np.ceil(halo_um / slide.stored.grid.stride_um))


def _window_bounds(
    slide: EmbeddedSlide, block: Block, halo_um: float
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the rows and columns of a block's window, which may reach beyond the grid."""
    halo = halo_patches(slide, halo_um)
    return (block.rows[0] - halo, block.rows[1] + halo), (block.cols[0] - halo, block.cols[1] + halo)


def _part_bytes(part: Part) -> int:
    return sum(array.nbytes for array in part)


def _block_bytes(slide: EmbeddedSlide, reduce: Reduce | None) -> int:
    """Return the bytes of a `Part` when all patches of its block are tissue."""
    embedding = np.zeros((1, slide.identity.dim), np.float32)
    place = np.zeros(2, np.int64)
    patch_bytes = place.nbytes + (embedding if reduce is None else reduce(embedding)).nbytes
    return int(np.prod(slide.array.block_shape)) * patch_bytes


def _indices(
    rows: tuple[int, int], cols: tuple[int, int], block_shape: tuple[int, int]
) -> Iterator[tuple[int, int]]:
    """Yield the indices of the blocks that a rectangle of patches touches, in row-major order."""
    for i in range(max(0, rows[0]) // block_shape[0], (rows[1] - 1) // block_shape[0] + 1):
        for j in range(max(0, cols[0]) // block_shape[1], (cols[1] - 1) // block_shape[1] + 1):
            yield i, j


def _inside(values: NDArray[np.int64], bounds: tuple[int, int]) -> NDArray[np.bool_]:
    return (values >= bounds[0]) & (values < bounds[1])


def clip_part(part: Part, rows: tuple[int, int], cols: tuple[int, int]) -> Part:
    """Return what of a part lies in a range of rows and cols."""
    keep = _inside(part[0], rows) & _inside(part[1], cols)
    return part[0][keep], part[1][keep], part[2][keep]
