"""What became of each slide of a run, and which errors concern one slide only.

Whatever goes wrong inside one slide, in its file or in its part of the store, is that slide's failure: the other
slides of the run go on. What concerns all of them (encoders, a full disk, a store that cannot be reached) ends the run.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from featurestore.embedding.costs import Costs
from featurestore.errors import AccessError, IdentityMismatchError, SlideError, StoreError, StoreNotFoundError
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.layout import failure_path
from featurestore.storage.private_text import remove_names
from featurestore.storage.store import Store
from featurestore.wording import counted

ONE_SLIDE = (SlideError, StoreError, MemoryError)
"""Errors of the work on one slide that concern that slide; `is_of_one_slide` names the exception."""


@dataclass(frozen=True)
class SlideResult:
    """What became of one slide in one run.

    Parameters
    ----------
    state
        ``done``, ``failed`` (see `reason`) or ``planned`` (dry run).
    planned, computed
        Objects that belong in the store, and those that this run wrote, over all encoders.
    patches
        Tissue patches on the grid.
    skipped
        Tissue patches that were left out for their quality flags; they are not among `patches`.
    flags
        Name of a quality flag -> share of the tissue patches (dry run).
    unreadable
        Patches without a vector in the blocks of this run: not readable, or not encoded to finite numbers.
    bytes_to_store
        Size of the objects (dry run).
    seconds
        Time to compute them on this device, estimated from a few batches (dry run).
    worker_bytes
        Memory that a process working on it will hold at most, one block at a time (dry run).
    mismatch
        Whether it failed because the store holds it from another file, or with another scale, grid, tissue or encoder.
    costs
        Time, bytes and requests of this run; of a slide that failed only those of the blocks that were finished on a
        cluster.
    """

    slide_id: str
    state: str
    reason: str = ""
    planned: int = 0
    computed: int = 0
    patches: int = 0
    unreadable: int = 0
    bytes_to_store: int = 0
    seconds: float = 0.0
    worker_bytes: int = 0
    mismatch: bool = False
    costs: Costs = field(default_factory=Costs)
    skipped: int = 0
    flags: dict[str, float] = field(default_factory=dict)


OnResult = Callable[[SlideResult], None]
"""Called with each slide's result as soon as it is known: done, failed, or nothing to do."""


def ignore_result(result: SlideResult) -> None:
    """Ignore a result."""


def is_of_one_slide(error: Exception) -> bool:
    """Tell whether an error of the work on one slide concerns that slide alone; if not, it ends the run."""
    return isinstance(error, ONE_SLIDE) and not isinstance(error, (StoreNotFoundError, AccessError))


def fail_slide(store: Store | None, sample: Sample, error: Exception) -> SlideResult:
    """Record in the store, if there is one, why a slide could not be embedded; return its result."""
    slide_id, reason = sample.slide_id, str(error)
    if isinstance(error, MemoryError):
        reason = f"there is too little memory for it ({reason or 'MemoryError'}); use fewer workers, or smaller patches"
    if sample.is_private:
        # Here, since the result goes into the run's report and log, too.
        files = [name for name in (sample.slide, sample.mask, sample.expression) if name]
        reason = remove_names(reason, files, [slide_id])
    if isinstance(error, IdentityMismatchError):
        # Recorded by `settle_mismatches`: if the whole run is a mistake, the store must not call its slides failed.
        return SlideResult(slide_id, "failed", reason, mismatch=True)
    if store is not None:
        store.record_failure(failure_path(slide_id), {"slide_id": slide_id, "reason": reason})
    return SlideResult(slide_id, "failed", reason)


def settle_mismatches(store: Store, results: Sequence[SlideResult]) -> None:
    """Record the slides that were refused, at the end of a run, unless all were: then the run itself was a mistake.

    Raises
    ------
    IdentityMismatchError
        If the store holds every slide of the run from another source or with other settings.
    """
    refused = [result for result in results if result.mismatch]
    if refused and len(refused) == len(results):
        more = f" (and {counted(len(refused) - 1, 'slide')} more)" if len(refused) > 1 else ""
        raise IdentityMismatchError(refused[0].reason + more)
    for result in refused:
        store.record_failure(
            failure_path(result.slide_id), {"slide_id": result.slide_id, "reason": result.reason}
        )
