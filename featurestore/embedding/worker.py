"""What a worker process does: plan one slide, or embed one block. It knows no dask.

Arguments and results are small and picklable: no pixel and no embedding leaves the process. Encoders are
loaded once per process; slides stay open while their blocks come in.
"""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.embedding.block_task import BlockResult, embed_blocks
from featurestore.embedding.plan import (
    BATCH,
    EmbedSettings,
    SlideResult,
    blocks_to_read,
    fail_slide,
    load_encoders,
    plan_slide,
)
from featurestore.encoders.protocol import Encoder, EncoderIdentity
from featurestore.errors import FeatureStoreError, IdentityMismatchError, SlideError
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store, StoredGrid

OPEN_SLIDES = 8
"""Slides that a process keeps open; the one used longest ago is closed."""


@dataclass(frozen=True)
class PermanentFailure:
    """An error that trying again does not mend, as a result instead of an exception."""

    error: FeatureStoreError


@dataclass(frozen=True)
class PlannedSlide:
    """One slide's missing blocks.

    Parameters
    ----------
    blocks
        Block -> keys of the encoders that lack it, in row-major order.
    planned
        Objects that belong in the store, over all encoders.
    patches
        Tissue patches on the grid.
    """

    slide_id: str
    blocks: dict[Block, tuple[str, ...]]
    planned: int
    patches: int


@dataclass(frozen=True)
class Job:
    """What the tasks of one slide share.

    Parameters
    ----------
    run
        Another for every run: what a process remembers of one run, it does not take for another's.
    store
        URL of the store.
    sample
        The slide.
    settings
        Of the run.
    """

    run: str
    store: str
    sample: Sample
    settings: EmbedSettings


def check_encoders(job: Job) -> PermanentFailure | None:
    """Load the run's encoders, so that a mistake is known before anything is written."""
    try:
        _encoders(job)
    except FeatureStoreError as error:
        return PermanentFailure(error)
    return None


def plan_job(job: Job) -> PlannedSlide | SlideResult | PermanentFailure:
    """Write a slide's metadata and list what is missing; a slide that cannot be used is ``failed``."""
    try:
        encoders = _encoders(job)
        store = Store.open(job.store)
        try:
            with _slide(job) as slide:
                todo = plan_slide(store, slide, job.sample, dict(encoders), job.settings)
        except IdentityMismatchError:
            raise
        except SlideError as error:
            return fail_slide(store, job.sample.slide_id, error)
    except FeatureStoreError as error:
        return PermanentFailure(error)
    blocks = blocks_to_read(todo)
    planned = len(todo.planned) * len(encoders)
    return PlannedSlide(job.sample.slide_id, blocks, planned, int(todo.stored.is_tissue.sum()))


def embed_block(
    job: Job, block: Block, keys: tuple[str, ...]
) -> BlockResult | SlideResult | PermanentFailure:
    """Read, encode and write one block for the encoders that lack it."""
    try:
        encoders = _encoders(job)
        store, stored = _stored(job.run, job.store, job.sample.slide_id, job.settings.spec.key)
        try:
            with _slide(job) as slide:
                (result,) = embed_blocks(store, slide, stored, {block: keys}, dict(encoders))
        except SlideError as error:
            return fail_slide(store, job.sample.slide_id, error)
    except FeatureStoreError as error:
        return PermanentFailure(error)
    return result


class SharedEncoder:
    """One encoder for all threads of a process; batches are filled from whoever waits.

    While one block is read, another is encoded; the end of a block does not leave a device with a half-full batch.
    A vector depends on its own patch alone, so it does not matter with whom it shared a batch.
    """

    def __init__(self, encoder: Encoder, batch: int = BATCH) -> None:
        self._encoder, self._batch = encoder, batch
        self._waiting: SimpleQueue[tuple[NDArray[np.uint8], Future[NDArray[np.float32]]]] = SimpleQueue()
        threading.Thread(target=self._serve, name=f"encode {encoder.identity.key}", daemon=True).start()

    @property
    def identity(self) -> EncoderIdentity:
        """Whose vectors these are."""
        return self._encoder.identity

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch, perhaps together with others'; waits for the result."""
        result: Future[NDArray[np.float32]] = Future()
        self._waiting.put((patches, result))
        return result.result()

    def _serve(self) -> None:
        while True:
            requests = [self._waiting.get()]
            side, size = requests[0][0].shape[1:], len(requests[0][0])
            while size < self._batch and not self._waiting.empty():
                request = self._waiting.get()
                if request[0].shape[1:] != side:
                    self._answer(requests)
                    requests, side, size = [], request[0].shape[1:], 0
                requests.append(request)
                size += len(request[0])
            self._answer(requests)

    def _answer(self, requests: list[tuple[NDArray[np.uint8], Future[NDArray[np.float32]]]]) -> None:
        try:
            together = requests[0][0] if len(requests) == 1 else np.concatenate([p for p, _ in requests])
            vectors = self._encoder.encode(together)
        except BaseException as error:  # noqa: BLE001 -- whoever waits must learn of it, whatever it is
            for _, result in requests:
                result.set_exception(error)
            return
        start = 0
        for patches, result in requests:
            result.set_result(vectors[start : start + len(patches)])
            start += len(patches)


class SlidePool:
    """Open slides, lent to threads; when the shelf is full, those that nobody has are closed, the oldest first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._slides: OrderedDict[Hashable, Slide] = OrderedDict()
        self._users: Counter[Hashable] = Counter()

    @contextmanager
    def lend(self, key: Hashable, make: Callable[[], Slide]) -> Iterator[Slide]:
        """Lend the slide of this key, opened now if it is not there."""
        with self._lock:
            if key not in self._slides:
                self._slides[key] = make()
            self._slides.move_to_end(key)
            self._users[key] += 1
            slide = self._slides[key]
        try:
            yield slide
        finally:
            with self._lock:
                self._users[key] -= 1
                idle = [k for k in self._slides if not self._users[k]]
                closing = [self._slides.pop(k) for k in idle[: max(0, len(self._slides) - self._size)]]
                self._users = +self._users
            for old in closing:
                old.close()


_slide_pool = SlidePool(OPEN_SLIDES)
_loading = threading.Lock()


def _slide(job: Job) -> AbstractContextManager[Slide]:
    sample = job.sample
    return _slide_pool.lend((job.run, sample), lambda: open_slide(sample.slide, sample.mpp))


def _encoders(job: Job) -> dict[str, SharedEncoder]:
    with _loading:  # lru_cache alone would let two threads load at once
        return _load(job.run, job.settings)


@lru_cache(maxsize=1)
def _load(run: str, settings: EmbedSettings) -> dict[str, SharedEncoder]:
    return {key: SharedEncoder(encoder) for key, encoder in load_encoders(settings).items()}


@lru_cache(maxsize=4 * OPEN_SLIDES)
def _stored(run: str, url: str, slide_id: str, grid_key: str) -> tuple[Store, StoredGrid]:
    store = Store.open(url)
    return store, store.grid(slide_id, grid_key)
