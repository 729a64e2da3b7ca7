"""Notices that a slide's file is replaced or written to while a run reads it.

Two files that share one slide's embeddings would be mixed without a trace: a process opens a slide once and reads it
for minutes, other processes open it later, and some libraries open a file anew for each read.
"""

import time
from pathlib import Path

from featurestore.errors import SlideError
from featurestore.location import strip_credentials
from featurestore.slides.download_cache import is_remote
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.slide_reader import is_folder_slide

RECHECK_S = 30.0
"""Seconds between two looks at a slide whose state costs requests or a listing: a URL, or a folder."""

_Signature = tuple[int, int, int]
"""Inode, bytes and time of the last change: the same values mean the same content, as far as a file system knows."""


class SlideWatch:
    """Watches one slide; made before the slide is opened. Threads may check at once.

    Parameters
    ----------
    path
        The slide's file, folder or URL.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._signature = self._look()
        self._checked_at: float | None = None

    def check_since_opened(self) -> None:
        """Refuse a file that changed since this object was made, before its fingerprint was taken.

        Raises
        ------
        SlideError
            If it was replaced, written to, or removed.
        """
        if self._look() != self._signature:
            raise SlideError(f"{self._label} was changed while it was opened; run the same command again")

    def check(self, fingerprint: str) -> None:
        """Refuse a file that is no longer the one with this fingerprint.

        A file costs one system call, and its fingerprint is compared only where that shows a change. A URL or a folder
        is looked at every `RECHECK_S` seconds.

        Raises
        ------
        SlideError
            If it was replaced, written to, or removed.
        """
        signature = self._look()
        if self._checked_at is not None and signature == self._signature:
            age = time.monotonic() - self._checked_at
            if signature is not None or age < RECHECK_S:
                return
        now = slide_fingerprint(self._path)
        if now != fingerprint:
            raise SlideError(
                f"{self._label} was changed while it was embedded: its fingerprint was {_short(fingerprint)} and is "
                f"{_short(now)}; restore the file, or remove its embeddings with: histosge rm STORE --slide ID"
            )
        # The signature from before the fingerprint was computed: a change in between shows at the next check.
        self._signature, self._checked_at = signature, time.monotonic()

    @property
    def _label(self) -> str:
        return strip_credentials(self._path)

    def _look(self) -> _Signature | None:
        """Return the file's signature; None for what has none, which is a URL or a folder."""
        if is_remote(self._path) or is_folder_slide(self._path):
            return None
        try:
            status = Path(self._path.removeprefix("file://")).stat()
        except OSError:  # `slide_fingerprint` and `open_slide` say why
            return (0, 0, 0)
        return status.st_ino, status.st_size, status.st_mtime_ns


def _short(fingerprint: str) -> str:
    """Return the size and the first digits of the hash: enough to tell two files apart in a message."""
    size, _, digest = fingerprint.partition("-")
    return f"{size}-{digest[:12]}"
