"""Where sections are visited: in this process, by worker processes of this machine, or by a running cluster."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from histosge.threads import usable_cores
from histosge.training.streaming.section_tasks import InThisProcess, SectionTasks


@contextmanager
def open_tasks(
    workers: int | Literal["auto"] | None, scheduler: str | None, n_sections: int
) -> Iterator[SectionTasks]:
    """Start worker processes, or connect to a cluster, for the time of a training; neither where both are None.

    Parameters
    ----------
    workers
        Processes on this machine, ``auto`` for one per core; no more are started than there are sections.
    scheduler
        Instead, the address of a running dask scheduler, whose workers see the same store and expression files.

    Raises
    ------
    ClusterError
        If the scheduler does not answer, there would be too many processes, or a worker runs another version of this
        package.
    """
    if workers is None and scheduler is None:
        yield InThisProcess()
        return
    # Here, since a training in one process needs no dask.
    from featurestore.analysis.cluster_stream import connect
    from featurestore.cores import count_cores
    from histosge.training.streaming.cluster_tasks import ClusterTasks

    wanted = count_cores().cores if workers in ("auto", None) else int(workers or 1)
    with connect(min(wanted, n_sections), scheduler) as client:
        # Worker processes of this machine are idle meanwhile; those of a cluster are elsewhere.
        here = usable_cores() if scheduler is not None else min(wanted, count_cores().cores)
        yield ClusterTasks(client, here)
