"""Blocks of remote stores, kept on the local disk up to a cap: the second epoch costs no download.

They lie in ``blocks/`` below the folder of fetched slides (``HISTOSGE_CACHE``); ``HISTOSGE_BLOCK_CACHE_GB`` is
the cap, 0 keeps none. A copy appears whole, by a rename; whoever reads it compares its checksum.
"""

import hashlib
import os
import threading
from pathlib import Path

from featurestore.slides.download_cache import cache_folder
from featurestore.whole_file import whole_file

ENV_GB = "HISTOSGE_BLOCK_CACHE_GB"
DEFAULT_GB = 10.0
_LEAVE = 0.9
"""Share of the cap that is left when it was reached, so that not every write makes room."""


class BlockCache:
    """A folder of bounded size; several processes may share it.

    Parameters
    ----------
    folder
        Made when the first object is kept.
    cap_bytes
        Of all objects in it.
    """

    def __init__(self, folder: Path, cap_bytes: int) -> None:
        self.folder, self.cap_bytes = folder, cap_bytes
        self._held: int | None = None
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
            os.utime(path)
        except OSError:  # not here, or removed by another process meanwhile
            return None
        return data

    def write(self, key: str, data: bytes) -> None:
        """Keep an object if there is room on the disk; what was used longest ago makes way."""
        if len(data) > self.cap_bytes:
            return
        try:
            with whole_file(self._path(key)) as partial:
                partial.write_bytes(data)
        except OSError:  # a full disk: the block is in memory, that is enough
            return
        with self._lock:
            self._held = self._measure() if self._held is None else self._held + len(data)
            if self._held > self.cap_bytes:
                self._held = self._make_room()

    def _path(self, key: str) -> Path:
        return self.folder / hashlib.sha256(key.encode()).hexdigest()[:32]

    def _files(self) -> list[tuple[float, int, Path]]:
        """Return (last use, bytes, path) of what is there."""
        found = []
        for entry in os.scandir(self.folder):
            try:
                status = entry.stat()
            except FileNotFoundError:
                continue
            found.append((status.st_mtime, status.st_size, Path(entry.path)))
        return found

    def _measure(self) -> int:
        return sum(size for _, size, _ in self._files())

    def _make_room(self) -> int:
        files = sorted(self._files())
        held = sum(size for _, size, _ in files)
        for _, size, path in files:
            if held <= _LEAVE * self.cap_bytes:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held
