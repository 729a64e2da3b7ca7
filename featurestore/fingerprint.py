"""What makes a slide file the same file: size and its first and last MiB, never its mtime."""

import hashlib
from pathlib import Path

from featurestore.errors import SlideNotFoundError

SAMPLE_BYTES = 1 << 20


def slide_fingerprint(path: str) -> str:
    """Return ``<bytes>-<sha256>`` of a slide's first and last MiB.

    Reading whole slides of several GB would cost more than it protects from.
    """
    file = Path(path)
    if not file.is_file():
        raise SlideNotFoundError(f"there is no slide at {path}")
    size = file.stat().st_size
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        digest.update(stream.read(SAMPLE_BYTES))
        if size > SAMPLE_BYTES:
            stream.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(stream.read(SAMPLE_BYTES))
    return f"{size}-{digest.hexdigest()}"
