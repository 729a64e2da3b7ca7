"""A cache with a limit in bytes: values that are costly to make are kept, and the least recently used is dropped."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
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
        self._making: dict[Hashable, threading.Lock] = {}

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """Return the value of a key. The first thread that needs it makes it; others wait for that one."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            # A lock for each key: making one value, which may take a second, must not stop the readers of others.
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                if key in self._values:  # made while this thread waited
                    return self._values[key]
            try:
                value = make()
                self._put(key, value)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return value

    def _put(self, key: Hashable, value: V) -> None:
        size = self._size(value)
        if size > self._max:
            return
        with self._lock:
            self._values[key] = value
            self._held += size
            while self._held > self._max:
                self._held -= self._size(self._values.popitem(last=False)[1])
