"""A cache with a limit in bytes: values that are costly to make are kept, and the least recently used is dropped."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteCache(Generic[V]):
    """A thread-safe cache of bounded size.

    Parameters
    ----------
    max_bytes
        Limit for all values together. A value that is larger alone is returned and not kept.
    size
        Bytes of a value.
    """

    def __init__(self, max_bytes: int, size: Callable[[V], int]) -> None:
        self._max, self._size = max_bytes, size
        self._values: OrderedDict[Hashable, V] = OrderedDict()
        self._held = 0
        self._lock = threading.Lock()
        self._making: dict[Hashable, Future[V]] = {}

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of a key. The first thread that needs it makes it; others wait for that one."""
        while True:
            with self._lock:
                if key in self._values:
                    self._values.move_to_end(key)
                    return self._values[key]
                making = self._making.get(key)
                if making is None:
                    # Outside the lock: making one value, which may take a second, must not stop the readers of others.
                    making = self._making[key] = Future()
                    break
            if making.exception() is None:
                # Not from the cache: a value above the limit is not kept, and other values may have pushed it out. Each
                # thread that waited would make it again, and all of them would count it.
                return making.result()
            # Its maker failed: this thread tries.
        try:
            value = make()
        except BaseException as error:
            self._finish(key)
            making.set_exception(error)
            raise
        self._put(key, value)
        self._finish(key)
        making.set_result(value)
        return value

    def _finish(self, key: Hashable) -> None:
        with self._lock:
            del self._making[key]

    def _put(self, key: Hashable, value: V) -> None:
        size = self._size(value)
        if size > self._max:
            return
        with self._lock:
            self._values[key] = value
            self._held += size
            while self._held > self._max:
                self._held -= self._size(self._values.popitem(last=False)[1])
