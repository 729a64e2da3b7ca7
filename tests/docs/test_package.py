"""What is built is what runs: the wheel and the sdist hold every file of the packages, and the wheel works alone."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from featurestore.file_systems import _EXTRAS

ROOT = Path(__file__).parents[2]
PACKAGES = {"featurestore": ROOT, "histosge": ROOT, "histosge_cli": ROOT / "cli"}


def _files() -> set[str]:
    """Return every file of the packages that belongs to an installation, relative to its package's parent."""
    return {
        str(path.relative_to(parent))
        for package, parent in PACKAGES.items()
        for path in (parent / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build from a copy of what is tracked or new, so that nothing left behind by an earlier build gets in."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split("\0")
    for name in filter(None, listed):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    done = subprocess.run(
        [sys.executable, "-m", "build", "--outdir", out, source], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


@pytest.mark.e2e
def test_wheel_and_sdist_hold_every_file_of_the_packages(built: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        in_wheel = set(wheel.namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        in_sdist = {name.partition("/")[2].removeprefix("cli/") for name in sdist.getnames()}
    assert _files() - in_wheel == set()
    assert _files() - in_sdist == set()
    assert {f"{package}/py.typed" for package in PACKAGES} <= in_wheel
    assert {name.split("/")[0] for name in in_wheel if ".dist-info" not in name} == set(PACKAGES)
    assert {"README.md", "LICENSE", "CITATION.cff", "pyproject.toml"} <= in_sdist


@pytest.mark.e2e
def test_the_wheel_runs_the_demo_in_an_environment_without_the_source(built: Path, tmp_path: Path) -> None:
    """The dependencies are lent by this environment (a .pth); the package itself comes from the wheel alone."""
    home = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", home], check=True)
    python = home / "bin" / "python"
    wheel = next(built.glob("*.whl"))
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    lent = [path for path in sys.path if path.endswith("site-packages")]
    site = next((home / "lib").glob("python*/site-packages"))
    (site / "lent.pth").write_text("\n".join(lent) + "\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    where = "import featurestore, histosge, histosge_cli as c; print(featurestore.__file__, histosge.__file__, c.__file__)"
    found = subprocess.run(
        [python, "-c", where], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
    )
    assert all(path.startswith(str(home)) for path in found.stdout.split()), found.stdout
    done = subprocess.run(
        [home / "bin" / "histosge", "demo", "--out", "demo"],
        cwd=tmp_path,
        env=clean,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "demo" / "report" / "report.html").stat().st_size > 10_000


def test_citation_and_package_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    cited = dict(re.findall(r"^([a-z-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert cited["version"] == project["version"]
    assert cited["license"] == project["license"]
    assert cited["cff-version"] == "1.2.0"


def test_every_extra_that_a_message_names_exists() -> None:
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    named = {
        extra
        for package, parent in PACKAGES.items()
        for path in (parent / package).rglob("*.py")
        for extra in re.findall(r"histosge\[(\w+)\]", path.read_text())
    }
    named |= set(_EXTRAS.values())
    assert {"s3", "gcs", "azure"} <= named <= extras


@pytest.mark.parametrize(
    ("module", "url", "extra"),
    [
        ("s3fs", "s3://bucket/store", "s3"),
        ("gcsfs", "gs://bucket/store", "gcs"),
        ("adlfs", "az://container/store", "azure"),
    ],
    ids=lambda value: value,
)
def test_an_absent_extra_is_one_line_that_names_it(module: str, url: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None; sys.argv = ['histosge', 'ls', {url!r}]\n"
        "from histosge_cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"pip install 'histosge[{extra}]'" in done.stderr


def _bounds(requirements: list[str]) -> dict[str, str]:
    """Return name -> version of ``name>=version`` and ``name==version``, with names as pip compares them."""
    parts = (re.match(r"([\w.-]+)(?:\[\w+\])?[<>=]=?([\w.]+)", one) for one in requirements)
    return {re.sub(r"[-_.]+", "-", part[1]).lower(): part[2] for part in parts if part}


def test_every_dependency_is_pinned_within_its_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lowest: dict[str, str] = {}
    for extra in ([], *project["optional-dependencies"].values()):
        lowest |= _bounds(project["dependencies"] + extra)
    pinned = _bounds((ROOT / "constraints.txt").read_text().splitlines())
    assert len(lowest) > 40
    assert lowest.keys() <= pinned.keys(), "run .ci/make_constraints"
    for name, version in lowest.items():
        assert Version(pinned[name]) >= Version(version), f"{name}: run .ci/make_constraints"
