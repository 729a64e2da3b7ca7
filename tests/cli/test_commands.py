"""The commands as a user types them, on a small synthetic cohort."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata
import polars as pl
import pytest

from featurestore.storage.catalogue import catalogue
from featurestore.storage.validation import validate
from histosge.demo import run_demo
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

Histosge = Callable[..., NamedTuple]
SPEC = SyntheticSpec(size_px=(2400, 2200), genes=GeneCounts(8, 4, 4, 4))
GRID = ("--mpp", 0.5, "--patch", 112, "--stride", 112)


@pytest.fixture(scope="module")
def sheet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cohort(tmp_path_factory.mktemp("cohort"), SPEC, 2).sheet


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.mark.e2e
def test_the_whole_job(histosge: Histosge, sheet: Path, run_folder: Path) -> None:
    store, model, maps = run_folder / "store", run_folder / "model", run_folder / "maps"
    planned = histosge("embed", sheet, store, *GRID, "--dry-run")
    assert planned.code == 0
    assert "to store" in planned.out
    assert not store.exists()

    assert histosge("embed", sheet, store, *GRID).code == 0
    again = histosge("embed", sheet, store, *GRID)
    assert again.code == 0
    assert [line.split(":")[1].strip() for line in again.out.splitlines()] != []
    assert all("nothing to do" in line for line in again.out.splitlines())

    listed = json.loads(histosge("ls", store, "--json").out)
    assert {(row["slide"], row["state"]) for row in listed} == {("S1", "done"), ("S2", "done")}
    assert "done" in histosge("ls", store).out
    assert histosge("validate", store, "--deep")[:2] == (0, "whole\n")

    pages = [run_folder / name for name in ("train.html", "predict.html")]
    trained = histosge("train", sheet, store, model, "--genes", 12, "--report", pages[0])
    assert trained.code == 0
    assert "dense for 12 genes" in trained.out
    h5ad = run_folder / "s2.h5ad"
    predicted = histosge("predict", store, model, maps, "--slide", "S2", "--h5ad", h5ad, "--report", pages[1])
    assert predicted.code == 0
    for page in pages:
        text = page.read_text()
        assert "Which genes to trust" in text
        assert "data:image/svg+xml;base64," in text
        assert "histosge evaluate" in text
        assert 'src="http' not in text
    assert "S2" in text
    assert "trained on spots of this slide" in text
    data = anndata.read_h5ad(h5ad)
    assert data.n_vars == 12
    assert data.obsm["spatial"].max() < max(SPEC.size_px)
    assert "nothing to do" in histosge("predict", store, model, maps, "--slide", "S2").out

    report = run_folder / "report"
    options = ("--split", "section", "--presets", "mean,ridge,dense", "--genes", 12)
    scored = histosge("evaluate", sheet, store, report, *options)
    assert scored.code == 0
    assert "noise" in scored.out
    assert (report / "report.html").is_file()
    scores = pl.read_csv(report / "scores.csv").filter(pl.col("metric") == "pearson_mean")
    mean = {str(k[0]): frame["value"].mean() for k, frame in scores.group_by("preset")}
    assert mean["ridge"] > 0.2
    assert mean["dense"] > 0.2
    assert mean["mean"] == 0


def test_damage_is_found_named_and_mended(histosge: Histosge, sheet: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    histosge("embed", sheet, store, *GRID, "--encoder", "colour")
    block = next(p for p in (store / "S1").rglob("c/*/*/0") if p.is_file() and "embedding" in str(p))
    whole = block.read_bytes()
    block.unlink()
    missing = histosge("validate", store)
    assert missing.code == 1
    assert "run the same histosge embed again" in missing.out
    assert "1 of" in histosge("embed", sheet, store, *GRID, "--encoder", "colour").out
    assert block.read_bytes() == whole

    block.write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    assert histosge("validate", store).code == 0
    flipped = histosge("validate", store, "--deep")
    assert flipped.code == 1
    assert "S1" in flipped.out


def test_slides_are_removed_after_a_look(histosge: Histosge, sheet: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    histosge("embed", sheet, store, *GRID, "--encoder", "colour")
    assert histosge("rm", store).code == 2
    assert "would remove S1" in histosge("rm", store, "--slide", "S1", "--dry-run").out
    assert set(catalogue(str(store))["slide"]) == {"S1", "S2"}
    assert histosge("rm", store, "--slide", "S1").code == 0
    assert set(catalogue(str(store))["slide"]) == {"S2"}
    assert histosge("validate", store).code == 0


def test_what_is_there_is_said(histosge: Histosge) -> None:
    listed = histosge("encoders")
    assert listed.code == 0
    assert "morphology" in listed.out
    shown = histosge("encoders", "morphology").out
    assert "fingerprint" in shown
    assert "dim" in shown
    checked = histosge("doctor")
    assert checked.code == 0
    assert "torch" in checked.out
    assert "morphology: ready" in checked.out


def test_remarks_are_kept_quiet_and_logged(histosge: Histosge, sheet: Path, tmp_path: Path) -> None:
    store, log = tmp_path / "store", tmp_path / "log.jsonl"
    histosge("embed", sheet, store, *GRID, "--encoder", "colour", "--log", log)
    trained = histosge("train", sheet, store, tmp_path / "m", "--preset", "ridge", "--quiet", "--log", log)
    assert (trained.code, trained.err) == (0, "")
    messages = [json.loads(line)["message"] for line in log.read_text().splitlines()]
    assert "slide" in messages
    assert any("spots" in message for message in messages)


@pytest.mark.e2e
def test_a_run_that_was_killed_goes_on_where_it_stopped(sheet: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    grid = map(str, ("--mpp", 0.5, "--patch", 112, "--stride", 28))
    slide = str(sheet.parent / "S1.tif")
    command = [sys.executable, "-m", "histosge_cli", "embed", slide, str(store), *grid]
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 180
    while len(list(store.rglob("embedding/c/*/*/0"))) < 2:
        assert run.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    written = {p: p.stat().st_mtime_ns for p in store.rglob("embedding/c/*/*/0")}
    (row,) = catalogue(str(store)).to_dicts()
    assert row["done"] == len(written) < row["planned"]
    assert any("embed again" in problem.fix for problem in validate(str(store)))

    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{row['planned'] - row['done']} of {row['planned']} blocks computed" in again.stdout
    assert {p: p.stat().st_mtime_ns for p in written} == written
    assert validate(str(store), deep=True) == []


@pytest.mark.e2e
def test_the_demo_on_a_small_slide(tmp_path: Path) -> None:
    result = run_demo(tmp_path, SyntheticSpec(size_px=(2600, 2400), genes=GeneCounts(12, 4, 4, 4)))
    assert result.truth["morphology"] > 0.7
    assert abs(result.truth["noise"]) < 0.1
    assert abs(result.held_out["noise"]) < 0.05
    assert all(path.exists() for path in result.paths.values())
    page = result.paths["report"].read_text()
    assert "Against the dense truth" in page


@pytest.mark.parametrize("command", [("predict", "store", "model", "out"), ("analyse", "store", "pca")])
def test_an_option_that_takes_one_value_is_not_taken_twice(
    histosge: Histosge, command: tuple[str, ...]
) -> None:
    ran = histosge(*command, "--encoder", "colour", "--encoder", "uni")
    assert ran.code == 2
    assert ran.err.strip() == "error: --encoder is given 2 times and takes one value; give it once"
    # Options that take several, and switches, are as they were.
    ran = histosge("predict", "store", "model", "out", "--slide", "A", "--slide", "B", "--quiet", "--quiet")
    assert "there is no store" in ran.err
