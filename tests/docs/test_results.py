"""The scores in the pages are those of the committed record, which one command writes."""

import json
import re

import pytest
import results

RECORD = json.loads(results.RECORD.read_text())


@pytest.mark.parametrize("name", results.PAGES)
def test_the_pages_hold_what_the_record_gives(name: str) -> None:
    text = (results.ROOT / name).read_text()
    assert "<!-- results:" in text
    assert results.rendered(text, RECORD) == text


def test_every_block_stands_in_a_page_and_every_part_is_recorded_with_its_origin() -> None:
    text = "".join((results.ROOT / name).read_text() for name in results.PAGES)
    assert set(re.findall(r"<!-- results:(\w+) -->", text)) == set(results.BLOCKS)
    assert set(RECORD) <= set(results.PARTS)
    assert "demo" in RECORD
    for part in RECORD.values():
        assert re.fullmatch(r"[0-9a-f]{40}", part["commit"])
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", part["date"])
        benchmark, options = re.fullmatch(r"python (benchmarks/\w+\.py)(.*)", part["command"]).groups()
        assert (results.ROOT / benchmark).is_file()
        # A part may come from the record of its own benchmark, whose command is the one that is named then.
        assert benchmark != "benchmarks/results.py" or options.startswith(" --parts ")


def test_a_figure_that_is_typed_by_hand_is_noticed() -> None:
    text = (results.ROOT / "docs" / "results.md").read_text()
    changed = text.replace(
        "Held-out blocks of spots, all 60 genes: `dense` 0.",
        "Held-out blocks of spots, all 60 genes: `dense` 1.",
    )
    assert changed != text
    assert results.rendered(changed, RECORD) == text
