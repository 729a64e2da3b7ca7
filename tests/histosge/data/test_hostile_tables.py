"""Legacy ST tables that are odd or damaged: read right, or refused in one line."""

import gzip
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from write_layouts import legacy_st

from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.errors import ExpressionError


def find(path: Path) -> LoadedExpression:
    return find_expression(path, SlideFrame("S", "D", 0.67))


def test_words_for_selected_and_a_mark_at_the_start_are_read(tmp_path: Path) -> None:
    plain = find(legacy_st(tmp_path / "a")).spots
    home = legacy_st(tmp_path / "b")
    spots = home / "spot_data-selection-A1.tsv"
    head, *lines = spots.read_text().splitlines()
    words = [line[:-1] + ("True" if line[-1] == "1" else "False") for line in lines]
    spots.write_text("\n".join([head, *words]))
    table = home / "A1_counts.tsv"
    table.write_text("\ufeff" + table.read_text(), encoding="utf-8")
    found = find(home).spots
    np.testing.assert_array_equal(found.xy_um, plain.xy_um)
    np.testing.assert_array_equal(found.counts.toarray(), plain.counts.toarray())


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("A1_counts.tsv", lambda text: text + text.splitlines()[3] + "\n", "has spot '3x13' twice"),
        ("A1_counts.tsv", lambda text: text.replace("\tAB", "", 1), "rows differ in length"),
        ("A1_counts.tsv", lambda text: text.replace("4x11\t", "4.5.6x11\t", 1), "no place on an ST array"),
        ("A1_counts.tsv", lambda text: text.replace("4x11\t", "4x11\t-", 1), "negative"),
        ("A1_counts.tsv", lambda text: text.replace("4x11\t", "4x11\tx", 1), "is no table of counts"),
        (
            "spot_data-selection-A1.tsv",
            lambda text: text + text.splitlines()[3] + "\n",
            "places a spot twice",
        ),
        (
            "spot_data-selection-A1.tsv",
            lambda text: text.replace("x\ty", "a\tb", 1),
            "cannot be read as a spot",
        ),
        ("spot_data-selection-A1.tsv", lambda text: text.replace("\t1\n", "\tmaybe\n"), "'maybe'"),
    ],
)
def test_damaged_tables_are_one_line(
    tmp_path: Path, name: str, change: Callable[[str], str], message: str
) -> None:
    home = legacy_st(tmp_path)
    (home / name).write_text(change((home / name).read_text()))
    with pytest.raises(ExpressionError, match=message) as refused:
        find(home / "A1_counts.tsv")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("kept", [0, 30, 120])
def test_a_cut_table_is_one_line(tmp_path: Path, kept: int) -> None:
    home = legacy_st(tmp_path)
    data = gzip.compress((home / "A1_counts.tsv").read_bytes())
    (home / "A1_counts.tsv").unlink()
    (home / "A1_counts.tsv.gz").write_bytes(data[:kept])
    with pytest.raises(ExpressionError) as refused:
        find(home / "A1_counts.tsv.gz")
    assert "\n" not in str(refused.value)


def test_pipes_in_a_folder_are_not_opened(tmp_path: Path) -> None:
    home = legacy_st(tmp_path)
    for name in ("B1_counts.tsv", "B1_spots.tsv", "A1_transform.txt"):
        os.mkfifo(home / name)
    assert len(find(home).spots) == 19
