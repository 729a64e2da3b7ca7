"""The tasks of a worker process: plan one slide, or embed one block. It knows no dask.

Arguments and results are small and picklable: no pixel and no embedding leaves the process, as 8 MB through a dask
scheduler cost it as much as ten tasks. Encoders are loaded once per process; slides stay open between their blocks.
"""

import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.embedding.block_task import BlockResult, embed_blocks
from featurestore.embedding.costs import Costs, plan_costs
from featurestore.embedding.plan import blocks_to_read, plan_slide
from featurestore.embedding.quality import QualityPlan
from featurestore.embedding.settings import EmbedSettings, load_encoders
from featurestore.embedding.slide_result import ONE_SLIDE, SlideResult, fail_slide, is_of_one_slide
from featurestore.embedding.slide_watch import SlideWatch
from featurestore.encoders.protocol import (
    Encoder,
    EncoderIdentity,
    PendingVectors,
    patches_at_once,
    start_encoding,
)
from featurestore.errors import AccessError, FeatureStoreError
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
    fingerprint
        Of the slide's file: tasks that read another one fail.
    remark
        What the user should know of the slide's scale: a warning in a worker would reach nobody, or in Python's own form.
    costs
        Of planning.
    quality
        As in `featurestore.embedding.plan.SlidePlan`.
    """

    slide_id: str
    blocks: dict[Block, tuple[str, ...]]
    planned: int
    patches: int
    fingerprint: str
    remark: str = ""
    costs: Costs = field(default_factory=Costs)
    quality: QualityPlan = field(default_factory=QualityPlan)


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
    store: str = field(repr=False)
    sample: Sample = field(repr=False)  # dask logs a task's arguments, and a slide's URL may be signed
    settings: EmbedSettings


def check_encoders(job: Job) -> PermanentFailure | None:
    """Load the encoders of a run, so that an unusable one is reported before anything is written."""
    try:
        with _encoders(job):
            return None
    except FeatureStoreError as error:
        return PermanentFailure(error)


def _given_up(error: FeatureStoreError) -> PermanentFailure:
    if isinstance(error, AccessError) and error.is_transient:
        raise error  # dask tries the task again
    return PermanentFailure(error)


def plan_job(job: Job) -> PlannedSlide | SlideResult | PermanentFailure:
    """Write a slide's metadata and list what is missing; a slide that cannot be used is ``failed``."""
    try:
        with _encoders(job) as encoders:
            begun = time.perf_counter()
            store = Store.open(job.store)
            try:
                with _slide(job) as slide:
                    plan = plan_slide(store, slide, job.sample, dict(encoders), job.settings)
                    _watch(job.run, job.sample.slide).check_since_opened()
                    costs = plan_costs(time.perf_counter() - begun, slide)
            except ONE_SLIDE as error:
                if not is_of_one_slide(error):
                    raise
                return fail_slide(store, job.sample, error)
    except FeatureStoreError as error:
        return _given_up(error)
    n_tissue = int(plan.stored.is_tissue.sum())
    return PlannedSlide(
        job.sample.slide_id,
        blocks_to_read(plan),
        plan.n_planned,
        n_tissue,
        plan.fingerprint,
        plan.remark,
        costs,
        plan.quality,
    )


def embed_block(
    job: Job, fingerprint: str, block: Block, keys: tuple[str, ...], judging_focus: bool = False
) -> BlockResult | SlideResult | PermanentFailure:
    """Read, encode and write one block for the encoders that lack it, if the slide still has this fingerprint."""
    try:
        with _encoders(job) as encoders:
            try:
                store, stored = _stored(job.run, job.store, job.sample.slide_id, job.settings.spec.key)
                with _slide(job) as slide:
                    watch = _watch(job.run, job.sample.slide)
                    (result,) = embed_blocks(
                        store,
                        slide,
                        stored,
                        {block: keys},
                        dict(encoders),
                        check_slide=lambda: watch.check(fingerprint),
                        retried=job.settings.retry_failed,
                        judging_focus=judging_focus,
                    )
            except ONE_SLIDE as error:
                if not is_of_one_slide(error):
                    raise
                return fail_slide(Store.open(job.store), job.sample, error)
    except FeatureStoreError as error:
        return _given_up(error)
    return result


