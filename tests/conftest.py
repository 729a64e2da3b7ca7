"""What tests share: one thread for each library, where the public data lies, and which tests run here."""

import gc
import os
import shutil
import socketserver
import sys
from collections.abc import Callable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from threadpoolctl import threadpool_limits

from featurestore.cores import count_cores

# One thread for each library, here and in child processes: on cores that another process uses, too,
# threads that spin for each other made three test files take 250 CPU-seconds instead of 13.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["MKL_NUM_THREADS"] = "1"
# zarr's pytest plugin has loaded numpy before this file is read: too late for the environment.
threadpool_limits(1)
# Where Python may not keep bytecode, each child process compiles about 1,500 modules anew: 3 CPU-seconds.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

_report_error = socketserver.BaseServer.handle_error


def _report_own_error(server: socketserver.BaseServer, request: Any, client_address: Any) -> None:
    if not isinstance(sys.exc_info()[1], ConnectionError):
        _report_error(server, request, client_address)


# Servers of the tests run in threads of the tests' process. A client that closes its connection is no error of theirs,
# and the traceback that they print would stand in what a command prints that runs meanwhile.
socketserver.BaseServer.handle_error = _report_own_error  # type: ignore[method-assign]

DATA = Path(os.environ.get("HISTOSGE_DATA", Path(__file__).parents[2] / "shared" / "data"))
TORCH = ("torch", "torchvision", "timm")


def _has_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None


