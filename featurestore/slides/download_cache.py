"""Remote slides that cannot be read in parts: fetched whole, once, into a folder of bounded size.

Most formats are read by libraries that need a local file, and read all over it (JPEG tiles are not: see
`featurestore.slides.range_reader`). Credentials come from the environment, as for stores.
"""

import fcntl
import hashlib
import os
import shutil
import tempfile
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from featurestore.credentials import strip_credentials
from featurestore.errors import SlideError, SlideWarning
from featurestore.file_systems import open_file_system
from featurestore.slides.access_errors import access_as_slide_error
from featurestore.whole_file import is_partial, whole_file, whole_folder

ENV_FOLDER, ENV_GB = "HISTOSGE_CACHE", "HISTOSGE_CACHE_GB"
DEFAULT_GB = 50.0
SEVERAL_FILES = (".mrxs",)
"""Suffixes of formats of more than one file: they cannot be fetched as one."""
FOLDER_SUFFIX = ".series"
"""Of folders of the cache: what was unpacked from one file."""
COPY_BYTES = 8 << 20
"""Copied at once: large enough that a remote file system sends large requests."""
LOCKED_COPIES = 64
"""Copies that a process keeps locked: each takes a file descriptor, and 1,024 is a usual limit of those."""


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
    if suffix in SEVERAL_FILES:
        raise SlideError(
            f"{label}: a {suffix[1:].upper()} slide is several files; copy it to this machine first"
        )
    with access_as_slide_error(url, "cannot be fetched"):
        fs, path = open_file_system(url)
        info = fs.info(path)
        target = _local_path(label, info, suffix)
        # Threads that need the same slide fetch it once; nobody waits for another slide.
        with _fetching.hold(target):
            while not _locks.lock(target):
                _download(fs, path, target, int(info.get("size") or 0))
        # Eviction goes by the time of last use. Access times will not do: under relatime they change once a day.
        os.utime(target)
        _evict(target)
    return target


def keep_folder(name: str, fill: Callable[[Path], None]) -> Path:
    """Return a folder of the cache, filled now if there is none of this name; it counts and gives way as copies do.

    Parameters
    ----------
    name
        Of the folder: another content has another name.
    fill
        Called with an empty folder.

    Raises
    ------
    SlideError
        If it cannot be written, as on a full disk; and whatever `fill` raises.
    """
    target = cache_folder() / name
    with access_as_slide_error(str(target), "cannot be written"), _fetching.hold(target):
        while not _locks.lock(target):
            with whole_folder(target) as partial:
                partial.mkdir()
                fill(partial)
        os.utime(target)
        _evict(target)
    return target


def cache_bytes() -> int:
    """Return how many bytes the cache may take."""
    return int(float(os.environ.get(ENV_GB) or DEFAULT_GB) * 1e9)


def cache_folder() -> Path:
    """Return where copies lie: ``$HISTOSGE_CACHE``, or the user's cache folder; without a home, a temporary one."""
    if os.environ.get(ENV_FOLDER):
        return Path(os.environ[ENV_FOLDER])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "histosge" / "slides"
    try:
        home = Path.home()
    except RuntimeError:  # no HOME, and the user's number is in no list of users, as in many containers
        return _folder_without_home()
    return home / ".cache" / "histosge" / "slides"


@cache
def _folder_without_home() -> Path:
    folder = Path(tempfile.gettempdir()) / f"histosge-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        # Somebody else made it: what lies there, they could replace.
        folder = Path(tempfile.mkdtemp(prefix="histosge-"))
    message = f"this user has no home: slides are kept in {folder}, set {ENV_FOLDER} to keep them elsewhere"
    warnings.warn(message, SlideWarning, stacklevel=3)
    return folder


def _local_path(label: str, info: dict[str, Any], suffix: str) -> Path:
    """Return where this version of this slide lies: another version has another name."""
    # Not all file systems have all of these; what one has not is "None" each time.
    version = [str(info.get(key)) for key in ("size", "ETag", "LastModified", "mtime", "created")]
    # Of Google and Azure. Only where they are there: copies that were made before keep their names.
    version += [str(info[key]) for key in ("etag", "generation") if key in info]
    digest = hashlib.sha256("\n".join([label, *version]).encode()).hexdigest()[:24]
    return cache_folder() / f"{digest}{suffix}"


def _download(fs: Any, path: str, target: Path, size: int) -> None:
    with whole_file(target, sweep=True) as part:
        with fs.open(path, "rb") as source, part.open("wb") as copy:
            shutil.copyfileobj(source, copy, COPY_BYTES)
        if size and part.stat().st_size != size:
            raise OSError(f"{part.stat().st_size} of {size} bytes came")


class CopyLocks:
    """Shared locks on the copies that this process used last: another process may not remove them meanwhile.

    Readers open a file again and again, so holding it open would not be enough.

    Parameters
    ----------
    most
        Copies locked at once; of more, the one used longest ago is released.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._held: OrderedDict[Path, int] = OrderedDict()

    def lock(self, path: Path) -> bool:
        """Lock a copy until many others were used; False if it is not there."""
        with self._lock:
            if path in self._held and path.exists():
                self._held.move_to_end(path)
                return True
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                return False
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not path.exists():  # removed between opening and locking
                os.close(descriptor)
                return False
            self._held[path] = descriptor
            while len(self._held) > self._most:
                os.close(self._held.popitem(last=False)[1])
            return True


class KeyedLocks:
    """A lock for each key, kept only while somebody holds it or waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[Path, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, key: Path) -> Iterator[None]:
        """Hold the lock of a key while the context lasts."""
        with self._lock:
            lock, users = self._locks.get(key, (threading.Lock(), 0))
            self._locks[key] = lock, users + 1
        try:
            with lock:
                yield
        finally:
            with self._lock:
                users = self._locks.pop(key)[1] - 1
                if users:
                    self._locks[key] = lock, users


_locks = CopyLocks(LOCKED_COPIES)
_fetching = KeyedLocks()


def _remove_unless_used(path: Path) -> bool:
    # Without waiting: a copy that some process holds a shared lock on is in use, and stays.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    else:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _size(copy: Path) -> int:
    parts = copy.iterdir() if copy.is_dir() else (copy,)
    return sum(part.stat().st_size for part in parts)


def _evict(keep: Path) -> None:
    """Remove the copies used longest ago until the rest fits; what some process still uses stays."""
    cap = cache_bytes()
    # Folders that somebody else put there are not ours to remove.
    files = [
        file
        for file in keep.parent.iterdir()
        if (file.is_file() or file.name.endswith(FOLDER_SUFFIX)) and not is_partial(file.name)
    ]
    copies = sorted(files, key=lambda file: file.stat().st_mtime)
    total = sum(map(_size, copies))
    for copy in copies:
        if total > cap and copy != keep:
            size = _size(copy)
            total -= size if _remove_unless_used(copy) else 0
