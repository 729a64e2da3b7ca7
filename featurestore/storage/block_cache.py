"""Blocks of remote stores, kept on the local disk up to a limit: the second epoch costs no download.

They are in ``blocks/`` below the folder of fetched slides (``HISTOSGE_CACHE``); ``HISTOSGE_BLOCK_CACHE_GB`` is the
limit, and 0 keeps none. A copy appears whole, by a rename; the reader compares its checksum.
"""

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path

from featurestore.slides.download_cache import cache_folder
from featurestore.whole_file import whole_file

ENV_GB = "HISTOSGE_BLOCK_CACHE_GB"
DEFAULT_GB = 10.0
_SHARE_AFTER_EVICTION = 0.9
"""Share of the limit that eviction leaves: with all of it, every further write would list the folder and evict."""
_SHARE_BETWEEN_COUNTS = 0.05
"""Share of the limit that a process writes before it lists the folder again. Other processes write, too: each goes over
the limit by no more than this."""


class BlockCache:
    """A folder of bounded size; several processes may share it.

    Parameters
    ----------
    folder
        Made when the first object is kept.
    cap_bytes
        Limit for all objects together.
    """

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self.folder, self.cap_bytes = folder, cap_bytes
        self._held_bytes: int | None = None  # when the folder was last listed
        self._written_since = 0
        self._lock = threading.Lock()

    @classmethod
    def from_environment(cls) -> "BlockCache | None":
        """Return the user's cache, or None where the cap is 0."""
        cap = int(float(os.environ.get(ENV_GB) or DEFAULT_GB) * 1e9)
        return cls(cache_folder() / "blocks", cap) if cap > 0 else None

    def read(self, key: str) -> bytes | None:
        """Return an object, or None if it is not here."""
        path = self._path(key)
        try:
            data = path.read_bytes()
        except OSError:  # not here, or removed by another process meanwhile
            return None
        with suppress(OSError):  # evicted since it was read
            os.utime(path)  # eviction goes by this time, since many file systems record no access times
        return data

    def write(self, key: str, data: bytes) -> None:
        """Keep an object if the disk has space for it; the least recently used ones are evicted."""
        if len(data) > self.cap_bytes:
            return
        try:
            with whole_file(self._path(key)) as partial:
                partial.write_bytes(data)
        except OSError:  # a full disk: the block is in memory, that is enough
            return
        with self._lock:
            self._written_since += len(data)
            # Listed at the first write, too: earlier runs have left blocks.
            if (
                self._held_bytes is None
                or self._held_bytes + self._written_since > self.cap_bytes
                or self._written_since > _SHARE_BETWEEN_COUNTS * self.cap_bytes
            ):
                self._held_bytes, self._written_since = self._evict(), 0

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:32]

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of every file."""
        found = []
        # Other processes evict from the same folder: what is gone since it was listed is passed over.
        with suppress(OSError), os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):
                    status = entry.stat()
                    found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found

    def _evict(self) -> int:
        """Remove the least recently used files, if there are more than the limit allows; return the bytes that stay."""
        files = sorted(self._files())
        held = sum(size for _, size, _ in files)
        if held <= self.cap_bytes:
            return held
        for _, size, path in files:
            if held <= _SHARE_AFTER_EVICTION * self.cap_bytes:
                break
            with suppress(OSError):  # not ours to remove, or a folder
                path.unlink(missing_ok=True)
                held -= size
        return held
