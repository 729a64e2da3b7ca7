"""What embedding costs, stage by stage: seconds of all threads, bytes and requests. Arithmetic only.

Stages run at the same time in several threads, so their seconds add up to more than a clock on the wall shows.
"""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Self, TypeVar

from featurestore.slides.fetch_meter import Fetched, FetchMeter, meter_of

Item = TypeVar("Item")


@dataclass(frozen=True)
class Costs:
    """Costs of some blocks, or of slides.

    Parameters
    ----------
    patches
        Patches that were encoded.
    plan_seconds
        Opening slides, finding tissue, listing what is there.
    read_seconds, decode_seconds
        Fetching compressed pixels, and turning them into patches. Where a slide's reader cannot tell them apart, both
        are in `decode_seconds`, and its bytes and requests are not counted.
    encode_seconds
        Waiting for the encoders, in the thread that feeds them.
    write_seconds
        Rounding, checksums and writing of blocks.
    bytes_read, requests
        Of the slides' files; of a local file its reads.
    bytes_written, objects
        Of the store.
    """

    patches: int = 0
    plan_seconds: float = 0.0
    read_seconds: float = 0.0
    decode_seconds: float = 0.0
    encode_seconds: float = 0.0
    write_seconds: float = 0.0
    bytes_read: int = 0
    requests: int = 0
    bytes_written: int = 0
    objects: int = 0

    def __add__(self, other: Self) -> "Costs":
        """Return the sum of both."""
        return Costs(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


class Stopwatch:
    """Adds up the time that threads spend in one stage."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count the time of a block of code, also where it raises."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self._seconds += time.perf_counter() - begun

    def timed(self, items: Iterator[Item]) -> Iterator[Item]:
        """Yield items, counting the time that each takes to come."""
        while True:
            with self.running():
                item = next(items, None)
            if item is None:
                return
            yield item

    def take(self) -> float:
        """Return the seconds since the last call."""
        with self._lock:
            seconds, self._seconds = self._seconds, 0.0
            return seconds


class BlockClocks:
    """Measures the costs of blocks that several threads read, encode and write.

    Parameters
    ----------
    meter
        Of the slide, where its reader has one.
    """

    def __init__(self, meter: FetchMeter | None) -> None:
        self._meter = meter
        self.pixels, self.encoding, self.writing = Stopwatch(), Stopwatch(), Stopwatch()

    def take(self, patches: int, n_bytes: int, objects: int) -> Costs:
        """Return the costs since the last call: those of a block, and of what was begun of the next ones."""
        fetched = self._meter.take() if self._meter is not None else Fetched()
        return Costs(
            patches=patches,
            read_seconds=fetched.seconds,
            # Below 0 where another thread has read the same slide since; the sum over its blocks is right.
            decode_seconds=self.pixels.take() - fetched.seconds,
            encode_seconds=self.encoding.take(),
            write_seconds=self.writing.take(),
            bytes_read=fetched.n_bytes,
            requests=fetched.requests,
            bytes_written=n_bytes,
            objects=objects,
        )


def plan_costs(seconds: float, slide: object) -> Costs:
    """Return the costs of planning a slide: what it has fetched since it was opened."""
    meter = meter_of(slide)
    fetched = meter.take() if meter is not None else Fetched()
    return Costs(plan_seconds=seconds, bytes_read=fetched.n_bytes, requests=fetched.requests)