_Request = tuple[NDArray[np.uint8], Future[NDArray[np.float32]]]


class SharedEncoder:
    """One encoder for all threads of a process; requests that wait are joined into full batches.

    While one block is read another is encoded, and the end of a block does not leave a device with a half-full batch.
    A vector depends on its own patch alone, so joining batches does not change it.

    Parameters
    ----------
    encoder
        Called by one thread only.
    batch
        Patches from which on a batch is full; by default as many as the encoder asks for.
    """

    def __init__(self, encoder: Encoder, batch: int | None = None) -> None:
        self._encoder, self.batch = encoder, batch or patches_at_once([encoder])
        self._pending: tuple[list[_Request], PendingVectors] | None = None
        self._requests: SimpleQueue[_Request | None] = SimpleQueue()
        # A daemon, since a thread that waits for requests must not keep a worker from ending.
        self._thread = threading.Thread(
            target=self._process_requests, name=f"encode {encoder.identity.key}", daemon=True
        )
        self._thread.start()

    @property
    def identity(self) -> EncoderIdentity:
        """Identity of the encoder."""
        return self._encoder.identity

    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch ``(n, side, side, 3)``, perhaps joined with those of other threads; wait for the result."""
        return self.start(patches)()

    def start(self, patches: NDArray[np.uint8]) -> PendingVectors:
        """Hand over a batch as `encode` does; what is returned waits for its vectors."""
        result: Future[NDArray[np.float32]] = Future()
        self._requests.put((patches, result))
        return result.result

    def close(self) -> None:
        """End the thread, which holds the encoder in memory as long as it waits; nobody may call `encode` any more."""
        self._requests.put(None)
        self._thread.join()

    def _process_requests(self) -> None:
        while (first := self._requests.get()) is not None:
            requests = [first]
            side, size = first[0].shape[1:], len(first[0])
            while size < self.batch and not self._requests.empty():
                request = self._requests.get()
                if request is None:
                    self._requests.put(None)  # for the outer loop
                    break
                if request[0].shape[1:] != side:  # patches of two sizes cannot be joined
                    self._encode_joined(requests)
                    requests, side, size = [], request[0].shape[1:], 0
                requests.append(request)
                size += len(request[0])
            self._encode_joined(requests)
        self._deliver()

    def _encode_joined(self, requests: list[_Request]) -> None:
        try:
            together = requests[0][0] if len(requests) == 1 else np.concatenate([p for p, _ in requests])
            pending = start_encoding(self._encoder, together)
        except BaseException as error:  # noqa: BLE001 -- the waiting threads must get it, whatever it is
            for _, result in requests:
                result.set_exception(error)
            self._deliver()  # the batch before is not to wait for a next one
            return
        # The device has its next work before the vectors of the last are fetched; with nothing more to do, fetch these.
        self._deliver()
        self._pending = requests, pending
        if self._requests.empty():
            self._deliver()

    def _deliver(self) -> None:
        """Wait for the batch on the device, if there is one, and give each request its part."""
        if self._pending is None:
            return
        (requests, pending), self._pending = self._pending, None
        try:
            vectors = pending()
        except BaseException as error:  # noqa: BLE001 -- as above
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
        self._opening: dict[Hashable, threading.Lock] = {}
        self._users: Counter[Hashable] = Counter()

    @contextmanager
    def acquire(self, key: Hashable, make: Callable[[], Slide]) -> Iterator[Slide]:
        """Yield the slide of a key, opened by `make` if it is not open. It stays open until the context ends.

        One thread opens a slide while the others that need it wait; nobody waits for another slide, which may have to
        be downloaded first.
        """
        with self._lock:
            self._users[key] += 1
            opening = self._opening.setdefault(key, threading.Lock())
        try:
            with opening:
                with self._lock:
                    slide = self._slides.get(key)
                if slide is None:
                    slide = make()
                with self._lock:
                    self._slides[key] = slide
                    self._slides.move_to_end(key)
            yield slide
        finally:
            with self._lock:
                self._users[key] -= 1
                if not self._users[key]:
                    self._opening.pop(key, None)
                idle = [k for k in self._slides if not self._users[k]]
                closing = [self._slides.pop(k) for k in idle[: max(0, len(self._slides) - self._size)]]
                self._users = +self._users  # drops the keys that count zero
            for unused in closing:
                unused.close()


@dataclass
class _LoadedRun:
    """The encoders of earlier runs that make room, one run's own, and how many tasks use these now."""

    replaced: list[SharedEncoder]
    encoders: dict[str, SharedEncoder] | None = None
    n_users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


