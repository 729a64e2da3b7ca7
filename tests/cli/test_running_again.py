"""A command that is run again: the same is nothing to do, another result is refused, or replaced where that is wanted."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from featurestore.errors import FeatureStoreError
from featurestore.events import Progress
from histosge.demo import run_demo
from histosge.synthetic import GeneCounts, SyntheticSpec

Histosge = Callable[..., NamedTuple]
SHEET = "data/cohort.csv"
EVALUATE = (
    "evaluate",
    SHEET,
    "store",
    "out",
    "--presets",
    "mean",
    "--split",
    "section",
    "--quiet",
    "--genes",
)


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("data", "store", "model", "maps"):
        shutil.copytree(world / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _files(path: Path) -> dict[str, tuple[int, bytes]]:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file): (file.stat().st_mtime_ns, file.read_bytes()) for file in files}


TRAIN = ("train", SHEET, "store", "out", "--preset", "mean", "--quiet", "--genes")
PREDICT = ("predict", "store", "model", "maps", "--quiet", "--slide")


@pytest.mark.parametrize(
    ("command", "first", "other", "result"),
    [
        (TRAIN, "3", "4", "out"),
        (EVALUATE, "3", "4", "out"),
        ((*TRAIN[:3], "model2", *TRAIN[4:6], "--report", "page.html", "--genes"), "3", "4", "page.html"),
        ((*PREDICT[:4], "--report", "page.html", "--slide"), "S1", "S2", "page.html"),
        ((*PREDICT[:4], "--h5ad", "c.h5ad", "--slide"), "S1", "S2", "c.h5ad"),
        (
            ("analyse", "store", "summary", "--quiet", "--out", "t.parquet", "--slide"),
            "S1",
            "S2",
            "t.parquet",
        ),
        (("analyse", "store", "pca", "--quiet", "--scores", "scores", "--components"), "2", "3", "scores"),
        (("analyse", "store", "clusters", "--quiet", "--labels", "labels", "--k"), "2", "3", "labels"),
        (("export", "maps", "c.h5ad", "--to", "h5ad", "--quiet", "--slide"), "S1", "S2", "c.h5ad"),
        (("view", "store", "--quiet", "--static", "page", "--tiles-mpp"), "2", "4", "page"),
    ],
    ids=lambda value: " ".join(value)[:40].replace("/", "|") if isinstance(value, tuple) else None,
)
def test_the_same_is_nothing_to_do_and_another_is_refused_or_replaced(
    histosge: Histosge, here: Path, command: tuple[str, ...], first: str, other: str, result: str
) -> None:
    assert histosge(*command, first).code == 0
    before = _files(here / result)
    assert before
    code, out, err = histosge(*command, first)
    assert code == 0
    # Tables of each slide are not counted: what an analysis found is printed in any case.
    assert "nothing to do" in out + err or {"--scores", "--labels"} & set(command)
    assert _files(here / result) == before
    code, _, err = histosge(*command, other)
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "--overwrite" in err
    assert _files(here / result) == before
    assert histosge(*command, other, "--overwrite").code == 0
    after = _files(here / result)
    assert {name: content for name, (_, content) in after.items()} != {
        name: content for name, (_, content) in before.items()
    }
    assert not [path for path in here.rglob("*") if path.name.endswith((".partial", ".replaced"))]


def test_both_values_are_shown(histosge: Histosge, here: Path) -> None:
    assert histosge(*TRAIN, "3").code == 0
    assert (
        "out was made with genes 3 (now 4), seed 0 (now 7); give another path"
        in histosge(*TRAIN, "4", "--seed", 7).err
    )
    assert histosge(*EVALUATE[:3], "scores", *EVALUATE[4:], "3").code == 0
    assert "genes 3 (now 4)" in histosge(*EVALUATE[:3], "scores", *EVALUATE[4:], "4").err


def test_scores_that_are_there_are_printed_again(histosge: Histosge, here: Path) -> None:
    first = histosge(*EVALUATE, "3").out
    note, *again = histosge(*EVALUATE, "3").out.splitlines()
    assert note == "out: nothing to do, these scores are of the same settings and inputs"
    assert again == first.splitlines()


def test_a_report_of_an_earlier_version_is_kept(histosge: Histosge, here: Path) -> None:
    (here / "out").mkdir()
    (here / "out" / "report.html").write_text("<!doctype html><title>scores</title>")
    before = _files(here / "out")
    code, _, err = histosge(*EVALUATE, "3")
    assert code == 2
    assert "does not record what it was made with" in err
    assert _files(here / "out") == before


def test_a_demo_replaces_its_own_folder_and_no_other(tmp_path: Path) -> None:
    class StoppedError(Exception):
        pass

    def stop(progress: Progress) -> None:
        if progress.done == 1:  # the slide is made
            raise StoppedError

    def run(height: int) -> int:
        spec = SyntheticSpec(size_px=(808, height), genes=GeneCounts(4, 3, 2, 2), spot_pitch_um=59.0)
        with pytest.raises(StoppedError):
            run_demo(tmp_path / "demo", spec, on_progress=stop)
        return (tmp_path / "demo" / "data" / "demo.tif").stat().st_size

    first = run(760)
    (tmp_path / "demo" / "report").mkdir()
    assert run(760) == first
    assert (tmp_path / "demo" / "report").exists()
    assert run(800) > first
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {"data", "demo.json"}
    (tmp_path / "demo" / "demo.json").unlink()
    with pytest.raises(FeatureStoreError, match="did not make"):
        run_demo(tmp_path / "demo", on_progress=stop)
    assert (tmp_path / "demo" / "data" / "demo.tif").exists()
