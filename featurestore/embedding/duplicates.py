"""Refuse a slide whose file a store, or an earlier row of the run, has under another id.

Counted twice, a slide makes a cohort look larger than it is, and may stand on both sides of a split. Slides are compared
as their turn comes: a run does not open ten thousand of them before it begins.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from featurestore.errors import SlideError
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.fingerprint_index import FingerprintIndex
from featurestore.storage.store import Store

AHEAD = 16
"""Slides whose fingerprints are computed before their turn: on a file server each takes some requests."""


class DuplicateCheck:
    """Compares the slides of one run with each other and with the store; called in the order of the rows.

    Parameters
    ----------
    store
        Where the run writes.
    allowed
        Whether slides may be stored under several ids: then nothing is compared.
    """

    def __init__(self, store: Store, *, allowed: bool) -> None:
        self._index = None if allowed else FingerprintIndex(store)
        self._rows: dict[str, str] = {}

    def check(self, slide_id: str, fingerprint: str) -> None:
        """Refuse a slide that is another one already.

        Raises
        ------
        SlideError
            With the id of the other.
        """
        if self._index is None or fingerprint.startswith("0-"):  # one empty file is like another
            return
        # What the store holds goes on, whatever an earlier version or --allow-duplicates let in.
        if self._index.holds(slide_id, fingerprint):
            self._rows.setdefault(fingerprint, slide_id)
            return
        stored = self._index.other_id(slide_id, fingerprint)
        earlier = None if stored else self._rows.setdefault(fingerprint, slide_id)
        if stored or earlier != slide_id:
            where = "in the store" if stored else "of an earlier row"
            raise SlideError(
                f"it is the same file as slide {stored or earlier!r} {where} (fingerprint {fingerprint[:24]}); leave it "
                "out, or give --allow-duplicates to embed it under both ids"
            )

    def accepted(
        self, samples: Sequence[Sample], refuse: Callable[[Sample, SlideError], None]
    ) -> Iterator[Sample]:
        """Yield the slides of a run that are no duplicates, in order; for workers, who see one slide each.

        Parameters
        ----------
        refuse
            Called with each other slide and the reason.
        """
        if self._index is None:
            yield from samples
            return
        rows = iter(samples)
        waiting: deque[tuple[Sample, Future[str | None]]] = deque()
        with ThreadPoolExecutor(AHEAD // 2, thread_name_prefix="fingerprint") as threads:
            while True:
                while len(waiting) < AHEAD and (sample := next(rows, None)) is not None:
                    waiting.append((sample, threads.submit(_fingerprint, sample.slide)))
                if not waiting:
                    return
                sample, future = waiting.popleft()
                fingerprint = future.result()
                try:
                    if fingerprint is not None:
                        self.check(sample.slide_id, fingerprint)
                except SlideError as error:
                    refuse(sample, error)
                else:
                    yield sample


def _fingerprint(path: str) -> str | None:
    """Return a slide's fingerprint; None if it cannot be read, which the worker that plans it reports."""
    try:
        return slide_fingerprint(path)
    except SlideError:
        return None
