"""How `BlockArray` reads an object: one read of a file or one GET, into memory that is allocated already.

Our arrays store an object as its values and a CRC-32C after them, so reading needs no pipeline of codecs, which makes
zarr read 2 MB chunks at a third of the page cache's speed. Where values are compressed, the CRC-32C is of the compressed
bytes. The checksum is always compared. Arrays that are stored otherwise (sharded, by other codecs) are read by zarr; the
values are the same either way. This is the only place that decides between the two.
"""

import os
import struct
from typing import Any, NamedTuple, Protocol

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import StoreError, first_line
from featurestore.location import Entry, Location

CHECKSUM_BYTES = 4
BLOSC_HEADER_BYTES = 16


class Cache(Protocol):
    """Keeps objects of remote stores; `featurestore.storage.block_cache.BlockCache` is one."""

    def read(self, key: str) -> bytes | None:
        """Return an object, or None if it is not here."""
        ...

    def write(self, key: str, data: bytes) -> None:
        """Keep an object."""
        ...


class ObjectArray(Protocol):
    """What a reader needs to know of an array; `featurestore.storage.block_array.BlockArray` is one."""

    location: Location
    path: str

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        ...

    @property
    def object_shape(self) -> tuple[int, int, int]:
        """Shape of one object, ``(rows, cols, channels)``."""
        ...

    @property
    def is_raw(self) -> bool:
        """Whether an object is its values and their CRC-32C, no more and no less."""
        ...

    @property
    def is_blosc(self) -> bool:
        """Whether an object is its values, compressed by Blosc, and the CRC-32C of the compressed bytes."""
        ...

    def object_path(self, index: tuple[int, int], group: int = 0) -> str:
        """Return the path of an object below the store's root."""
        ...

    def read(
        self, rows: tuple[int, int], cols: tuple[int, int], channels: slice = slice(None)
    ) -> NDArray[Any]:
        """Read a rectangle of patches by zarr."""
        ...

    def entries(self) -> dict[tuple[int, ...], Entry]:
        """List the objects that exist."""
        ...


class LoadedBlock(NamedTuple):
    """An object as it was read: values of `RawBlocks.slot_shape`, and their checksum where zarr did not read them."""

    values: NDArray[Any]
    checksum: int | None


