"""Clients of dask: worker processes on this machine, or a scheduler that runs already, of the same version as here."""

import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster
from distributed.client import FutureCancelledError
from distributed.comm import CommClosedError
from distributed.diagnostics.plugin import WorkerPlugin

from featurestore.cores import count_cores
from featurestore.embedding.gpu_sharing import (
    MAX_GPU_THREADS,
    auto_workers,
    visible_gpus,
    worker_environments,
)
from featurestore.embedding.limits import check_address, check_dashboard, check_workers
from featurestore.embedding.memory_model import memory_bytes
from featurestore.errors import ClusterError, ClusterWarning
from featurestore.file_systems import anonymous_settings
from featurestore.software import version as own_version

PACKAGE = "histosge"
THREADS_PER_WORKER = 2
"""Tasks at once in a local worker: one block is read while another is encoded."""
ALLOWED_WORKER_DEATHS = 1
"""Further workers that a task may lose before dask gives it up. Of a remote scheduler its own setting counts."""

CONNECT_TIMEOUT_S = 10
"""A scheduler that does not answer for so long is taken for not running."""
SCHEDULER_LOST = (
    "the scheduler went away; every block that is written stays: run the same command again to go on"
)

LOOPBACK = "127.0.0.1"


@contextmanager
def local_client(
    workers: int, threads: int | None = None, *, gpus: Sequence[str] = (), dashboard: int | None = None
) -> Iterator[Client]:
    """Start worker processes on this machine; each gets an equal share of the cores.

    Parameters
    ----------
    workers
        Processes.
    threads
        Tasks at once in each; by default `THREADS_PER_WORKER`, and with a GPU as many as the cores allow that read for it.
    gpus
        Names of the GPUs that the workers share, as `visible_gpus` returns them. Each worker sees one of them alone, also
        after it died and was started again.
    dashboard
        Port of dask's dashboard, which only this machine can reach; None for no dashboard.

    Yields
    ------
    distributed.Client
        Connected; the processes end with the context.
    """
    check_workers(workers)
    _mute_library_logs()
    counted = count_cores()
    cores = max(1, min(counted.cores // workers, counted.threads))
    if threads is None:
        threads = max(THREADS_PER_WORKER, min(cores, MAX_GPU_THREADS)) if gpus else THREADS_PER_WORKER
    # Otherwise every process computes with as many threads as there are cores, and they get in each other's way.
    thread_limits = {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    settings = {
        "distributed.scheduler.allowed-failures": ALLOWED_WORKER_DEATHS,
        "distributed.nanny.pre-spawn-environ": thread_limits,
        "distributed.admin.system-monitor.gil.enabled": False,
        # Files that are mapped into memory count as the process's own, and are no reason to kill it.
        "distributed.worker.memory.terminate": False,
    }
    common = {
        "host": LOOPBACK,
        "protocol": "tcp://",
        "nthreads": threads,
        "memory_limit": memory_bytes() // workers,
        "dashboard": False,
        "silence_logs": 50,
    }
    # Not LocalCluster, whose workers all get the same options: a nanny passes its own environment to each process that
    # it starts, the first and those after a death, before the process imports anything of ours.
    specs = {
        number: {"cls": Nanny, "options": {**common, "env": environment}}
        for number, environment in enumerate(worker_environments(gpus, workers))
    }
    scheduler = {
        "cls": Scheduler,
        "options": {
            "host": LOOPBACK,
            "protocol": "tcp://",
            "port": 0,
            "dashboard": dashboard is not None,
            # Without a dashboard there is an HTTP server all the same: on any free port, and for this machine alone.
            "dashboard_address": f"{LOOPBACK}:{dashboard or 0}",
        },
    }
    with (
        # A nanny sets them in this process, too, where they would stay.
        _restored_environment(thread_limits),
        dask.config.set(settings),
        _closed_at_end(SpecCluster(workers=specs, scheduler=scheduler, silence_logs=50)) as cluster,
        Client(cluster) as client,
    ):
        yield client


@contextmanager
def _closed_at_end(cluster: SpecCluster) -> Iterator[SpecCluster]:
    try:
        yield cluster.__enter__()
    finally:
        # Not by its own `__exit__`, which raises where a worker takes longer to end than the few seconds that dask waits
        # (2026.8), as on a busy machine. What it was to do is done by then, and it ends with this process at the latest.
        with suppress(TimeoutError):
            cluster.close()


def gpu_client(
    workers: int | Literal["auto"], device: str = "auto", dashboard: int | None = None
) -> AbstractContextManager[Client]:
    """Start worker processes on this machine, each with a GPU of its own where there are GPUs; see `local_client`.

    Parameters
    ----------
    workers
        Processes; ``auto`` is one for each GPU that is visible, or one for every two cores. More than there are GPUs share
        them.
    device
        ``cpu`` if no GPU is to be used.
    dashboard
        Port of dask's dashboard.

    Raises
    ------
    ClusterError
        If there would be too many processes, or the dashboard cannot be shown.
    """
    if dashboard is not None:
        check_dashboard(dashboard)
    gpus = () if device == "cpu" else visible_gpus()
    if workers == "auto":
        workers = auto_workers(gpus, count_cores().cores)
    return local_client(workers, gpus=gpus, dashboard=dashboard)


@contextmanager
def _restored_environment(names: Iterable[str]) -> Iterator[None]:
    """Give variables of this process their values back at the end."""
    before = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        _set_environment(before)


def _set_environment(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


class _AnonymousAccess(WorkerPlugin):  # type: ignore[misc]  # distributed has no types
    """Gives the workers of a running cluster this process's `anonymous_access`, while its client is connected.

    Local workers inherit the environment; those of a scheduler have one of their own.
    """

    name = "histosge-anonymous-access"

    def __init__(self, settings: dict[str, str]) -> None:
        self._settings = settings
        self._before: dict[str, str | None] = {}

    def setup(self, worker: Any) -> None:
        """Set the variables."""
        self._before = {name: os.environ.get(name) for name in self._settings}
        os.environ.update(self._settings)

    def teardown(self, worker: Any) -> None:
        """Set them back."""
        _set_environment(self._before)


@contextmanager
def remote_client(address: str) -> Iterator[Client]:
    """Connect to a scheduler that runs already.

    A `ClusterWarning` says so if it has no worker yet: a cluster that grows on demand starts them once there is work, and
    with one whose workers died a run waits.

    Yields
    ------
    distributed.Client
        Connected.

    Raises
    ------
    ClusterError
        If it does not answer.
    """
    check_address(address)
    _mute_library_logs()
    try:
        client = Client(address, timeout=CONNECT_TIMEOUT_S)
    # TypeError and RuntimeError: tls without certificates, ucx without its package.
    except (OSError, TimeoutError, ValueError, TypeError, RuntimeError, ImportError) as error:
        raise ClusterError(f"no scheduler answers at {address} ({type(error).__name__}: {error})") from error
    with client:
        settings = anonymous_settings()
        if settings:
            client.register_plugin(_AnonymousAccess(settings))
        if not client.nthreads():
            warnings.warn(
                f"the scheduler at {address} has no workers yet: the work waits until one joins",
                ClusterWarning,
                stacklevel=3,
            )
        try:
            yield client
        finally:
            if settings and client.status == "running":
                client.unregister_worker_plugin(_AnonymousAccess.name)


def _mute_library_logs() -> None:
    """Keep the logs of dask off the terminal: an error of a run is one line of ours."""
    for name in list(logging.root.manager.loggerDict):
        if name.split(".")[0] in ("distributed", "tornado", "asyncio"):
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)


@contextmanager
def scheduler_loss_as_error(client: Client, message: str = SCHEDULER_LOST) -> Iterator[None]:
    """Raise a `ClusterError` for each of the errors that a client raises once its scheduler is lost.

    Parameters
    ----------
    message
        Of the error: what happened, and what to do.

    Raises
    ------
    ClusterError
        If the scheduler went away.
    """
    try:
        yield
    except (CancelledError, FutureCancelledError, CommClosedError) as error:
        raise ClusterError(message) from error
    except OSError as error:
        # A scheduler that dies while a result is fetched shows as an OSError, and so does a worker's full disk.
        if client.status == "running":
            raise
        raise ClusterError(message) from error


def check_versions(client: Client) -> None:
    """Refuse a cluster whose workers run another version of this package than this process.

    Raises
    ------
    ClusterError
        With both versions.
    """
    # A function of Python's own, which any worker can call.
    for worker, found in sorted(client.run(version, PACKAGE, on_error="return").items()):
        if isinstance(found, PackageNotFoundError):
            raise ClusterError(f"worker {worker} has no {PACKAGE}; install version {own_version()} there")
        if isinstance(found, str):
            check_version(found, own_version(), worker)


def check_version(found: str, wanted: str, worker: str) -> None:
    """Refuse a worker of another version.

    Raises
    ------
    ClusterError
        With both versions.
    """
    if found != wanted:
        raise ClusterError(
            f"worker {worker} runs {PACKAGE} {found} and this process {wanted}; install the same version on both"
        )
