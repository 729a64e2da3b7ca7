"""Which blocks of a slide one task of a cluster reads, and which it predicts.

A halo spans several blocks, so tasks that each read their own would read most blocks several times: with blocks of 32
patches and a halo of 17, a row of blocks needs the two rows beside it, too. Where a model reduces embeddings to fewer
numbers, these go from the worker that read a block to those that need them, and every stored block is read once. Where it
does not, embeddings themselves would have to travel, which costs more than to read them again; tasks are then so large
that at most half as many blocks again are read.

Terms
    piece    blocks of one slide that one task predicts
    reading  blocks of one slide that one task reads for the pieces that need them
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from featurestore.blocks import Block
from histosge.data.embedded_slide import EmbeddedSlide, halo_patches, touched_indices

PIECE_BLOCKS = 8
"""Blocks of one task, neighbours in one row of blocks: half a second of work for 1,000 genes, against some milliseconds
that a task costs the scheduler, and enough tasks of a slide of 10,000 patches to keep several workers busy."""
SMALL_SLIDE_BLOCKS = 16
"""Blocks of a slide that one task predicts whole: there is work enough for several workers in other slides, and what tasks
cost, and patches that travel between them, took half as long again as the prediction itself."""
ROWS_PER_HALO = 4
"""Rows of blocks in a task that reads its halo itself, for each row that the halo reaches on either side: at most half
as many blocks again are read."""

Key = tuple[int, int]
"""Row of blocks, and number of the reading in it."""


@dataclass(frozen=True)
class Piece:
    """What one task predicts.

    Parameters
    ----------
    blocks
        In row-major order.
    readings
        Keys of those that it needs; empty where it reads its blocks and their halo itself.
    """

    blocks: tuple[Block, ...]
    readings: tuple[Key, ...] = ()


@dataclass(frozen=True)
class Pieces:
    """All tasks of a slide.

    Parameters
    ----------
    pieces
        From top to bottom.
    readings
        Blocks with tissue that some piece needs, by key.
    """

    pieces: tuple[Piece, ...]
    readings: dict[Key, tuple[Block, ...]]


def cut_into_pieces(
    slide: EmbeddedSlide, missing: Sequence[Block], halo_um: float, *, is_reduced: bool
) -> Pieces:
    """Share out the blocks of a slide that are to be predicted.

    The cut depends on the slide and on what is missing alone, and no block's values depend on the cut.

    Parameters
    ----------
    missing
        In row-major order.
    halo_um
        Of the model.
    is_reduced
        Whether the model reduces embeddings as they are read.
    """
    if halo_patches(slide, halo_um) == 0:
        return Pieces(tuple(Piece(blocks) for blocks in _grouped(missing).values()), {})
    if not is_reduced:
        halo_rows = -(-halo_patches(slide, halo_um) // slide.array.block_shape[0])
        bands = dict[int, list[Block]]()
        for block in missing:
            bands.setdefault(block.index[0] // (ROWS_PER_HALO * halo_rows), []).append(block)
        return Pieces(tuple(Piece(tuple(band)) for band in bands.values()), {})
    planned = {block.index: block for block in slide.stored.planned(slide.array.block_shape)}
    if missing and len(planned) <= SMALL_SLIDE_BLOCKS:
        return Pieces((Piece(tuple(missing)),), {})
    pieces, needed = list[Piece](), set[tuple[int, int]]()
    for blocks in _grouped(missing).values():
        touched = {i for block in blocks for i in touched_indices(slide, block, halo_um) if i in planned}
        needed |= touched
        pieces.append(Piece(blocks, tuple(sorted({_key(index) for index in touched}))))
    return Pieces(tuple(pieces), _grouped(planned[index] for index in sorted(needed)))


def _grouped(blocks: Iterable[Block]) -> dict[Key, tuple[Block, ...]]:
    groups = dict[Key, list[Block]]()
    for block in blocks:
        groups.setdefault(_key(block.index), []).append(block)
    return {key: tuple(group) for key, group in groups.items()}


def _key(index: tuple[int, int]) -> Key:
    return index[0], index[1] // PIECE_BLOCKS
