"""Threads that want different slides do not wait for one another; a user without a home has a cache all the same."""

import pwd
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.embedding.worker import SlidePool
from featurestore.errors import SlideError, SlideWarning
from featurestore.slides import download_cache
from featurestore.slides.download_cache import ENV_FOLDER, KeyedLocks, cache_folder, fetch
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide

WAIT_S = 120.0


class _Gate(SimpleHTTPRequestHandler):
    """Serves files; ``slow*`` only once the gate is open."""

    gate = threading.Event()
    gets: ClassVar[Counter[str]] = Counter()

    def do_GET(self) -> None:
        self.gets[self.path] += 1
        if self.path.startswith("/slow"):
            self.gate.wait(WAIT_S)
        super().do_GET()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "cache"))
    for name in ("slow", "fast"):
        write_pyramid(tmp_path / f"{name}.tif", tissue_like(300, 200, 2.0), 2.0)
    _Gate.gate.clear()
    _Gate.gets.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Gate, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    _Gate.gate.set()
    server.shutdown()
    server.server_close()


def test_a_slide_is_opened_while_another_is_still_being_downloaded(site: str) -> None:
    pool, opened = SlidePool(8), threading.Event()

    def use_slow() -> None:
        with pool.acquire("slow", lambda: open_slide(f"{site}/slow.tif")):
            opened.set()

    thread = threading.Thread(target=use_slow)
    thread.start()
    try:
        with pool.acquire("fast", lambda: open_slide(f"{site}/fast.tif")) as slide:
            assert slide.size_px == (300, 200)
            assert not opened.is_set()
    finally:
        _Gate.gate.set()
        thread.join(WAIT_S)
    assert opened.is_set()


def test_threads_that_want_one_slide_fetch_it_once(site: str) -> None:
    threads = [threading.Thread(target=fetch, args=(f"{site}/slow.tif",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    _Gate.gate.set()
    for thread in threads:
        thread.join(WAIT_S)
    assert _Gate.gets["/slow.tif"] == 1


class _Picture:
    closed = 0

    def close(self) -> None:
        self.closed += 1


def test_one_thread_opens_a_slide_and_a_failure_is_not_kept() -> None:
    pool, opened, start = SlidePool(1), [], threading.Barrier(5)

    def open_it() -> Slide:
        opened.append(_Picture())
        if len(opened) == 1:
            raise SlideError("not yet")
        return opened[-1]  # type: ignore[return-value]

    with pytest.raises(SlideError), pool.acquire("a", open_it):
        pass

    def use() -> None:
        start.wait(WAIT_S)
        with pool.acquire("a", open_it):
            pass

    threads = [threading.Thread(target=use) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(opened) == 2
    with pool.acquire("b", open_it):
        pass
    assert [picture.closed for picture in opened] == [0, 1, 0]


def test_locks_of_keys_that_nobody_holds_are_forgotten(tmp_path: Path) -> None:
    locks = KeyedLocks()
    with locks.hold(tmp_path), locks.hold(tmp_path / "a"):
        assert len(locks._locks) == 2
    assert locks._locks == {}


def test_without_a_home_copies_are_kept_in_a_temporary_folder_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(uid: int) -> Any:
        raise KeyError(uid)

    for name in (ENV_FOLDER, "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)  # a container whose user is in no list
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    download_cache._folder_without_home.cache_clear()
    with pytest.warns(SlideWarning, match="this user has no home.* set HISTOSGE_CACHE"):
        folder = cache_folder()
    assert folder.is_relative_to(tmp_path)
    assert folder.stat().st_mode & 0o077 == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cache_folder() == folder
    download_cache._folder_without_home.cache_clear()


def test_without_a_temporary_folder_a_slide_is_still_read_or_says_so(
    site: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _Gate.gate.set()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert open_slide(f"{site}/fast.tif").size_px == (300, 200)
