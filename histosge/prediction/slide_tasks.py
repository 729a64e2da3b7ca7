"""Predict slides in parallel: one task is one slide, and only its process writes that slide's map.

Only names are sent to the workers. A task whose worker dies is run again, and computes the blocks that are missing then.
Loads dask when called, not when imported.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Literal, TypeVar

from featurestore.cores import count_cores
from histosge.errors import ModelError

SLIDES_PER_THREAD = 2
"""Slides that the scheduler holds at once: one that is predicted, and one that waits, so that no worker idles."""

Result = TypeVar("Result")


def map_slides(
    run: Callable[[str], Result],
    slide_ids: Sequence[str],
    workers: int | Literal["auto"],
    done: Callable[[str, Result], None],
    scheduler: str | None = None,
) -> list[Result]:
    """Call `run` for every slide in worker processes on this machine, or on a running cluster.

    Parameters
    ----------
    run
        Must pickle, and must be safe to run twice.
    slide_ids
        In the order in which results are returned.
    workers
        Processes, ``auto`` for one per core; no more are started than there are slides.
    done
        Called here after each slide.
    scheduler
        Address of a running dask scheduler, in place of processes; its workers see the same store, model and maps.

    Raises
    ------
    ModelError
        If a slide kills its worker more often than dask allows.
    ClusterError
        If the scheduler does not answer or goes away, or a worker runs another version of this package.
    Exception
        Whatever `run` raised for a slide; the maps of the others stay on disk.
    """
    # Imported here: a prediction in one process needs no dask.
    from distributed import Future, KilledWorker, as_completed

    from featurestore.analysis.cluster_stream import connect
    from featurestore.embedding.dask_clients import check_versions, scheduler_loss_as_error

    cores = count_cores().cores
    processes = min(cores if workers == "auto" else workers, len(slide_ids))
    with connect(processes, scheduler) as client, scheduler_loss_as_error(client):
        check_versions(client)
        window = SLIDES_PER_THREAD * max(1, sum(client.nthreads().values()))
        waiting = iter(slide_ids)
        names: dict[Future, str] = {}
        results: dict[str, Result] = {}
        completions = as_completed()

        def submit(slide_id: str) -> None:
            # Not pure: dask must not take a result of an earlier call for the same arguments.
            future = client.submit(run, slide_id, pure=False)
            names[future] = slide_id
            completions.add(future)

        for slide_id in islice(waiting, window):
            submit(slide_id)
        for future in completions:
            slide_id = names.pop(future)
            try:
                results[slide_id] = future.result()
            except KilledWorker as error:
                raise ModelError(
                    f"slide {slide_id!r} kills the process that predicts it, probably for lack of memory; blocks that "
                    "are written stay: run the same command again with fewer --workers"
                ) from error
            done(slide_id, results[slide_id])
            for following in islice(waiting, 1):
                submit(following)
    return [results[slide_id] for slide_id in slide_ids]
