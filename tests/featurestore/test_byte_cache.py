import threading

import pytest

from featurestore.byte_cache import ByteCache


def test_a_cache_keeps_what_was_asked_for_last_and_no_more_than_it_may() -> None:
    cache: ByteCache[bytes] = ByteCache(10, len)
    made: list[str] = []

    def get(name: str, size: int) -> bytes:
        def make() -> bytes:
            made.append(name)
            return b"x" * size

        return cache.get(name, make)

    for name in ("a", "b", "a", "c", "a", "b"):
        get(name, 4)
    assert made == ["a", "b", "c", "b"], "c pushed b out, since a was asked for after it"
    assert len(get("large", 11)) == 11
    get("large", 11)
    assert made[-2:] == ["large", "large"]


def test_what_many_ask_for_at_once_is_made_once() -> None:
    cache: ByteCache[bytes] = ByteCache(100, len)
    made: list[int] = []
    together = threading.Barrier(8)

    def make() -> bytes:
        made.append(1)
        return b"x"

    def ask() -> None:
        together.wait(5)
        cache.get("one", make)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_what_fails_to_be_made_is_tried_again() -> None:
    cache: ByteCache[bytes] = ByteCache(100, len)

    def fail() -> bytes:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011
        cache.get("one", fail)
    assert cache.get("one", lambda: b"x") == b"x"
