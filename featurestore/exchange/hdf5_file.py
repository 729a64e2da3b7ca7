"""HDF5 files that appear whole or not at all, also where the disk is full.

HDF5 keeps what it could not write in its own caches and tries again while it closes the file and while the process
ends, which ends in a segmentation fault (h5py 3.16, HDF5 1.14). So it never sees a failed write: from the first one on,
what it writes is held in memory, it closes as usual, and the operating system's error is raised afterwards.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py

from featurestore.whole_file import whole_file

# Of what is held in memory after a failure; HDF5 itself has pages of this size.
_PAGE_BYTES = 4096


@dataclass(frozen=True)
class Hdf5File:
    """An HDF5 file that is being written.

    Parameters
    ----------
    file
        To write into.
    """

    file: h5py.File
    _device: "_Device"

    def check(self) -> None:
        """Raise the error of the first write that failed, if one has: to be called between large writes.

        Raises
        ------
        OSError
            What the operating system said, such as that the disk is full.
        """
        if self._device.error is not None:
            raise self._device.error


@contextmanager
def whole_hdf5(path: Path) -> Iterator[Hdf5File]:
    """Write an HDF5 file whole or not at all; a file that is there is replaced.

    Parameters
    ----------
    path
        Its place; the folders above it are made.

    Raises
    ------
    OSError
        If the disk is full, or the file cannot be written for another reason of the system's.
    """
    # Unbuffered: a buffer would report a full disk while it is closed, after the last check.
    with whole_file(path, sweep=True) as partial, partial.open("w+b", buffering=0) as raw:
        device = _Device(raw)
        try:
            with h5py.File(device, "w") as file:
                yield Hdf5File(file, device)
        except Exception as error:
            # Whatever another library made of it, the reason is the failed write.
            if device.error is not None and error is not device.error:
                raise device.error from error
            raise
        if device.error is not None:
            raise device.error


class _Device:
    """What h5py takes for a Python file: a real file until a write fails, and from then on pages in memory over it."""

    def __init__(self, raw: io.FileIO) -> None:
        self._raw = raw
        self._position = self._size = 0
        self._pages: dict[int, bytearray] = {}
        self.error: OSError | None = None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Do nothing: nothing is buffered."""

    def truncate(self, size: int | None = None) -> int:
        self._size = self._position if size is None else size
        self._guarded(lambda: self._raw.truncate(self._size))
        return self._size

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        if not self._guarded(lambda: self._write_all(view)):
            self._hold(view)
        self._position += len(view)
        self._size = max(self._size, self._position)
        return len(view)

    def read(self, n_bytes: int) -> bytes:
        # h5py knows a Python file by this method, and reads with the next one.
        content = bytearray(n_bytes)
        self.readinto(content)
        return bytes(content)

    def readinto(self, target: Any) -> int:
        view = memoryview(target).cast("B")
        for start, stop, page, offset in _pieces(self._position, len(view)):
            content = self._pages[page] if page in self._pages else self._stored(page)
            view[start:stop] = content[offset : offset + stop - start]
        self._position += len(view)
        return len(view)

    def _guarded(self, act: Any) -> bool:
        """Act on the real file unless that has failed before; return whether it was done."""
        if self.error is not None:
            return False
        try:
            act()
        except OSError as error:
            self.error = error
        return self.error is None

    def _write_all(self, view: memoryview) -> None:
        self._raw.seek(self._position)
        # A raw file may take a part, and says why it cannot take the rest only at the next call.
        while len(view):
            view = view[self._raw.write(view) :]

    def _hold(self, view: memoryview) -> None:
        for start, stop, page, offset in _pieces(self._position, len(view)):
            if page not in self._pages:
                self._pages[page] = self._stored(page)
            self._pages[page][offset : offset + stop - start] = view[start:stop]

    def _stored(self, page: int) -> bytearray:
        """Return a page of the real file, zeros behind its end."""
        self._raw.seek(page * _PAGE_BYTES)
        content = bytearray()
        while len(content) < _PAGE_BYTES and (part := self._raw.read(_PAGE_BYTES - len(content))):
            content += part
        return content.ljust(_PAGE_BYTES, b"\0")


def _pieces(position: int, n_bytes: int) -> Iterator[tuple[int, int, int, int]]:
    """Cut a range of a file at the borders of pages: start and stop within the range, page, offset within that."""
    start = 0
    while start < n_bytes:
        page, offset = divmod(position + start, _PAGE_BYTES)
        stop = min(n_bytes, start + _PAGE_BYTES - offset)
        yield start, stop, page, offset
        start = stop
