"""Versions, also of a checkout that is not installed."""

import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed
from pathlib import Path

import pytest

from featurestore import software


def test_installed_packages_have_their_own_versions() -> None:
    assert software.version("zarr") == installed("zarr")
    assert software.version() == installed("histosge")
    with pytest.raises(PackageNotFoundError):
        software.version("a-package-that-nobody-has")


def test_a_checkout_that_is_not_installed_has_the_version_of_its_project_file(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    (tmp_path / "featurestore").mkdir()
    shutil.copy(root / "featurestore" / "software.py", tmp_path / "featurestore")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "histosge"\nversion = "7.8.9"\n')
    # -I -S: neither installed packages nor this checkout are on the path.
    script = (
        "import sys; sys.path[:0] = sys.argv[1:]; from featurestore.software import version; print(version())"
    )
    command = [sys.executable, "-I", "-S", "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.stderr) == ("7.8.9", "")
