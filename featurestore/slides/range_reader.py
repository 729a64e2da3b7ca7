"""A file behind a URL, read in parts: what a slide's tiles need, and not the gigabytes between them.

Only servers that serve ranges are used; from others a slide is fetched whole (`featurestore.slides.download_cache`).
"""

import io
import os
import tempfile
import time
from collections.abc import Sequence
from http import HTTPStatus
from http.client import HTTPException
from pathlib import Path
from typing import Any, Self
from urllib.request import Request, urlopen

from featurestore.credentials import strip_credentials
from featurestore.errors import SlideAccessError, SlideError, first_line
from featurestore.file_systems import open_file_system
from featurestore.server_errors import is_transient
from featurestore.slides.access_errors import access_as_slide_error, access_error
from featurestore.slides.fetch_meter import FetchMeter

# A request takes tens of milliseconds to answer, in which a link of 10 MB/s carries a few hundred kilobytes.
MAX_GAP = 64 << 10
"""Bytes between two parts that are fetched along with them: cheaper than another request."""
MAX_PART = 8 << 20
"""Bytes of one request at most: more would keep the other connections idle, and be lost whole when it breaks."""
TRIES = 4
"""Of one read. S3's client repeats requests itself; of a web server one busy answer would cost a slide of thousands of
requests."""
FIRST_WAIT_S = 0.5
"""Before the second try; doubled before each further one."""
PAGE = 64 << 10
"""Bytes that a `SparseCopy` fetches at least."""


class RangedFile:
    """A remote file. Threads may read at once.

    Parameters
    ----------
    url
        Where; credentials come from the environment.

    Raises
    ------
    SlideNotFoundError
        If nothing is there.
    SlideAccessError
        If its server refuses, or does not answer.
    SlideError
        If it cannot be read in parts.
    """

    def __init__(self, url: str) -> None:
        self._url, self.label = url, strip_credentials(url)
        self.meter = FetchMeter()
        with access_as_slide_error(url, "cannot be reached"):
            self._fs, self._path = open_file_system(url)
            info: dict[str, Any] = self._fs.info(self._path)
        self.size = int(info.get("size") or 0)
        # Object stores always serve ranges; of a web server only its reply to a range request tells.
        if not self.size or (self._path.startswith("http") and not _serves_ranges(url)):
            raise SlideError(f"{self.label} cannot be read in parts")

    def read(self, parts: Sequence[tuple[int, int]]) -> list[bytes]:
        """Read parts, those close together by one request, several requests at once.

        Parameters
        ----------
        parts
            ``(offset, bytes)`` each, in any order.

        Raises
        ------
        SlideAccessError
            If some cannot be read, or come short, also when tried again.
        """
        # `cat_ranges` sends its requests at once, but merges none: its `max_gap` is not implemented (fsspec 2026.9).
        runs = merge_ranges(parts)
        for wait in [FIRST_WAIT_S * 2**number for number in range(TRIES - 1)]:
            try:
                found = self._fetch(runs)
                break
            except SlideAccessError as error:
                if error.__cause__ is not None and not is_transient(error.__cause__):
                    raise
                time.sleep(wait)
        else:
            found = self._fetch(runs)
        return [_part_of(runs, found, offset, count) for offset, count in parts]

    def _fetch(self, runs: list[tuple[int, int]]) -> list[bytes]:
        starts, ends = [start for start, _ in runs], [stop for _, stop in runs]
        begun = time.perf_counter()
        with access_as_slide_error(self._url, "cannot be read"):
            found = self._fs.cat_ranges([self._path] * len(runs), starts, ends, on_error="raise")
        self.meter.add(time.perf_counter() - begun, sum(ends) - sum(starts), len(runs))
        for (start, stop), data in zip(runs, found, strict=True):
            if isinstance(data, Exception):  # fsspec up to 2026.1 returns what it is told to raise
                raise access_error(self._url, data, "cannot be read") from data
            if len(data) != stop - start:
                raise SlideAccessError(f"{self.label}: {len(data)} of {stop - start} bytes came from {start}")
        return list(found)


def _serves_ranges(url: str) -> bool:
    """Request one byte of a web server: the reply's status tells whether it serves ranges."""
    # The reply is closed unread: a server without ranges begins to send the whole file.
    try:
        with urlopen(Request(url, headers={"Range": "bytes=0-0"}), timeout=30) as answer:  # noqa: S310 -- http by its name
            return bool(answer.status == HTTPStatus.PARTIAL_CONTENT)
    except (OSError, ValueError, HTTPException):
        return False


def merge_ranges(parts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ``(start, stop)`` of the requests that cover parts ``(offset, bytes)``, in order."""
    runs: list[tuple[int, int]] = []
    for offset, count in sorted(parts):
        if runs:
            start, stop = runs[-1]
            end = max(stop, offset + count)
            if offset < stop or (offset - stop <= MAX_GAP and end - start <= MAX_PART):
                runs[-1] = (start, end)
                continue
        runs.append((offset, offset + count))
    return runs


def _part_of(runs: list[tuple[int, int]], found: list[bytes], offset: int, count: int) -> bytes:
    for (start, stop), data in zip(runs, found, strict=True):
        if start <= offset and offset + count <= stop:
            return data[offset - start : offset - start + count]
    raise AssertionError("every part lies in a run")


class SparseCopy(io.RawIOBase):
    """A local file of a remote one's size, which holds the parts that were read: for libraries that want a path.

    What was not read is a hole, and reads as zeros through the path.
    """

    def __init__(self, remote: RangedFile, suffix: str) -> None:
        self._remote = remote
        try:
            self._folder = tempfile.TemporaryDirectory(prefix="histosge-")
        except OSError as error:
            reason = error.strerror or first_line(error)
            raise SlideError(f"no temporary folder can be made ({reason}); set TMPDIR to one") from error
        self.path = Path(self._folder.name) / f"slide{suffix}"
        self._file = self.path.open("w+b", buffering=0)
        self._file.truncate(remote.size)  # a sparse file: holes take no disk
        self._is_here = bytearray(-(-remote.size // PAGE))
        self._at = 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Set the position, as files do."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._remote.size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def tell(self) -> int:
        """Return where the next read begins."""
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Read, fetching the pages that are not here yet."""
        count = max(0, min(len(buffer), self._remote.size - self._at))
        self._fetch_pages(self._at, count)
        self._file.seek(self._at)
        buffer[:count] = self._file.read(count)
        self._at += count
        return count

    def _fetch_pages(self, offset: int, count: int) -> None:
        if not count:
            return
        pages = [p for p in range(offset // PAGE, (offset + count - 1) // PAGE + 1) if not self._is_here[p]]
        parts = [(p * PAGE, min(PAGE, self._remote.size - p * PAGE)) for p in pages]
        for page, (start, _), data in zip(
            pages, parts, self._remote.read(parts) if parts else [], strict=True
        ):
            self._file.seek(start)
            self._file.write(data)
            self._is_here[page] = 1

    def close(self) -> None:
        """Remove the local file."""
        if not self.closed:
            self._file.close()
            self._folder.cleanup()
        super().close()

    def __enter__(self) -> Self:
        """Use as a context."""
        return self
