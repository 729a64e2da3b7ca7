"""Whole blocks straight from their objects: one read of a file or one GET, into memory that is there already.

Our arrays store a block as its values and a CRC-32C after them, so a reader needs no pipeline of codecs. The
checksum is always compared. Arrays that are stored otherwise (sharded, compressed) are read by zarr; the
values are the same either way.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import StoreError
from featurestore.storage.block_array import BlockArray

CHECKSUM_BYTES = 4


class Cache(Protocol):
    """Keeps objects of remote stores, see `featurestore.storage.block_cache`."""

    def read(self, key: str) -> bytes | None:
        """Return an object, or None if it is not here."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Keep an object."""
        ...


class Loaded(NamedTuple):
    """A block as it was read: values of `RawBlocks.slot_shape`, and their checksum where zarr did not read them."""

    values: NDArray[Any]
    checksum: int | None


class RawBlocks:
    """Reads the blocks of one array; safe to use from several threads.

    Parameters
    ----------
    array
        With one object a block.
    cache
        For remote stores; None fetches every time.

    Raises
    ------
    StoreError
        If the array splits a block into several objects.
    """

    def __init__(self, array: BlockArray, cache: Cache | None = None) -> None:
        if array.n_groups != 1:
            raise StoreError(f"{array.path} keeps a block in {array.n_groups} objects; raw blocks have one")
        self._array, self._location = array, array.location
        self._cache = None if self._location.is_local else cache
        self._versions: dict[tuple[int, ...], str] | None = None
        self.is_raw = array.is_raw

    @property
    def slot_shape(self) -> tuple[int, int, int]:
        """Shape of one stored block, ``(rows, cols, dim)``: also at the edges, where it is padded with NaN."""
        return (*self._array.block_shape, self._array.shape[2])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return self._array.dtype

    def read(self, block: Block) -> NDArray[Any]:
        """Return one block, ``block.shape + (dim,)``; NaN throughout where nothing was written.

        Raises
        ------
        StoreError
            If the object is damaged.
        """
        loaded = self.load(block, np.empty(self.slot_shape, self.dtype))
        values = loaded.values if loaded else np.full(self.slot_shape, np.nan, self.dtype)
        return values[: block.shape[0], : block.shape[1]]

    def load(self, block: Block, slot: NDArray[Any]) -> "Loaded | None":
        """Return one block, padding and all; None where nothing was written.

        Parameters
        ----------
        slot
            A contiguous array of `slot_shape` to read a file into; what was fetched from a remote store
            is not copied there, and is read-only.

        Raises
        ------
        StoreError
            If the object is damaged.
        """
        if slot.shape != self.slot_shape or slot.dtype != self.dtype or not slot.flags.c_contiguous:
            raise ValueError(
                f"a slot is contiguous {self.dtype} {self.slot_shape}, not {slot.dtype} {slot.shape}"
            )
        if not self.is_raw:
            return Loaded(self._read_by_zarr(block, slot), None)
        if self._location.is_local:
            body = slot.reshape(-1).view(np.uint8)
            stored = self._read_file(block, body)
        else:
            body, stored = self._fetch(block, slot.nbytes)
        if stored is None:
            return None
        computed = google_crc32c.value(body)
        if computed != stored:
            raise StoreError(
                f"{self._label(block)} is damaged: its checksum is {stored:08x}, its values give {computed:08x}; "
                "remove that object and embed again"
            )
        return Loaded(body.view(self.dtype).reshape(self.slot_shape), stored)

    def _read_by_zarr(self, block: Block, slot: NDArray[Any]) -> NDArray[Any]:
        slot.fill(np.nan)
        slot[: block.shape[0], : block.shape[1]] = self._array.read(block.rows, block.cols)
        return slot

    def _read_file(self, block: Block, body: NDArray[np.uint8]) -> int | None:
        path = Path(self._location.path(self._array.object_path(block.index)))
        tail = bytearray(CHECKSUM_BYTES)
        try:
            file = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        try:
            self._check_size(block, os.fstat(file).st_size, len(body))
            whole = body.data
            done = os.readv(file, [whole, tail])
            while done < len(body):  # a signal, or a read beyond 2 GB
                done += os.readv(file, [whole[done:], tail])
            if done < len(body) + CHECKSUM_BYTES:
                tail = bytearray(os.pread(file, CHECKSUM_BYTES, len(body)))
        finally:
            os.close(file)
        return int.from_bytes(tail, "little")

    def _fetch(self, block: Block, size: int) -> tuple[NDArray[np.uint8], int | None]:
        """Return the bytes of the values, and their checksum as stored: None where there is no object."""
        data = self._cached(block) if self._cache is not None else self._get(block)
        if data is None:
            return np.empty(0, np.uint8), None
        self._check_size(block, len(data), size)
        return np.frombuffer(data, np.uint8, size), int.from_bytes(data[-CHECKSUM_BYTES:], "little")

    def _get(self, block: Block) -> bytes | None:
        try:
            return self._location.read_bytes(self._array.object_path(block.index))
        except FileNotFoundError:
            return None

    def _cached(self, block: Block) -> bytes | None:
        assert self._cache is not None
        if self._versions is None:  # one listing; a copy of an older version has another key
            entries = self._array.entries().items()
            self._versions = {index: f"{entry.size} {entry.modified}" for index, entry in entries}
        version = self._versions.get((*block.index, 0))
        if version is None:
            return None
        key = f"{self._label(block)}\n{version}"
        data = self._cache.read(key)
        if data is not None and _is_whole(data):
            return data
        data = self._get(block)
        if data is not None and _is_whole(data):
            self._cache.write(key, data)
        return data

    def _check_size(self, block: Block, size: int, values: int) -> None:
        if size != values + CHECKSUM_BYTES:
            raise StoreError(
                f"{self._label(block)} is damaged: it has {size} bytes, not {values + CHECKSUM_BYTES}; "
                "remove that object and embed again"
            )

    def _label(self, block: Block) -> str:
        return f"{self._location.label}/{self._array.object_path(block.index)}"


def _is_whole(data: bytes) -> bool:
    """Whether an object's checksum is that of its values."""
    values = np.frombuffer(data, np.uint8)[:-CHECKSUM_BYTES]
    return bool(google_crc32c.value(values) == int.from_bytes(data[-CHECKSUM_BYTES:], "little"))
