"""The cost tables of the guide are those that benchmarks/costs.py computes, from speeds that results.md reports."""

import math
import re
from pathlib import Path

import costs
import pytest

from featurestore.grid import GridSpec

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("table", [costs.time_table, costs.size_table], ids=lambda table: table.__name__)
def test_the_page_holds_the_table_that_the_script_prints(table: object) -> None:
    assert callable(table)
    assert table() in (DOCS / "choosing.md").read_text()


def test_the_measured_speeds_are_those_of_the_results() -> None:
    results = (DOCS / "results.md").read_text()
    for rate in costs.CPU_RATES.values():
        assert re.search(rf"\b{rate:g}\b", results), rate


def test_patches_are_tissue_over_the_square_of_the_stride() -> None:
    one = costs.cost(GridSpec(0.5, 224, 100))
    assert one.patches == pytest.approx(costs.TISSUE_MM2 / 0.05**2)
    assert one.hours(one.patches / 3600) == pytest.approx(costs.SLIDES)


def test_blocks_cover_the_tissue_and_little_more_when_they_are_small() -> None:
    fine = costs.cost(GridSpec(0.5, 224, 14))
    slots = fine.blocks * math.prod(costs.DEFAULT_BLOCK)
    assert 1 < slots / fine.patches < 1.1
    assert fine.gigabytes(7) == pytest.approx(costs.SLIDES * slots * 7 * 2 / 1e9)
