"""Modules, functions, classes and metrics that the pages name exist."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from histosge.heldout.metric_registry import METRICS

ROOT = Path(__file__).parents[2]
NAME = re.compile(r"(?<![\w/.-])(?:featurestore|histosge)(?:\.[A-Za-z_]\w*)+(?![\w/])")
# Entry-point groups look like modules, and so do names of files.
GROUPS = {"encoders", "slide_readers", "tissue_methods", "expression_layouts", "models", "exports", "metrics"}
FILE_ENDS = {"py", "md", "toml"}


def named(page: Path) -> set[str]:
    return {
        name
        for name in NAME.findall(page.read_text())
        if name.rpartition(".")[2] not in FILE_ENDS and name.partition(".")[2] not in GROUPS
    }


def found(name: str) -> bool:
    """Import as many parts of the name as are modules; the others are attributes."""
    parts = name.split(".")
    value: object = import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        try:
            value = getattr(value, part)
        except AttributeError:
            try:
                value = import_module(".".join(parts[:end]))
            except ModuleNotFoundError:
                return False
    return True


PAGES = sorted(page for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")] if named(page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_name_of_a_page_exists(page: Path) -> None:
    assert {name for name in named(page) if not found(name)} == set()


def test_the_guide_lists_the_registered_metrics_and_their_names_in_both_tables() -> None:
    table = (ROOT / "docs" / "evaluation.md").read_text().partition("| `genes.csv` | `scores.csv` |")[2]
    rows = dict(re.findall(r"^\| `(\w+)` \| `(\w+)` \|", table.partition("\n\n")[0], re.MULTILINE))
    assert rows.pop("pearson_depth_adjusted") == "pearson_depth_adjusted"
    assert rows == {metric.name: metric.summary_name for metric in METRICS.own.values()}
