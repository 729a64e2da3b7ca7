"""The page of all slides from the command line."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

Histosge = Callable[..., Any]


def test_a_page_of_a_store_is_written_and_again_there_is_nothing_to_do(
    histosge: Histosge, world: Path, tmp_path: Path
) -> None:
    ran = histosge("preview", world / "store", tmp_path / "page", "--quiet")
    assert (ran.code, ran.err) == (0, "")
    assert ran.out == f"{tmp_path}/page/index.html: 2 slides, 0 failed\n"
    assert "nothing to do" in histosge("preview", world / "store", tmp_path / "page", "--quiet").out
    assert sorted(file.name for file in (tmp_path / "page").iterdir()) == [
        "index.html", "pictures", "preview.css", "preview.js", "slides.js",
    ]  # fmt: skip


def test_a_dry_run_writes_a_page_and_no_store(histosge: Histosge, world: Path, tmp_path: Path) -> None:
    options = ("--encoder", "colour", "--mpp", "1", "--patch", "48", "--quiet")
    sheet = next((world / "data").glob("*.csv"))
    ran = histosge("embed", sheet, tmp_path / "S", *options, "--dry-run", "--preview", tmp_path / "page")
    assert ran.code == 0
    assert f"\n{tmp_path}/page/index.html: " in ran.out
    assert (tmp_path / "page/index.html").is_file()
    assert not (tmp_path / "S").exists()


def test_what_cannot_be_a_page_is_refused_in_one_line(
    histosge: Histosge, world: Path, tmp_path: Path
) -> None:
    page = tmp_path / "page"
    for arguments, expected in (
        (("preview", world / "store", world / "folder"), "holds something that is no preview"),
        (("preview", world / "maps", page), "not a feature store"),
        (("preview", world / "empty", page), "no histosge store"),
        (("preview", world / "store", world / "file"), "is a file, where a folder would go"),
        (("embed", world / "data", tmp_path / "S", "--preview", page), "give --dry-run with it"),
    ):
        ran = histosge(*arguments)
        assert ran.code == 2, arguments
        assert expected in ran.err
        assert ran.err.count("\n") == 1
    assert not page.exists()
