import os
import time
from pathlib import Path

import pytest

from featurestore.whole_file import PARTIAL_AGE_S, is_partial, whole_file


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "made on the way" / "a.txt"
    for content, seen in (("first", None), ("second", "first")):
        with whole_file(target) as partial:
            partial.write_text(content)
            assert (target.read_text() if target.exists() else None) == seen
    assert target.read_text() == "second"
    assert _names(target.parent) == ["a.txt"]


def _write_half_of(target: Path) -> None:
    with whole_file(target) as partial:
        if target.suffix:
            partial.write_text("ha")
        else:
            partial.mkdir()
            (partial / "ha").write_text("lf")
        raise KeyboardInterrupt


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    for name in ("a.txt", "a folder"):
        with pytest.raises(KeyboardInterrupt):
            _write_half_of(tmp_path / name)
    assert (tmp_path / "a.txt").read_text() == "old"
    assert _names(tmp_path) == ["a.txt"]


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a.zarr"
    with whole_file(target) as partial:
        partial.mkdir()
        (partial / "whole").write_text("1")
        assert not target.exists()
    assert _names(target) == ["whole"]


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with whole_file(target) as outer:
        outer.write_text("outer")
        with whole_file(target) as inner:
            inner.write_text("inner")
        assert target.read_text() == "inner"
    assert target.read_text() == "outer"


def test_a_sweep_takes_what_killed_runs_left_of_this_file_and_nothing_else(tmp_path: Path) -> None:
    abandoned, running, other = (tmp_path / f"{n}.partial" for n in ("a.txt.00", "a.txt.01", "b.txt.02"))
    for path in (abandoned, running, other):
        path.mkdir()
        (path / "half").write_text("1")
    for path in (abandoned, other):
        os.utime(path, (time.time() - 2 * PARTIAL_AGE_S,) * 2)
    with whole_file(tmp_path / "a.txt", sweep=True) as partial:
        partial.write_text("whole")
        assert is_partial(partial.name)
    assert set(_names(tmp_path)) == {"a.txt", running.name, other.name}