def find_chromium() -> str | None:
    """Where Chromium lies: ``HISTOSGE_CHROMIUM``, or the system's."""
    names = (os.environ.get("HISTOSGE_CHROMIUM", ""), "chromium", "chromium-browser", "google-chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


def find_azurite() -> str | None:
    """Where the blob server of azurite is: ``HISTOSGE_AZURITE``, on the path, or where `.ci/run` installs it."""
    installed = Path(__file__).parents[1] / ".venv" / "azurite" / "node_modules" / ".bin"
    places = f"{os.environ.get('PATH', '')}:{installed}"
    return os.environ.get("HISTOSGE_AZURITE") or shutil.which("azurite-blob", path=places)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run tests that take more than ten seconds")
    parser.addoption(
        "--e2e", action="store_true", help="also run tests of whole runs in processes of their own"
    )


PACKAGES = {
    "azure": (("adlfs",), "install it: pip install 'histosge[azure]'"),
    "formats": (("pylibCZIrw", "isyntax", "czifile"), "install: pip install 'histosge[czi,isyntax]' czifile"),
    "gcs": (("gcsfs", "gcp_storage_emulator"), "install: pip install 'histosge[gcs]' gcp-storage-emulator"),
    "napari": (
        ("napari_spatialdata", "qtpy", "spatialdata"),
        "install it, best in an environment of its own: pip install 'histosge[spatialdata]' 'napari-spatialdata[all]'",
    ),
    "qubalab": (("qubalab",), "install it: pip install qubalab"),
    "spatialdata": (("spatialdata_io",), "install them: pip install 'histosge[spatialdata]' spatialdata-io"),
    "spatialdata_plot": (("spatialdata_plot",), "install it: pip install spatialdata-plot"),
    "torch": (("torch",), "no torch: pip install torch"),
}
"""Marker -> the modules that its tests import, and how to get them."""


def _absent(config: pytest.Config) -> dict[str, str]:
    """Markers of tests that do not run here, each with the reason."""
    absent = {}
    if not (DATA / "cohort.csv").is_file():
        absent["data"] = "no public sections: set HISTOSGE_DATA to their folder"
    if not config.getoption("--slow"):
        absent["slow"] = "run them with: pytest --slow"
    if not config.getoption("--e2e"):
        absent["e2e"] = "run them with: pytest --e2e"
    if find_chromium() is None:
        absent["browser"] = "no Chromium: apt-get install chromium, or set HISTOSGE_CHROMIUM"
    elif find_spec("playwright") is None:
        absent["browser"] = "no playwright: pip install playwright"
    for marker, (modules, fix) in PACKAGES.items():
        if any(find_spec(name) is None for name in modules):
            absent[marker] = fix
    if find_azurite() is None:
        absent.setdefault("azure", "no azurite: npm install azurite, or set HISTOSGE_AZURITE")
    if not _has_gpu():
        absent["gpu"] = "no CUDA device"
    return absent


def _print(config: pytest.Config, line: str) -> None:
    """Print a line; the processes of ``-n`` each collect all tests, and the first of them hands its lines over."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is not None:
        terminal.write_line(line)
    elif getattr(config, "workerinput", {}).get("workerid") == "gw0":
        config.workeroutput.setdefault("lines", []).append(line)  # type: ignore[attr-defined]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Print what the first process of ``-n`` left out."""
    for line in getattr(node, "workeroutput", {}).get("lines", ()):
        _print(node.config, line)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the processes of ``-n auto``: one a core that is ours; xdist itself counts those of the machine."""
    return count_cores().cores


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for marker, reason in _absent(config).items():
        gone = [item for item in items if item.get_closest_marker(marker)]
        if gone:
            items[:] = [item for item in items if not item.get_closest_marker(marker)]
            config.hook.pytest_deselected(items=gone)
            _print(config, f"{len(gone)} tests marked {marker} deselected: {reason}")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Keep the garbage collector away from what collecting imports, also later: each full collection costs 0.5 s."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


# ---------------------------------------------------------------- without torch


def _lacks_torch(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, is that torch is not installed."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and str(error.name).split(".")[0] in TORCH:
            return True
        error = error.__cause__ or error.__context__
    return False


class WithoutTorch:
    """Other Pythons have no CPU build of torch: what needs it is left out there, and named.

    A module that needs torch to be imported is deselected whole. A test that needs it only when it runs
    is known by its error alone, so it is reported as skipped.
    """

    def __init__(self) -> None:
        self.modules: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector: pytest.Collector) -> Iterator[None]:
        report = yield
        call = getattr(report, "call", None)
        if report.failed and call is not None and _lacks_torch(call.excinfo.value):
            self.modules.append(collector.nodeid)
            report.outcome, report.longrepr, report.result = "passed", None, []
            del report.call
        return report

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
        report = yield
        if report.failed and call.excinfo is not None and _lacks_torch(call.excinfo.value):
            report.outcome = "skipped"
            report.longrepr = (str(item.path), item.location[1] or 0, "Skipped: needs torch")
        return report

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if self.modules:
            names = " ".join(self.modules)
            _print(session.config, f"{len(self.modules)} modules deselected, no torch: {names}")


def pytest_configure(config: pytest.Config) -> None:
    if find_spec("torch") is None:
        config.pluginmanager.register(WithoutTorch())


@pytest.fixture(scope="session")
def data_dir() -> Path:
    return DATA


@pytest.fixture(scope="session")
def azurite() -> str | None:
    return find_azurite()


@pytest.fixture(scope="session")
def chromium_path() -> str:
    found = find_chromium()
    assert found is not None
    return found


REGISTRIES = (
    ("featurestore.encoders.loading", "ENCODERS"),
    ("featurestore.slides.slide_reader", "READERS"),
    ("featurestore.tissue.tissue_method", "TISSUE_METHODS"),
    ("histosge.data.expression.expression_layout", "LAYOUTS"),
    ("histosge.exporting.export_format", "FORMATS"),
    ("histosge.heldout.metric_registry", "METRICS"),
    ("histosge.models.registry", "MODELS"),
)


@pytest.fixture(autouse=True)
def installed_extensions() -> Iterator[None]:
    """Read entry points anew: a registry keeps them for the life of a process, and tests install packages of their own."""

    def refresh() -> None:
        for module, name in REGISTRIES:
            if module in sys.modules:
                getattr(sys.modules[module], name).refresh()

    refresh()
    yield
    refresh()


@pytest.fixture(autouse=True)
def own_environment() -> Iterator[None]:
    """Restore the environment after each test: commands that run in the tests' process set it (threads, spinning)."""
    before = dict(os.environ)
    yield
    for name in (os.environ.keys() | before.keys()) - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


class Ran(NamedTuple):
    """What a command gave: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


@cache
def _made_commands() -> Any:
    """The commands as typer makes them from their functions; a run makes all of them, of which it needs one."""
    import typer

    from histosge_cli.main import app

    return typer.main.get_command(app)


@pytest.fixture
def histosge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run the command line in this process."""
    from histosge_cli import main

    app = main.app

    def run(*arguments: object) -> Ran:
        # Help is filled in once, and may name what only one test installs.
        is_help = {"-h", "--help"}.intersection(arguments)
        monkeypatch.setattr(main, "app", app if is_help else _made_commands())
        monkeypatch.setattr("sys.argv", ["histosge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main.main()
        return Ran(int(stopped.value.code or 0), *capsys.readouterr())

    return run
