"""What a second dask worker gives: see `_distributed.py`, which has the code.

    python benchmarks/distributed.py [--quick] [--json FILE]

dask's own package has this file's name. Whoever imports that name with this folder on the path means dask, so this file
puts dask's package in its own place when it is imported.
"""

import importlib
import sys
from pathlib import Path


def _import_dask() -> None:
    before, here = sys.path[:], Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    sys.modules.pop("distributed", None)
    try:
        importlib.import_module("distributed")
    finally:
        sys.path[:] = before


# Also in the processes that multiprocessing spawns: they import this file again, and take over the path.
_import_dask()

if __name__ == "__main__":
    from _distributed import main

    main()
