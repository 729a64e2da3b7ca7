"""How many bytes of a slide's file were fetched, by how many requests, and how long that took.

Readers that fetch compressed tiles themselves have a meter; those that read through another library cannot tell the
fetching of a tile from its decoding.
"""

import threading
from dataclasses import dataclass


@dataclass(frozen=True)
class Fetched:
    """Seconds of all threads, bytes, and requests: of a local file its reads."""

    seconds: float = 0.0
    n_bytes: int = 0
    requests: int = 0


class FetchMeter:
    """Adds up what threads fetch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = Fetched()

    def add(self, seconds: float, n_bytes: int, requests: int = 1) -> None:
        """Count some requests."""
        with self._lock:
            total = self._total
            self._total = Fetched(total.seconds + seconds, total.n_bytes + n_bytes, total.requests + requests)

    def take(self) -> Fetched:
        """Return what was counted since the last call."""
        with self._lock:
            total, self._total = self._total, Fetched()
            return total


def meter_of(slide: object) -> FetchMeter | None:
    """Return a slide's meter; None if its reader has none."""
    found = getattr(slide, "meter", None)
    return found if isinstance(found, FetchMeter) else None