class RawBlocks:
    """Reads the objects of one array; safe to use from several threads. Made by `BlockArray.reader`.

    Parameters
    ----------
    array
        Whose objects to read.
    cache
        For remote stores; None fetches every time.
    """

    def __init__(self, array: ObjectArray, cache: Cache | None = None) -> None:
        self._array, self._location = array, array.location
        self._cache = None if self._location.is_local else cache
        self._versions: dict[tuple[int, ...], str] | None = None
        self.is_raw, self._is_blosc = array.is_raw, array.is_blosc

    @property
    def slot_shape(self) -> tuple[int, int, int]:
        """Shape of one object, ``(rows, cols, channels)``: also at the edges, where it is padded with NaN."""
        return self._array.object_shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The stored dtype."""
        return self._array.dtype

    def load(self, block: Block, slot: NDArray[Any], group: int = 0) -> LoadedBlock | None:
        """Return one object of a block, padding and all; None where nothing was written.

        Parameters
        ----------
        slot
            A contiguous array of `slot_shape` to read a file into; what was fetched from a remote store
            is not copied into it, and is read-only.
        group
            Which of a block's objects, where its channels are split into groups.

        Raises
        ------
        StoreError
            If the object is damaged.
        """
        if slot.shape != self.slot_shape or slot.dtype != self.dtype or not slot.flags.c_contiguous:
            raise ValueError(
                f"a slot is contiguous {self.dtype} {self.slot_shape}, not {slot.dtype} {slot.shape}"
            )
        if self._is_blosc:
            return self._load_compressed(
                self._array.object_path(block.index, group), (*block.index, group), slot
            )
        if not self.is_raw:
            return LoadedBlock(self._read_by_zarr(block, slot, group), None)
        path = self._array.object_path(block.index, group)
        if self._location.is_local:
            body = slot.reshape(-1).view(np.uint8)
            stored = self._read_file(path, body)
        else:
            body, stored = self._fetch(path, (*block.index, group), slot.nbytes)
        if stored is None:
            return None
        computed = google_crc32c.value(body)
        if computed != stored and not self._location.is_local:
            # What came may be damaged where what is stored is whole: only a second reply that agrees tells.
            body, stored = self._values_of(path, self._get(path), slot.nbytes)
            if stored is None:
                return None
            computed = google_crc32c.value(body)
        if computed != stored:
            raise StoreError(
                f"{self._label(path)} is damaged: its checksum is {stored:08x}, its values give {computed:08x}; "
                "remove that object and embed again"
            )
        return LoadedBlock(body.view(self.dtype).reshape(self.slot_shape), stored)

    def _load_compressed(
        self, path: str, index: tuple[int, int, int], slot: NDArray[Any]
    ) -> LoadedBlock | None:
        data = self._get(path) if self._cache is None else self._get_by_cache(path, index, self._cache)
        if data is not None and not _is_whole(data) and not self._location.is_local:
            data = self._get(path)  # a reply that was cut or damaged on its way
        if data is None:
            return None
        if not _is_whole(data):
            raise StoreError(
                f"{self._label(path)} is damaged: its checksum is not that of its {len(data)} bytes; remove that object "
                "and embed again"
            )
        compressed = data[:-CHECKSUM_BYTES]
        try:
            # The sizes first: what an object from elsewhere states must not be written beyond the slot, nor short of it,
            # nor be read beyond its end. They stand in the last 12 of the header's 16 bytes, as C-Blosc 1 documents it.
            size, _, stored = struct.unpack("<III", compressed[4:BLOSC_HEADER_BYTES])
            if size != slot.nbytes or stored != len(compressed):
                raise ValueError(
                    f"it states {size} bytes of values, not {slot.nbytes}, in {stored} of {len(compressed)}"
                )
            blosc.decompress(compressed, slot)
        except (RuntimeError, ValueError, struct.error) as error:
            raise StoreError(
                f"{self._label(path)} is damaged: {first_line(error)}; remove that object and embed again"
            ) from error
        # Without its checksum, which is not that of the values.
        return LoadedBlock(slot, None)

    def _read_by_zarr(self, block: Block, slot: NDArray[Any], group: int) -> NDArray[Any]:
        first = group * slot.shape[2]
        values = self._array.read(block.rows, block.cols, slice(first, first + slot.shape[2]))
        slot.fill(np.nan)
        slot[: values.shape[0], : values.shape[1], : values.shape[2]] = values
        return slot

    def _read_file(self, path: str, body: NDArray[np.uint8]) -> int | None:
        tail = bytearray(CHECKSUM_BYTES)
        try:
            # Not Path.open: values and checksum come in one call, straight into the caller's memory.
            # Not blocking: to open a fifo would wait for ever for somebody to write. Files are read as ever.
            file = os.open(self._location.path(path), os.O_RDONLY | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        try:
            self._check_size(path, os.fstat(file).st_size, len(body))
            whole = body.data
            done = os.readv(file, [whole, tail])
            # A signal interrupted it, or the object exceeds 2 GB, Linux's limit for one read.
            while done < len(body):
                more = os.readv(file, [whole[done:], tail])
                if not more:  # the file was cut since its size was checked: no read would ever give the rest
                    self._check_size(path, done, len(body))
                done += more
            if done < len(body) + CHECKSUM_BYTES:
                tail = bytearray(os.pread(file, CHECKSUM_BYTES, len(body)))
        finally:
            os.close(file)
        return int.from_bytes(tail, "little")

    def _fetch(
        self, path: str, index: tuple[int, int, int], size: int
    ) -> tuple[NDArray[np.uint8], int | None]:
        """Return the bytes of the values, and their checksum as stored: None where there is no object."""
        data = self._get(path) if self._cache is None else self._get_by_cache(path, index, self._cache)
        if data is not None and len(data) != size + CHECKSUM_BYTES:
            data = self._get(path)  # a reply that was cut
        return self._values_of(path, data, size)

    def _values_of(self, path: str, data: bytes | None, size: int) -> tuple[NDArray[np.uint8], int | None]:
        if data is None:
            return np.empty(0, np.uint8), None
        self._check_size(path, len(data), size)
        return np.frombuffer(data, np.uint8, size), int.from_bytes(data[-CHECKSUM_BYTES:], "little")

    def _get(self, path: str) -> bytes | None:
        try:
            return self._location.read_bytes(path)
        except FileNotFoundError:
            return None

    def _get_by_cache(self, path: str, index: tuple[int, int, int], cache: Cache) -> bytes | None:
        # The key holds size and date, so a block that was written anew is not taken from an older copy. One listing
        # tells both for all blocks.
        if self._versions is None:
            entries = self._array.entries().items()
            self._versions = {index: f"{entry.size} {entry.modified}" for index, entry in entries}
        version = self._versions.get(index)
        if version is None:
            return None
        key = f"{self._label(path)}\n{version}"
        data = cache.read(key)
        if data is not None and _is_whole(data):
            return data
        data = self._get(path)
        if data is not None and _is_whole(data):
            cache.write(key, data)
        return data

    def _check_size(self, path: str, size: int, values: int) -> None:
        if size != values + CHECKSUM_BYTES:
            raise StoreError(
                f"{self._label(path)} is damaged: it has {size} bytes, not {values + CHECKSUM_BYTES}; "
                "remove that object and embed again"
            )

    def _label(self, path: str) -> str:
        return f"{self._location.label}/{path}"


def _is_whole(data: bytes) -> bool:
    """Tell whether an object's checksum is that of its values."""
    if len(data) <= CHECKSUM_BYTES:
        return False
    values = np.frombuffer(data, np.uint8)[:-CHECKSUM_BYTES]
    return bool(google_crc32c.value(values) == int.from_bytes(data[-CHECKSUM_BYTES:], "little"))
