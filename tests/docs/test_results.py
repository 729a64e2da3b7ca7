"""The scores in the pages are those of the committed record, which one command writes."""

import argparse
import json
import re
from pathlib import Path

import numpy as np
import pytest
from _common import Result, write
from _results import catalogue, record
from _results.pages import PAGES, rendered
from _results.taking import taken
from _together import bootstrap_mean

RECORD = record.load()


@pytest.mark.parametrize("name", PAGES)
def test_the_pages_hold_what_the_record_gives(name: str) -> None:
    text = (record.ROOT / name).read_text()
    assert "<!-- results:" in text
    assert rendered(text, RECORD) == text


def test_every_block_stands_in_a_page_and_every_part_is_recorded_with_its_origin() -> None:
    text = "".join((record.ROOT / name).read_text() for name in PAGES)
    assert set(re.findall(r"<!-- results:(\w+) -->", text)) == set(catalogue.TABLES)
    benchmarks = {path.stem for path in (record.ROOT / "benchmarks").glob("[!_]*.py")}
    assert set(RECORD) <= set(catalogue.PARTS) | benchmarks
    assert "demo" in RECORD
    for part in RECORD.values():
        assert re.fullmatch(r"[0-9a-f]{40}", part["commit"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["date"])
        benchmark, options = re.fullmatch(r"python (benchmarks/\w+\.py)(.*)", part["command"]).groups()
        assert (record.ROOT / benchmark).is_file()
        # A part may come from the record of its own benchmark, whose command is the one that is named then.
        assert benchmark != "benchmarks/results.py" or options.startswith(" --parts ")


def test_a_figure_that_is_typed_by_hand_is_noticed() -> None:
    text = (record.ROOT / "docs" / "results.md").read_text()
    changed = text.replace(
        "Held-out blocks of spots, all 60 genes: `dense` 0.",
        "Held-out blocks of spots, all 60 genes: `dense` 1.",
    )
    assert changed != text
    assert rendered(changed, RECORD) == text


def test_the_json_of_a_benchmark_becomes_rows_of_the_table_of_targets(tmp_path: Path) -> None:
    asked = argparse.Namespace(quick=True, json=tmp_path / "reading.json")
    rows = [Result("speed", 5.25, "x", ">= 5"), Result("peak", 3.0, "GB", "<= 2"), Result("other", 1.0)]
    write("reading (a slide)", rows, asked)
    name, part = taken(json.loads(asked.json.read_text()))
    table = catalogue.render("targets", {name: part})
    assert "| `reading` | speed | 5.25 x | >= 5 | met |" in table
    assert "| `reading` | peak | 3 GB | <= 2 | **missed** |" in table
    assert "other" not in table
    assert "`python benchmarks/reading.py --quick`" in table


@pytest.mark.parametrize("name", ["demo", "nothing"])
def test_json_of_what_is_no_other_benchmark_is_refused(tmp_path: Path, name: str) -> None:
    asked = argparse.Namespace(quick=True, json=tmp_path / "one.json")
    write(name, [Result("speed", 1.0)], asked)
    with pytest.raises(SystemExit, match=name):
        taken(json.loads(asked.json.read_text()))


def test_the_interval_of_a_difference_over_sections_is_that_of_their_mean() -> None:
    values = np.random.default_rng(5).normal(0.01, 0.02, 400)
    mean, low, high = bootstrap_mean(values)
    # Of many sections the mean is normal, and its bootstrap has the standard error of the values as they are.
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert (mean, low, high) == pytest.approx((values.mean(), mean - half, mean + half), abs=half / 8)
