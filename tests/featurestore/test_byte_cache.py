import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor

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


@pytest.mark.parametrize("limit", [100, 3])
def test_what_many_ask_for_at_once_is_made_once(limit: int) -> None:
    """Also if it is larger than the limit: it is not kept then, and those who wait get it all the same."""
    cache: ByteCache[bytes] = ByteCache(limit, len)
    made: list[int] = []
    together = threading.Barrier(8)

    def make() -> bytes:
        made.append(1)
        # Until all others wait for this value: no time is long enough on a busy machine.
        waiting = cache._making["one"]._condition._waiters
        deadline = time.monotonic() + 120
        while len(waiting) < 7:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return b"12345"

    def ask() -> None:
        together.wait(120)
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


def test_threads_that_push_out_each_others_values_leave_the_count_right() -> None:
    cache: ByteCache[bytes] = ByteCache(10, len)

    def ask(seed: int) -> None:
        order = random.Random(seed)
        for _ in range(2000):
            size = order.randrange(1, 9)
            assert cache.get(size, lambda size=size: b"x" * size) == b"x" * size  # type: ignore[misc]

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(4)))
    assert cache._held == sum(map(len, cache._values.values())) <= 10
