"""What tests share: where the public data lies, and which markers run here."""

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest

DATA = Path(os.environ.get("HISTOSGE_DATA", Path(__file__).parents[2] / "shared" / "data"))


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def find_chromium() -> str | None:
    """Where Chromium lies: ``HISTOSGE_CHROMIUM``, or the system's."""
    names = (os.environ.get("HISTOSGE_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take more than ten seconds")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    absent = {}
    if not (DATA / "cohort.csv").is_file():
        absent["data"] = "no public sections: set HISTOSGE_DATA to their folder"
    if not config.getoption("--slow"):
        absent["slow"] = "run them with: pytest --slow"
    if find_chromium() is None:
        absent["browser"] = "no Chromium: apt-get install chromium, or set HISTOSGE_CHROMIUM"
    elif find_spec("playwright") is None:
        absent["browser"] = "no playwright: pip install playwright"
    if find_spec("spatialdata_io") is None:
        absent["spatialdata"] = "install them: pip install 'histosge[spatialdata]' spatialdata-io"
    if not _has_gpu():
        absent["gpu"] = "no CUDA device"
    for marker, reason in absent.items():
        gone = [item for item in items if item.get_closest_marker(marker)]
        if gone:
            items[:] = [item for item in items if item not in gone]
            config.hook.pytest_deselected(items=gone)
            terminal = config.pluginmanager.get_plugin("terminalreporter")
            if terminal is not None:
                terminal.write_line(f"{len(gone)} tests marked {marker} deselected: {reason}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def chromium_path() -> str:
    found = find_chromium()
    assert found is not None
    return found
