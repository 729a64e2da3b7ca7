"""The tasks of a worker process: plan one slide, or embed one block. It knows no dask.

Arguments and results are small and picklable: no pixel and no embedding leaves the process, as 8 MB through a dask
scheduler cost it as much as ten tasks. Encoders are loaded once per process; slides stay open between their blocks.
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
from featurestore.errors import FeatureStoreError, SlideError
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store, StoredGrid

OPEN_SLIDES = 8
"""Slides that a process keeps open: slides take turns, so its blocks come from several at once."""


@dataclass(frozen=True)
class PermanentFailure:
    """An error that another try cannot change. It is returned, since dask retries a task that raises."""

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
        A random id of the run: what a process caches for one run is not used in another.
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
    """Load the encoders of a run, so that an unusable one is reported before anything is written."""
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
                plan = plan_slide(store, slide, job.sample, dict(encoders), job.settings)
        except SlideError as error:  # only these: an identity mismatch concerns the whole run, and ends it
            return fail_slide(store, job.sample.slide_id, error)
    except FeatureStoreError as error:
        return PermanentFailure(error)
    blocks = blocks_to_read(plan)
    return PlannedSlide(job.sample.slide_id, blocks, plan.n_planned, int(plan.stored.is_tissue.sum()))


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
    """One encoder for all threads of a process; requests that wait are joined into full batches.

    While one block is read another is encoded, and the end of a block does not leave a device with a half-full batch.
    A vector depends on its own patch alone, so joining batches does not change it.

    Parameters
    ----------
    encoder
        Called by one thread only.
    batch
        Patches from which on a batch is full.
    """

    def __init__(self, encoder: Encoder, batch: int = BATCH) -> None:
        self._encoder, self._batch = encoder, batch
        self._requests: SimpleQueue[tuple[NDArray[np.uint8], Future[NDArray[np.float32]]]] = SimpleQueue()
        # A daemon, since a thread that waits for requests must not keep a worker from ending.
        threading.Thread(
            target=self._process_requests, name=f"encode {encoder.identity.key}", daemon=True
        ).start()

    @property
    def identity(self) -> EncoderIdentity:
        """Identity of the encoder."""
        return self._encoder.identity

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch ``(n, side, side, 3)``, perhaps joined with those of other threads; wait for the result."""
        result: Future[NDArray[np.float32]] = Future()
        self._requests.put((patches, result))
        return result.result()

    def _process_requests(self) -> None:
        while True:
            requests = [self._requests.get()]
            side, size = requests[0][0].shape[1:], len(requests[0][0])
            while size < self._batch and not self._requests.empty():
                request = self._requests.get()
                if request[0].shape[1:] != side:  # patches of two sizes cannot be joined
                    self._encode_joined(requests)
                    requests, side, size = [], request[0].shape[1:], 0
                requests.append(request)
                size += len(request[0])
            self._encode_joined(requests)

    def _encode_joined(self, requests: list[tuple[NDArray[np.uint8], Future[NDArray[np.float32]]]]) -> None:
        try:
            together = requests[0][0] if len(requests) == 1 else np.concatenate([p for p, _ in requests])
            vectors = self._encoder.encode(together)
        except BaseException as error:  # noqa: BLE001 -- the waiting threads must get it, whatever it is
            for _, result in requests:
                result.set_exception(error)
            return
        start = 0
        for patches, result in requests:
            result.set_result(vectors[start : start + len(patches)])
            start += len(patches)


class SlidePool:
    """Open slides that threads share. Beyond `size`, slides that are not in use are closed, least recently used first.

    Parameters
    ----------
    size
        Slides that stay open; more are open only while more are in use.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._lock = threading.Lock()
        self._slides: OrderedDict[Hashable, Slide] = OrderedDict()
        self._users: Counter[Hashable] = Counter()

    @contextmanager
    def acquire(self, key: Hashable, make: Callable[[], Slide]) -> Iterator[Slide]:
        """Yield the slide of a key, opened by `make` if it is not open. It stays open until the context ends."""
        with self._lock:  # also while it opens, or two threads would open the slide twice
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
                self._users = +self._users  # drops the keys that count zero
            for unused in closing:
                unused.close()


_slide_pool = SlidePool(OPEN_SLIDES)
_loading_lock = threading.Lock()


def _slide(job: Job) -> AbstractContextManager[Slide]:
    sample = job.sample
    return _slide_pool.acquire(
        (job.run, sample), lambda: open_slide(sample.slide, sample.mpp, fallback_mpp=sample.fallback_mpp)
    )


def _encoders(job: Job) -> dict[str, SharedEncoder]:
    with _loading_lock:  # lru_cache alone would let two threads load the encoders at once
        return _load(job.run, job.settings)


@lru_cache(
    maxsize=1
)  # a second set of networks need not fit into memory: those of an earlier run are dropped
def _load(run: str, settings: EmbedSettings) -> dict[str, SharedEncoder]:
    return {key: SharedEncoder(encoder) for key, encoder in load_encoders(settings).items()}


@lru_cache(maxsize=4 * OPEN_SLIDES)  # a tissue map is small beside an open slide
def _stored(run: str, url: str, slide_id: str, grid_key: str) -> tuple[Store, StoredGrid]:
    store = Store.open(url)
    return store, store.grid(slide_id, grid_key)
