"""Versions of this package and of those that it is built on."""

import tomllib
from functools import cache
from importlib import metadata
from pathlib import Path

NAME = "histosge"


@cache  # it reads and parses a file of metadata, and every slide and every model records five of them
def version(package: str = NAME) -> str:
    """Return the version of an installed package, or of this checkout where it runs without being installed.

    Raises
    ------
    importlib.metadata.PackageNotFoundError
        If another package is not installed.
    """
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        # On a machine without pip or network, a checkout is used by PYTHONPATH: there are no metadata.
        project = Path(__file__).parents[1] / "pyproject.toml"
        if package != NAME or not project.is_file():
            raise
        return str(tomllib.loads(project.read_text())["project"]["version"])
