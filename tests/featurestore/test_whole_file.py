import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import featurestore.whole_file
from featurestore.errors import OutputError
from featurestore.location import Location
from featurestore.whole_file import (
    PARTIAL_AGE_S,
    check_output,
    is_partial,
    restore_replaced,
    whole_file,
    whole_folder,
)


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
    with whole_file(target) if target.suffix else whole_folder(target) as partial:
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


def _write_folder(target: Path, content: str) -> None:
    with whole_folder(target) as partial:
        partial.mkdir()
        (partial / content).write_text(content)


def test_a_folder_appears_whole_also_over_an_empty_one(tmp_path: Path) -> None:
    for target in (tmp_path / "deep" / "new.zarr", tmp_path / "empty.zarr"):
        if target.stem == "empty":
            target.mkdir()
        with whole_folder(target) as partial:
            partial.mkdir()
            (partial / "whole").write_text("1")
            assert not target.exists() or not any(target.iterdir())
        assert _names(target) == ["whole"]


@pytest.mark.parametrize("can_swap", [True, False])
def test_a_full_folder_stays_until_the_new_one_is_complete(
    can_swap: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_swap:  # as on NFS
        monkeypatch.setattr(featurestore.whole_file, "_swap", lambda *_: False)
    target = tmp_path / "model"
    _write_folder(target, "old")
    with whole_folder(target) as partial:
        partial.mkdir()
        (partial / "new").write_text("1")
        assert _names(target) == ["old"]
    assert _names(target) == ["new"]
    assert _names(tmp_path) == ["model"]


_KILLED_WRITER = """
import os, sys
from pathlib import Path
import featurestore.whole_file as whole

def killed_before_second_rename(one, other):
    other.rename(whole._beside(other, whole.REPLACED_SUFFIX))
    os._exit(9)

if sys.argv[2] == "between":
    whole._swap = killed_before_second_rename
with whole.whole_folder(Path(sys.argv[1])) as partial:
    partial.mkdir()
    (partial / "new").write_text("1")
    if sys.argv[2] == "writing":
        os._exit(9)
"""


@pytest.mark.parametrize("moment", ["writing", "between"])
def test_a_kill_at_any_moment_leaves_the_old_folder_within_reach(moment: str, tmp_path: Path) -> None:
    target = tmp_path / "model"
    _write_folder(target, "old")
    killed = subprocess.run([sys.executable, "-c", _KILLED_WRITER, str(target), moment], check=False)
    assert killed.returncode == 9
    restore_replaced(target)
    assert _names(target) == ["old"]
    for path in tmp_path.glob("*.partial"):
        for part in (*path.iterdir(), path):
            os.utime(part, (time.time() - 2 * PARTIAL_AGE_S,) * 2)
    _write_folder(target, "new")
    assert _names(tmp_path) == ["model"]
    assert _names(target) == ["new"]


def test_a_folder_that_is_still_written_to_is_not_swept(tmp_path: Path) -> None:
    running = tmp_path / "a.zarr.00.partial"
    running.mkdir()
    (running / "fresh").write_text("1")
    os.utime(running, (time.time() - 2 * PARTIAL_AGE_S,) * 2)
    _write_folder(tmp_path / "a.zarr", "whole")
    assert running.is_dir()


def test_what_a_link_names_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "a.txt").write_text("old")
    link = tmp_path / "a.txt"
    link.symlink_to(tmp_path / "disk" / "a.txt")
    with whole_file(link) as partial:
        partial.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "disk" / "a.txt").read_text() == "new"


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    target = tmp_path / ("é" * 120 + ".parquet")
    with whole_file(target, sweep=True) as partial:
        partial.write_text("1")
    assert _names(tmp_path) == [target.name]


def test_places_that_nothing_can_be_written_to_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("1")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    refused = [
        (tmp_path / "folder", False, "is a folder, where a file would go"),
        (tmp_path / "file", True, "is a file, where a folder would go"),
        (tmp_path / "file" / "below", False, "Not a directory"),
        (tmp_path / "file" / "below", True, "Not a directory"),
        (Path("/dev/null"), False, "is a device or a pipe"),
        (tmp_path / "pipe", False, "is a device or a pipe"),
        (tmp_path / ("a" * 300), False, "File name too long"),
        (tmp_path / ("a" * 300) / "b", True, "File name too long"),
        (tmp_path / "a\0b", False, "null"),
        (Path(), False, "is a folder"),
    ]
    for path, folder, message in refused:
        with pytest.raises(OutputError, match=message) as error:
            check_output(path, folder=folder)
        assert "\n" not in str(error.value)
    check_output(tmp_path / "new" / "and deeper" / "file")
    check_output(tmp_path / "file")
    check_output(tmp_path / "folder", folder=True)
    assert _names(tmp_path) == ["file", "folder", "pipe"]


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
    for path in (abandoned / "half", abandoned, other / "half", other):
        os.utime(path, (time.time() - 2 * PARTIAL_AGE_S,) * 2)
    with whole_file(tmp_path / "a.txt", sweep=True) as partial:
        partial.write_text("whole")
        assert is_partial(partial.name)
    assert set(_names(tmp_path)) == {"a.txt", running.name, other.name}


@pytest.mark.parametrize("write", ["write_file", "write_json"])
def test_a_write_into_a_folder_that_is_removed_meanwhile_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: str
) -> None:
    location, replaces = Location(tmp_path / "store"), []

    def remove_first(source: str | Path, target: str | Path) -> None:
        replaces.append(target)
        if len(replaces) == 1:
            location.remove("slide")
        rename(source, target)

    rename = os.replace
    monkeypatch.setattr(os, "replace", remove_first)
    if write == "write_file":
        location.write_file("slide/c/0", b"{", memoryview(b"}"))
    else:
        location.write_json("slide/c/0", {})
    assert len(replaces) == 2
    assert location.read_json("slide/c/0") == {}