class EncoderPool:
    """The encoders of the runs that a process works for; those of earlier runs are released when a new one starts.

    A worker may live for many runs, and a second set of networks need not fit into the memory of a device. No run says
    when it ends. Runs that take turns on one worker keep their encoders: only the first task of a run releases others.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._runs: dict[str, _LoadedRun] = {}
        self._seen: set[str] = set()

    @contextmanager
    def acquire(
        self, run: str, load: Callable[[], Mapping[str, Encoder]]
    ) -> Iterator[Mapping[str, SharedEncoder]]:
        """Yield the encoders of a run by key, loaded by its first task. They stay until the context ends."""
        with self._lock:
            loaded = self._runs.get(run)
            if loaded is None:
                replaced = [] if run in self._seen else self._drop_idle()
                loaded = self._runs[run] = _LoadedRun(replaced)
                self._seen.add(run)
                del replaced
            loaded.n_users += 1
        try:
            # A lock of this run alone: weights that are downloaded do not stop the tasks of others.
            with loaded.lock:
                # Before the new ones are loaded, whichever task comes first. Popped, since a variable of a loop would
                # keep the last one in memory.
                while loaded.replaced:
                    loaded.replaced.pop().close()
                if loaded.encoders is None:
                    loaded.encoders = {key: SharedEncoder(encoder) for key, encoder in load().items()}
            yield loaded.encoders
        finally:
            with self._lock:
                loaded.n_users -= 1

    def _drop_idle(self) -> list[SharedEncoder]:
        idle = [run for run, loaded in self._runs.items() if not loaded.n_users]
        dropped = [self._runs.pop(run) for run in idle]
        return [encoder for loaded in dropped for encoder in (loaded.encoders or {}).values()]


_slide_pool = SlidePool(OPEN_SLIDES)
_encoder_pool = EncoderPool()


def _slide(job: Job) -> AbstractContextManager[Slide]:
    sample = job.sample
    _watch(job.run, sample.slide)  # before the slide is opened
    return _slide_pool.acquire(
        (job.run, sample), lambda: open_slide(sample.slide, sample.mpp, fallback_mpp=sample.fallback_mpp)
    )


def _encoders(job: Job) -> AbstractContextManager[Mapping[str, SharedEncoder]]:
    return _encoder_pool.acquire(job.run, lambda: load_encoders(job.settings))


# Many more than are open at once: a slide that is opened again is compared with what it was.
@lru_cache(maxsize=1024)
def _watch(run: str, path: str) -> SlideWatch:
    return SlideWatch(path)


@lru_cache(maxsize=4 * OPEN_SLIDES)  # a tissue map is small beside an open slide
def _stored(run: str, url: str, slide_id: str, grid_key: str) -> tuple[Store, StoredGrid]:
    store = Store.open(url)
    return store, store.grid(slide_id, grid_key)
