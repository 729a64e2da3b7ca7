"""CONTRIBUTING.md lists the folders that there are, in the order in which they may import."""

import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = ("featurestore", "histosge")


def listed(package: str) -> list[str]:
    table = re.search(rf"^\*\*`{package}`\*\*.*?\n\n((?:\|.*\n)+)", TEXT, re.MULTILINE)
    assert table is not None
    return re.findall(r"^\| `(\w+)` \|", table[1], re.MULTILINE)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_folder_is_listed(package: str) -> None:
    folders = {path.parent.name for path in (ROOT / package).glob("*/__init__.py")}
    assert set(listed(package)) == folders


@pytest.mark.parametrize("package", PACKAGES)
def test_folders_are_listed_in_the_order_that_the_linter_checks(package: str) -> None:
    (layers,) = (
        contract["layers"]
        for contract in PROJECT["tool"]["importlinter"]["contracts"]
        if contract.get("containers") == [package]
    )
    depth = {name: i for i, layer in enumerate(layers) for name in re.split(r"\W+", layer)}
    assert all(depth[above] <= depth[below] for above, below in pairwise(listed(package)))


def test_every_marker_is_explained() -> None:
    markers = {line.split(":")[0] for line in PROJECT["tool"]["pytest"]["ini_options"]["markers"]}
    explained = set(re.findall(r"^\| `(\w+)` \|", TEXT.partition("| marker |")[2].partition("\n\n")[0], re.M))
    assert explained == markers
