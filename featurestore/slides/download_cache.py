"""Slides that lie elsewhere and cannot be read in parts: fetched whole, once, into a folder of bounded size.

Most formats are read here and there all over the file by libraries that want a file (JPEG tiles are not: see
`ranged`). Credentials come from the environment, as for stores.
"""

import fcntl
import hashlib
import os
import shutil
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any

import fsspec

from featurestore.errors import SlideError, SlideNotFoundError, first_line
from featurestore.location import storage_options, strip_credentials
from featurestore.whole_file import is_partial, whole_file

ENV_FOLDER, ENV_GB = "HISTOSGE_CACHE", "HISTOSGE_CACHE_GB"
DEFAULT_GB = 50.0
FOLDERS = (".mrxs",)
"""Formats of more than one file: they cannot be fetched as one."""


def is_remote(slide: str) -> bool:
    """Whether a slide lies behind a URL and not on this machine."""
    scheme, found, _ = slide.partition("://")
    return bool(found) and scheme != "file"


def fetch(url: str) -> Path:
    """Return a local copy of a remote slide, made now if there is none of this version.

    Two processes may fetch the same slide at once: a copy appears whole, by a rename.

    Raises
    ------
    SlideNotFoundError
        If there is nothing at `url`.
    SlideError
        If it cannot be fetched: format, network, access, or a full disk.
    """
    label = strip_credentials(url)
    suffix = Path(label).suffix.lower()
    if suffix in FOLDERS:
        raise SlideError(
            f"{label}: a {suffix[1:].upper()} slide is several files; copy it to this machine first"
        )
    try:
        fs, path = fsspec.core.url_to_fs(url, **storage_options(url))
        info = fs.info(path)
        target = _place(label, info, suffix)
        while not _leases.take(target):
            _download(fs, path, target, int(info.get("size") or 0))
    except FileNotFoundError as error:
        raise SlideNotFoundError(f"there is no slide at {label}") from error
    except ImportError as error:
        raise SlideError(f"{label} needs an extra package ({error}): pip install 'histosge[s3]'") from error
    except (OSError, ValueError) as error:
        raise SlideError(f"{label} cannot be fetched: {first_line(error)}") from error
    os.utime(target)
    _evict(target)
    return target


def cache_folder() -> Path:
    """Return where copies lie: ``$HISTOSGE_CACHE``, or the user's cache folder."""
    if os.environ.get(ENV_FOLDER):
        return Path(os.environ[ENV_FOLDER])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "histosge" / "slides"


def _place(label: str, info: dict[str, Any], suffix: str) -> Path:
    """Return where this version of this slide lies: another version has another name."""
    version = [str(info.get(key)) for key in ("size", "ETag", "LastModified", "mtime", "created")]
    digest = hashlib.sha256("\n".join([label, *version]).encode()).hexdigest()[:24]
    return cache_folder() / f"{digest}{suffix}"


def _download(fs: Any, path: str, target: Path, size: int) -> None:
    with whole_file(target, sweep=True) as part:
        with fs.open(path, "rb") as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, 8 << 20)
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes came")


class Leases:
    """Shared locks on the copies that this process used last: another process may not remove them meanwhile.

    Readers open a file again and again, so holding it open would not be enough.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._held: OrderedDict[Path, int] = OrderedDict()

    def take(self, path: Path) -> bool:
        """Lock a copy until many others were used; False if it is not there."""
        with self._lock:
            if path in self._held and path.is_file():
                self._held.move_to_end(path)
                return True
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return False
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not path.is_file():  # removed between opening and locking
                os.close(descriptor)
                return False
            self._held[path] = descriptor
            while len(self._held) > self._size:
                os.close(self._held.popitem(last=False)[1])
            return True


_leases = Leases(64)


def _remove_unless_used(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink(missing_ok=True)
        return True


def _evict(keep: Path) -> None:
    """Remove the copies used longest ago until the rest fits; what some process still uses stays."""
    cap = float(os.environ.get(ENV_GB) or DEFAULT_GB) * 1e9
    files = [file for file in keep.parent.iterdir() if file.is_file() and not is_partial(file.name)]
    copies = sorted(files, key=lambda file: file.stat().st_mtime)
    total = sum(p.stat().st_size for p in copies)
    for copy in copies:
        if total > cap and copy != keep:
            size = copy.stat().st_size
            total -= size if _remove_unless_used(copy) else 0
