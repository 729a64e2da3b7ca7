"""The page on extensions is a complete package: its files are installed, and its commands run with it."""

import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

from featurestore.encoders.loading import ENCODERS
from featurestore.slides.slide_reader import READERS
from featurestore.tissue.tissue_method import TISSUE_METHODS
from histosge.data.expression.expression_layout import LAYOUTS
from histosge.exporting.export_format import FORMATS
from histosge.heldout.metric_registry import METRICS
from histosge.models.registry import MODELS
from histosge.synthetic import GeneCounts, SyntheticSpec, make_section

TEXT = (Path(__file__).parents[2] / "docs" / "extending.md").read_text()
BLOCK = re.compile(
    r"(?:^\*\*`(?P<file>\S+)`\*\*\n\n)?^```(?P<kind>\w+)\n(?P<code>.*?)^```", re.MULTILINE | re.DOTALL
)
REGISTRIES = (ENCODERS, READERS, TISSUE_METHODS, LAYOUTS, MODELS, FORMATS, METRICS)


def install(site: Path) -> None:
    """Do what pip would do for a package of Python files: write its entry points beside it."""
    project = tomllib.loads((site / "pyproject.toml").read_text())["project"]
    name, version = project["name"], project["version"]
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    groups = project["entry-points"].items()
    lines = [
        line
        for group, points in groups
        for line in (f"[{group}]", *(f"{k} = {v}" for k, v in points.items()))
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with two small sections and their sample sheet."""
    rows = ["slide_id,slide,expression,mpp,donor"]
    for seed, name in enumerate(("C2", "C4")):
        spec = SyntheticSpec(size_px=(2400, 2200), genes=GeneCounts(8, 4, 4, 4), seed=seed)
        section = make_section(tmp_path / "sections", spec, slide_id=name)
        rows.append(f"{name},sections/{section.slide.name},sections/{section.expression.name},0.5,D{seed}")
    (tmp_path / "cohort.csv").write_text("\n".join(rows) + "\n")
    return tmp_path


@pytest.mark.slow
def test_every_block_of_the_page_runs_with_the_package_installed(folder: Path) -> None:
    site, commands = folder / "site", folder / "bin"
    site.mkdir()
    commands.mkdir()
    blocks = list(BLOCK.finditer(TEXT))
    for block in blocks:
        if block["file"]:
            file = site / block["file"]
            file.parent.mkdir(exist_ok=True)
            file.write_text(block["code"])
    install(site)
    (commands / "histosge").write_text(f'#!/bin/sh\nexec {sys.executable} -m histosge_cli "$@"\n')
    (commands / "histosge").chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, sys.path)]),
    }
    for block in blocks:
        if block["file"] or block["kind"] not in ("shell", "python"):
            continue
        run = ["bash", "-euc"] if block["kind"] == "shell" else [sys.executable, "-c"]
        done = subprocess.run(
            [*run, block["code"]], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{block['code']}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        assert "is left out" not in done.stderr, done.stderr


def test_the_page_has_an_example_of_each_kind() -> None:
    blocks = list(BLOCK.finditer(TEXT))
    project = next(tomllib.loads(block["code"]) for block in blocks if block["file"] == "pyproject.toml")
    points = project["project"]["entry-points"]
    assert set(points) == {registry.group for registry in REGISTRIES}
    modules = {value.partition(":")[0] for group in points.values() for value in group.values()}
    assert {f"{module.replace('.', '/')}.py" for module in modules} <= {block["file"] for block in blocks}


def test_the_table_at_the_top_names_each_group_and_its_record_class() -> None:
    rows = re.findall(r"^\| \[[a-z ]+\]\(#\S+\) \| `(\S+)` \| `(\S+)\.(\w+)` \|", TEXT, re.MULTILINE)
    named = [(group, getattr(import_module(module), cls)) for group, module, cls in rows]
    # An instance of each kind: the registry keeps its class to itself.
    assert named == [(one.group, type(next(iter(one.own.values())))) for one in REGISTRIES]
