"""Python's cyclic garbage collector, and when it is in the way.

It goes through all objects each time that their number has grown by a quarter. Importing torch and timm makes a third
of a million that all stay: a quarter of the time of these imports (0.7 of 3 CPU-seconds) went into looking for garbage among
them, and another second into doing so once more when the process ends.
"""

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Collect no cyclic garbage in this context: for imports, and for building what is kept.

    Objects that were made meanwhile count as old afterwards. Threads may pause it at once; it goes on once all are done,
    or earlier.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            # Freezing joins all generations to a list of its own, and unfreezing makes that the oldest one. Without it
            # the first collection afterwards would go through everything at once. Who has frozen objects keeps them so.
            if not gc.get_freeze_count():
                gc.freeze()
                gc.unfreeze()
            gc.enable()


def skip_collection_at_exit() -> None:
    """Let the process end without a last search for garbage, which takes a second once torch is loaded.

    For processes of our own: whatever has to be closed or flushed at the end must not wait for the collector.
    """
    # Registered twice it does no harm. What is registered later runs earlier, so nothing of that is left out.
    atexit.register(gc.freeze)
