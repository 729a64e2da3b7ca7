"""A ``(y, x, channel)`` array in which one block of patches is one stored object.

Embeddings and expression maps are both such arrays. A block is done if its objects exist: `done` lists them, and
`missing` subtracts them from the planned ones. No write reads, and no two blocks share an object.

Terms
    block   a rectangle of patches with all its channels
    object  what the store holds under one key: a block, or one group of its channels where they are split
"""

import json
import math
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec

from featurestore.blocks import Block
from featurestore.documents import DocumentError
from featurestore.errors import StoreError, first_line
from featurestore.location import Entry, Location
from featurestore.storage.coding import Coding, parse_coding
from featurestore.storage.layout import chunk_index
from featurestore.storage.raw_read import CHECKSUM_BYTES, Cache, RawBlocks
from featurestore.storage.stored_documents import check_bounds
from featurestore.storage.zarr_metadata import ZARR_ERRORS, open_array

Shape3 = tuple[int, int, int]
CODING = "coding"
"""Attribute of an array that is not stored as float16 values as they are."""
FLOAT16 = Coding()
_CHUNK_KEYS = {"name": "default", "configuration": {"separator": "/"}}


class BlockArray:
    """One array of a store, read and written by whole blocks.

    Parameters
    ----------
    location, path
        Where the store is, and the array in it.
    array
        The open zarr array, chunked ``(block_rows, block_cols, channel_group)``.

    Raises
    ------
    DocumentError
        If it is not three-dimensional, or of sizes that no slide needs.
    """

    def __init__(self, location: Location, path: str, array: "zarr.Array[Any]") -> None:
        self.location = location
        self.path = path
        check_bounds(f"{location.label}/{path}", array.shape, array.chunks, np.dtype(array.dtype))
        # By default zarr does not write a chunk that holds only the fill value. A block whose patches all failed is
        # NaN throughout and must be written, or it would never be done. The setting is not stored in the array's
        # metadata, so it is made here, where every array that is created or opened passes.
        self._array = array.with_config({"write_empty_chunks": True})

    @classmethod
    def create(
        cls,
        location: Location,
        path: str,
        *,
        shape: Shape3,
        chunks: Shape3,
        dtype: str,
        dims: tuple[str, str, str],
        attrs: dict[str, Any],
        coding: Coding = FLOAT16,
    ) -> "BlockArray":
        """Create an empty array: unwritten blocks read as NaN.

        Parameters
        ----------
        coding
            How values are coded; it is recorded where it is not the default.

        Raises
        ------
        zarr.errors.ContainsArrayError
            If there is one already.
        """
        array = zarr.create_array(
            location.zarr(),
            name=path,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            fill_value=float("nan"),
            # The checksum, since without it a flipped byte is read silently. No compression unless it is asked for: of
            # unrounded values it saves a tenth, and costs half of the writing speed, see docs/results.md.
            compressors=coding.compressors,
            dimension_names=dims,
            attributes=attrs if coding == FLOAT16 else {**attrs, CODING: coding.name},
        )
        return cls(location, path, array)

    @classmethod
    def open(cls, location: Location, path: str, *, read_only: bool = True) -> "BlockArray":
        """Open an array that exists.

        Raises
        ------
        StoreError
            If there is none, its metadata are damaged, or it is not three-dimensional.
        """
        array = open_array(location, path, read_only=read_only)
        return cls(location, path, array)

    @property
    def shape(self) -> Shape3:
        """``(n_rows, n_cols, n_channels)``."""
        return self._array.shape  # type: ignore[return-value]  # ndim was checked

    @property
    def dims(self) -> tuple[str | None, ...]:
        """Names of the dimensions, as stored."""
        names = self._array.metadata.dimension_names if self._array.metadata.zarr_format == 3 else None
        return tuple(names or ())

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return np.dtype(self._array.dtype)

    @property
    def block_shape(self) -> tuple[int, int]:
        """Patches in one block, ``(rows, cols)``."""
        rows, cols, _ = self._array.chunks
        return rows, cols

    @property
    def object_shape(self) -> Shape3:
        """Shape of one object, ``(rows, cols, channels)``: also at the edges, where it is padded with NaN."""
        return self._array.chunks  # type: ignore[return-value]  # ndim was checked

    @property
    def n_groups(self) -> int:
        """Objects in one block: 1, unless channels are split into groups."""
        return max(1, math.ceil(self.shape[2] / self._array.chunks[2]))

    @cached_property
    def is_raw(self) -> bool:
        """Whether an object is its little-endian values, whole, and their CRC-32C: no more, no less."""
        match self._codecs():
            case (BytesCodec() as values, Crc32cCodec()):
                return self._is_little_endian(values)
        return False

    @cached_property
    def is_blosc(self) -> bool:
        """Whether an object is its little-endian values, compressed by Blosc, and the CRC-32C of the compressed bytes."""
        match self._codecs():
            case (BytesCodec() as values, BloscCodec(), Crc32cCodec()):
                return self._is_little_endian(values)
        return False

    def _codecs(self) -> tuple[Any, ...]:
        """The codecs, of an array whose chunks are where format 3 has them by default."""
        metadata = self._array.metadata
        if metadata.zarr_format != 3 or metadata.chunk_key_encoding.to_dict() != _CHUNK_KEYS:
            return ()
        return tuple(metadata.codecs)

    def _is_little_endian(self, codec: BytesCodec) -> bool:
        return self.dtype.itemsize == 1 or getattr(codec.endian, "value", codec.endian) == "little"

    @cached_property
    def coding(self) -> Coding:
        """How values are coded, as the array's attribute says.

        Raises
        ------
        DocumentError
            If the attribute names no coding.
        """
        name = self._array.attrs.get(CODING)
        if name is None:
            return FLOAT16
        try:
            return parse_coding(str(name))
        except StoreError as error:
            raise DocumentError(
                f"{self.location.label}/{self.path} is damaged: attributes.{CODING}: {error}"
            ) from error

    @property
    def has_checksum(self) -> bool:
        """Whether an object holds a checksum of its values, so that a flipped bit is not read as a value."""
        return '"crc32c"' in self.codecs_text

    @property
    def codecs_text(self) -> str:
        """The codecs as they stand in the metadata, in one text: those of a shard stand in another's configuration."""
        return json.dumps(self._array.metadata.to_dict().get("codecs", []), default=str)

    def object_path(self, index: tuple[int, int], group: int = 0) -> str:
        """Return the path of one of a block's objects below the store's root."""
        return f"{self.path}/c/{index[0]}/{index[1]}/{group}"

    @property
    def attrs(self) -> dict[str, Any]:
        """The array's attributes."""
        return dict(self._array.attrs)

    def write(self, block: Block, values: NDArray[Any]) -> None:
        """Write one block, whole, without reading; values are rounded where the array's coding says so.

        Parameters
        ----------
        block
            From `plan_blocks` of this array's grid and block shape.
        values
            Shape ``block.shape + (n_channels,)``.

        Raises
        ------
        StoreError
            If the values' shape is another, or the block is not one of this array's.
        """
        expected = (*block.shape, self.shape[2])
        if values.shape != expected:
            raise StoreError(f"cannot write block {block.index}: its shape is {expected}, not {values.shape}")
        # zarr would write a shifted rectangle by reading and rewriting the objects that it touches: two workers that
        # do so at once lose each other's patches.
        start = (block.index[0] * self.block_shape[0], block.index[1] * self.block_shape[1])
        if (block.rows[0], block.cols[0]) != start:
            raise StoreError(
                f"cannot write rows {block.rows}, cols {block.cols} as block {block.index}: "
                f"that object starts at {start}; take blocks from plan_blocks()"
            )
        values = self.coding.round(values.astype(self.dtype, copy=False))
        if self.location.is_local and self.is_raw and not self._array.read_only:
            self._write_raw(block, values)
        else:
            self._array[(*block.slices, slice(None))] = values

    def _write_raw(self, block: Block, values: NDArray[Any]) -> None:
        """Write a block's objects without zarr, which hands each write to two other threads and waits for them.

        On cores that another process uses, each of these hand-overs waits for its turn: most of the time of a write.
        """
        channels = self.object_shape[2]
        for group in range(self.n_groups):
            part = values[:, :, group * channels : (group + 1) * channels]
            if part.shape != self.object_shape:  # at the edges an object is padded
                padded = np.full(self.object_shape, self._array.fill_value, self.dtype)
                padded[: part.shape[0], : part.shape[1], : part.shape[2]] = part
                part = padded
            body = np.ascontiguousarray(part, self.dtype.newbyteorder("<")).reshape(-1).view(np.uint8)
            checksum = google_crc32c.value(body).to_bytes(CHECKSUM_BYTES, "little")
            self.location.write_file(self.object_path(block.index, group), body.data, checksum)

    def read_block(
        self, block: Block, out: NDArray[Any] | None = None, *, group: int | None = None
    ) -> NDArray[Any]:
        """Read one block: several times as fast as `read`, and its checksum is always compared.

        Parameters
        ----------
        block
            From `plan_blocks` of this array's grid and block shape.
        out
            Memory to read an object into, contiguous, of `object_shape` and `dtype`: for loops that read block after
            block. Only where one object is read.
        group
            Only this group of channels, where they are split into groups.

        Returns
        -------
        numpy.ndarray
            ``block.shape + (n_channels,)``, NaN where nothing was written. A piece of `out`, or, of a remote store,
            read-only.

        Raises
        ------
        StoreError
            If an object is damaged.
        """
        if group is None and self.n_groups > 1:
            return np.concatenate([self.read_block(block, group=i) for i in range(self.n_groups)], axis=2)
        group = group or 0
        slot = np.empty(self.object_shape, self.dtype) if out is None else out
        loaded = self._reader.load(block, slot, group)
        if loaded is None:
            slot.fill(np.nan)
        values = slot if loaded is None else loaded.values
        # At the edges an object is padded: in rows, columns, and in the channels of the last group.
        channels = self.shape[2] - group * self.object_shape[2]
        return values[: block.shape[0], : block.shape[1], :channels]

    def reader(self, cache: Cache | None = None) -> RawBlocks:
        """Return what reads whole objects with their padding and checksum, for a loop that fills memory of its own.

        Parameters
        ----------
        cache
            Keeps objects of a remote store on the local disk.

        Raises
        ------
        StoreError
            If a block is more than one object.
        """
        if self.n_groups != 1:
            raise StoreError(f"{self.path} keeps a block in {self.n_groups} objects; read_block() joins them")
        return RawBlocks(self, cache)

    @cached_property
    def _reader(self) -> RawBlocks:
        return RawBlocks(self)

    def read(
        self, rows: tuple[int, int], cols: tuple[int, int], channels: slice = slice(None)
    ) -> NDArray[Any]:
        """Read any rectangle of patches by zarr, ``(rows, cols, channels)``; NaN where nothing was written.

        Raises
        ------
        DocumentError
            If an object is damaged.
        """
        try:
            return np.asarray(self._array[slice(*rows), slice(*cols), channels])
        except StoreError:
            raise
        except ZARR_ERRORS as error:
            raise DocumentError(
                f"{self.location.label}/{self.path} is damaged in rows {rows}, cols {cols}: {first_line(error)}; remove "
                "the block's object and run the command that wrote it again"
            ) from error

    def objects(self) -> dict[tuple[int, ...], int]:
        """Return chunk index -> bytes of every object that exists; one listing."""
        return {index: entry.size for index, entry in self.entries().items()}

    def entries(self) -> dict[tuple[int, ...], Entry]:
        """Return chunk index -> bytes and date of every object that exists; one listing."""
        indexed = ((chunk_index(name), entry) for name, entry in self.location.entries(self.path).items())
        return {index: entry for index, entry in indexed if index is not None}

    def done(self) -> set[tuple[int, int]]:
        """Return the indices of the blocks all of whose objects exist; one listing."""
        # A block of several objects is done with the last of them: a killed task may have written some.
        counts: dict[tuple[int, int], int] = {}
        for row, col, _ in self.objects():
            counts[row, col] = counts.get((row, col), 0) + 1
        return {index for index, count in counts.items() if count == self.n_groups}

    def missing(self, planned: Iterable[Block]) -> list[Block]:
        """Return the planned blocks that do not exist yet, in the order given."""
        done = self.done()
        return [block for block in planned if block.index not in done]

    def remove_block(self, block: Block) -> None:
        """Delete a block's objects, so that it is planned again."""
        for group in range(self.n_groups):
            self.location.remove(self.object_path(block.index, group))


def check_whole(array: BlockArray, planned: Sequence[Block], slide_id: str, command: str = "embed") -> None:
    """Refuse an array that lacks planned blocks: a result from half a slide would not say so.

    Parameters
    ----------
    planned
        The blocks that should exist.
    slide_id, command
        For the message: whose array it is, and the histosge command that writes it.

    Raises
    ------
    StoreError
        With the number of blocks that exist.
    """
    missing = array.missing(planned)
    if missing:
        raise StoreError(
            f"slide {slide_id!r} has {len(planned) - len(missing)} of {len(planned)} blocks; "
            f"finish it first: run the same histosge {command} again"
        )
