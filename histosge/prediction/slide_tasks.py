"""Predict slides in parallel: one task is one slide, and only its process writes that slide's map.

Only names are sent to the workers. A task whose worker dies is run again, and computes the blocks that are missing then.
Loads dask when called, not when imported.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

from histosge.errors import ModelError

Result = TypeVar("Result")


def map_slides(
    run: Callable[[str], Result], slide_ids: Sequence[str], workers: int, done: Callable[[str, Result], None]
) -> list[Result]:
    """Call `run` for every slide in worker processes on this machine.

    Parameters
    ----------
    run
        Must pickle, and must be safe to run twice.
    slide_ids
        In the order in which results are returned.
    workers
        Processes; no more are started than there are slides.
    done
        Called here after each slide.

    Raises
    ------
    ModelError
        If a slide kills its worker more often than dask allows.
    Exception
        Whatever `run` raised for a slide; the maps of the others stay on disk.
    """
    # Imported here: a prediction in one process needs no dask.
    from distributed import KilledWorker, as_completed

    from featurestore.embedding.dask_cluster import local_client

    # One thread each: two slides in one process would compete for its cores and share its memory limit.
    with local_client(min(workers, len(slide_ids)), threads=1) as client:
        # Not pure: dask must not take a result of an earlier call for the same arguments.
        futures = [client.submit(run, slide_id, pure=False) for slide_id in slide_ids]
        names = dict(zip(futures, slide_ids, strict=True))
        results: dict[str, Result] = {}
        for future in as_completed(futures):
            slide_id = names[future]
            try:
                results[slide_id] = future.result()
            except KilledWorker as error:
                raise ModelError(
                    f"slide {slide_id!r} kills the process that predicts it, probably for lack of memory; blocks that "
                    "are written stay: run the same command again with fewer --workers"
                ) from error
            done(slide_id, results[slide_id])
    return [results[slide_id] for slide_id in slide_ids]
