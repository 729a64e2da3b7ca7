"""What a run may be: refused with numbers before a slide is opened, since a mistyped stride takes gigabytes."""

import math
import socket
from importlib.util import find_spec
from urllib.parse import urlsplit

from featurestore.cores import count_cores
from featurestore.errors import ClusterError, StoreError
from featurestore.grid import GridSpec

MPP_LIMITS = (0.01, 1000.0)
"""Microns per pixel of patches. The finest scanners give 0.1; at 1,000 a whole slide is 25 pixels wide."""
MIN_PATCH_PX, MAX_PATCH_PX = 4, 8192
"""Side of a patch: regions of 4,096 px are in use. A batch of 64 patches of this side takes 13 GB."""
MAX_OVERLAP = 1024
"""How often a pixel may be encoded: 32 steps a patch in each direction. Dense grids in use have 2 to 16 steps."""
WORKERS_PER_CORE, MIN_MAX_WORKERS = 4, 32
"""A process takes 300 MB with its libraries alone, and more than one a core gain only where reading waits."""
MAX_PORT = 65535
SCHEMES = ("tcp", "tls", "ws", "wss", "ucx")
"""Of dask's addresses, those with a host and a port; ``inproc`` reaches no other process."""


def check_spec(spec: GridSpec) -> None:
    """Refuse a grid that no slide can have.

    Raises
    ------
    StoreError
        With the value, the limit, and the option.
    """
    spec = spec.encoded  # of a token grid, what an encoder sees
    lowest, highest = MPP_LIMITS
    if not lowest <= spec.mpp <= highest:
        raise StoreError(
            f"--mpp {spec.mpp:g} is outside {lowest:g}..{highest:g} microns per pixel; 0.5 is 20x, 0.25 is 40x"
        )
    if spec.patch_px < MIN_PATCH_PX:
        raise StoreError(
            f"--patch {spec.patch_px} is too small to show anything; give {MIN_PATCH_PX} px or more"
        )
    if spec.patch_px > MAX_PATCH_PX:
        raise StoreError(
            f"--patch {spec.patch_px} is more than {MAX_PATCH_PX} px a side: one patch would take "
            f"{3 * spec.patch_px**2 / 1e9:.3g} GB; for larger areas give a coarser --mpp"
        )
    if spec.stride_px > spec.patch_px * MAX_PATCH_PX:
        raise StoreError(f"--stride {spec.stride_px} is longer than any slide; leave it out for --patch")
    overlap = (spec.patch_px / spec.stride_px) ** 2
    if overlap > MAX_OVERLAP:
        least = math.ceil(spec.patch_px / math.sqrt(MAX_OVERLAP))
        raise StoreError(
            f"--stride {spec.stride_px} with --patch {spec.patch_px} encodes every pixel {overlap:,.0f} times, more than "
            f"{MAX_OVERLAP:,}; give --stride {least} or more"
        )


def check_workers(workers: int) -> None:
    """Refuse more worker processes than a machine can hold.

    Raises
    ------
    ClusterError
        With the number of cores.
    """
    cores = count_cores().cores
    most = max(MIN_MAX_WORKERS, WORKERS_PER_CORE * cores)
    if not 1 <= workers <= most:
        raise ClusterError(
            f"{workers} worker processes for the {cores} cores of this process: give 1 to {most}, one a core is best"
        )


def check_dashboard(port: int) -> None:
    """Refuse a dashboard that cannot be shown.

    Raises
    ------
    ClusterError
        If the port cannot be had, or the package that draws the pages is missing.
    """
    if find_spec("bokeh") is None:
        raise ClusterError(
            "--dashboard needs a package that draws its pages; install it with: pip install 'histosge[dashboard]'"
        )
    if not 1 <= port <= MAX_PORT:
        raise ClusterError(f"--dashboard {port} is no port; give 1 to {MAX_PORT}, such as 8787")
    # Here, since dask would take another port and tell nobody.
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ClusterError(
                f"--dashboard {port}: this port cannot be had ({error.strerror}); give another one"
            ) from error


def check_address(address: str) -> None:
    """Refuse what cannot be a dask scheduler's address, before anything waits for an answer.

    Raises
    ------
    ClusterError
        With the form that it needs.
    """
    example = "write it as the scheduler prints it, such as tcp://host:8786"
    try:
        parts = urlsplit(address if "://" in address else f"tcp://{address}")
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ClusterError(f"--scheduler {address[:100]!r} is no address ({error}); {example}") from error
    if parts.scheme not in SCHEMES:
        raise ClusterError(
            f"--scheduler {address[:100]!r}: only {', '.join(f'{s}://' for s in SCHEMES)} are known; {example}"
        )
    if not host or not port:
        raise ClusterError(f"--scheduler {address[:100]!r} names no host and port; {example}")
