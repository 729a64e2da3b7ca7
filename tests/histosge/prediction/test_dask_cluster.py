"""Prediction that is shared out, killed or repeated leaves the same bytes."""

import importlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _models import invent_model
from _stores import Made, write_store
from distributed import Client
from typer.testing import CliRunner

from featurestore.analysis.cluster_stream import connect
from featurestore.blocks import Block
from featurestore.errors import ClusterError, IdentityMismatchError, StoreError
from featurestore.events import Progress, ignore_progress
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import Store
from histosge.data.embedded_slide import EmbeddedSlide, Part, load_patches, open_embedded, read_tissue
from histosge.data.section_loading import Selection
from histosge.models.protocol import ReducingModel
from histosge.prediction.dask_cluster import new_run, predict_on_cluster
from histosge.prediction.expression_store import GENE_GROUP, ExpressionStore
from histosge.prediction.pieces import SMALL_SLIDE_BLOCKS, cut_into_pieces
from histosge.prediction.predict import PredictSettings, predict
from histosge.prediction.worker import (
    FailedTask,
    PredictJob,
    SlidePlan,
    plan_slide,
    predict_piece,
    read_blocks,
)
from histosge.training.model_files import read_fingerprint
from histosge.training.saved_model import SavedModel, load_model, save_model
from histosge_cli.main import app

SLIDES = 3
MADE = Made((23, 29), 13, (5, 7), frame=2)
"""25 blocks: more than one task predicts."""


class Cohort:
    def __init__(self, folder: Path) -> None:
        self.store = write_store(folder / "store", SLIDES, MADE)
        self.model = folder / "model"
        invent_model(self.store, "S00", self.model, 17)
        self.out = folder / "maps"
        self.results = predict(self.store.location.url, self.model, str(self.out))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("made"))


def _blocks(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in out.rglob("c/*") if p.is_file()} | {
        str(p.relative_to(out)): p.read_bytes() for p in out.rglob("expression/c/*/*/*")
    }


def test_slides_shared_out_among_workers_give_the_same_maps(made: Cohort, tmp_path: Path) -> None:
    command = [
        "predict",
        made.store.location.url,
        str(made.model),
        str(tmp_path / "maps"),
        "--workers",
        "2",
        "--quiet",
    ]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.output.splitlines()] == ["S00", "S01", "S02"]
    assert all(
        f"{made.results[0].planned} of {made.results[0].planned} blocks computed" in line
        for line in done.output.splitlines()
    )
    assert _blocks(tmp_path / "maps") == _blocks(made.out)
    assert len(_blocks(made.out)) > 30


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with connect(2, None) as client:
        yield client


@pytest.fixture(scope="module")
def one_worker() -> Iterator[Client]:
    with connect(1, None) as client:
        yield client


def _on(client: Client) -> PredictSettings:
    return PredictSettings(scheduler=client.scheduler.address)


def test_the_workers_of_a_running_cluster_give_the_same_maps(
    made: Cohort, cluster: Client, tmp_path: Path
) -> None:
    seen: list[Progress] = []
    results = predict(
        made.store.location.url, made.model, str(tmp_path / "maps"), _on(cluster), on_progress=seen.append
    )
    assert results == made.results
    assert _blocks(tmp_path / "maps") == _blocks(made.out)
    for result in results:
        of_slide = [(p.done, p.total) for p in seen if p.label == result.slide_id]
        assert of_slide == sorted(of_slide)
        assert of_slide[-1] == (result.planned, result.planned)


def test_the_blocks_of_one_slide_are_shared_out(made: Cohort, cluster: Client, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    seen: list[Progress] = []
    predict(
        made.store.location.url,
        made.model,
        str(out),
        _on(cluster),
        slide_ids=["S01"],
        on_progress=seen.append,
    )
    assert len(seen) >= 4
    assert _blocks(out) == {name: data for name, data in _blocks(made.out).items() if name.startswith("S01")}


@pytest.mark.e2e
@pytest.mark.parametrize("preset", ["ridge", "paper", "attention"])
def test_any_model_gives_the_same_bytes_on_workers(
    made: Cohort, cluster: Client, one_worker: Client, tmp_path: Path, preset: str
) -> None:
    invent_model(made.store, "S00", tmp_path / "model", 17, preset)
    arguments = (made.store.location.url, tmp_path / "model")
    predict(*arguments, str(tmp_path / "here"), slide_ids=["S01"])
    for client in (one_worker, cluster):
        out = tmp_path / f"maps{len(client.nthreads())}"
        predict(*arguments, str(out), _on(client), slide_ids=["S01"])
        assert _blocks(out) == _blocks(tmp_path / "here")


def test_a_repeated_run_on_workers_computes_the_missing_blocks_alone(
    made: Cohort, cluster: Client, tmp_path: Path
) -> None:
    out = tmp_path / "maps"
    shutil.copytree(made.out, out)
    objects = sorted((out / "S01").rglob("expression/c/*/*/*"))
    lost = objects[3::4]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in objects if path not in lost}
    results = predict(made.store.location.url, made.model, str(out), _on(cluster))
    assert [result.computed for result in results] == [0, len(lost), 0]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert _blocks(out) == _blocks(made.out)


def test_workers_replace_another_models_map_where_that_is_wanted(
    made: Cohort, cluster: Client, tmp_path: Path
) -> None:
    out = tmp_path / "maps"
    shutil.copytree(made.out, out)
    invent_model(made.store, "S00", tmp_path / "other", 5)
    arguments = (made.store.location.url, tmp_path / "other", str(out), _on(cluster))
    with pytest.raises(IdentityMismatchError, match="--overwrite"):
        predict(*arguments)
    assert _blocks(out) == _blocks(made.out)
    predict(*arguments, overwrite=True)
    predict(made.store.location.url, tmp_path / "other", str(tmp_path / "fresh"))
    assert _blocks(out) == _blocks(tmp_path / "fresh")


def _job(made: Cohort, out: Path) -> PredictJob:
    ExpressionStore.open_or_create(str(out))
    return PredictJob(
        new_run(),
        version("histosge"),
        made.store.location.url,
        made.model,
        str(out),
        read_fingerprint(made.model),
        None,
        Selection(),
        None,
        "cpu",
        overwrite=False,
    )


def test_a_worker_of_another_version_is_refused(made: Cohort, cluster: Client, tmp_path: Path) -> None:
    job = replace(_job(made, tmp_path / "maps"), version="0.0.7")
    refused = "runs histosge .* and this process 0.0.7; install the same version"
    with pytest.raises(ClusterError, match=refused):
        predict_on_cluster(cluster, job, ["S00"], ignore_progress, lambda *_: None)
    with pytest.raises(ClusterError, match=refused):
        plan_slide(job, "S00")
    assert not list((tmp_path / "maps").rglob("c"))


def test_a_model_that_changed_since_the_run_began_is_refused(made: Cohort, tmp_path: Path) -> None:
    found = plan_slide(replace(_job(made, tmp_path / "maps"), fingerprint="0" * 64), "S00")
    assert isinstance(found, FailedTask)
    assert "must not change meanwhile" in str(found.error)


def test_the_tasks_of_a_slide_read_each_block_and_the_model_once(
    made: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, int]] = []
    loaded: list[object] = []

    def counting_read(slide: EmbeddedSlide, block: Block) -> Part:
        read.append(block.index)
        return read_tissue(slide, block)

    def counting_load(*arguments: Any) -> SavedModel:
        loaded.append(arguments)
        return load_model(*arguments)

    monkeypatch.setattr("histosge.data.embedded_slide.read_tissue", counting_read)
    monkeypatch.setattr("histosge.prediction.worker.load_model", counting_load)
    job = _job(made, tmp_path / "maps")
    plan = plan_slide(job, "S00")
    assert isinstance(plan, SlidePlan)
    assert plan.pieces is not None
    found = {key: read_blocks(job, "S00", blocks) for key, blocks in plan.pieces.readings.items()}
    for piece in plan.pieces.pieces:
        assert piece.readings
        done = predict_piece(job, "S00", piece.blocks, [found[key] for key in piece.readings])
        assert done == len(piece.blocks)
    assert sorted(read) == sorted(set(read))
    assert len(read) == plan.result.planned
    assert len(loaded) == 1
    assert _blocks(tmp_path / "maps") == {
        name: data for name, data in _blocks(made.out).items() if name.startswith("S00")
    }


@pytest.mark.parametrize("is_reduced", [True, False])
@pytest.mark.parametrize("halo_patches", [0, 3, 12])
def test_each_missing_block_is_in_one_piece_and_its_window_in_what_the_piece_reads(
    made: Cohort, is_reduced: bool, halo_patches: int
) -> None:
    slide = open_embedded(made.store, "S00", None, None)
    halo_um = halo_patches * slide.stored.grid.stride_um
    planned = slide.stored.planned(slide.array.block_shape)
    missing = [block for number, block in enumerate(planned) if number % 5]
    cut = cut_into_pieces(slide, missing, halo_um, is_reduced=is_reduced)
    assert sorted(block for piece in cut.pieces for block in piece.blocks) == missing
    read = [block.index for blocks in cut.readings.values() for block in blocks]
    assert len(read) == len(set(read))
    assert bool(read) == (is_reduced and halo_patches > 0)
    for piece in cut.pieces:
        inside = {block.index for key in piece.readings for block in cut.readings[key]}
        for block in piece.blocks if read else ():
            rows, cols = ((low - halo_patches, high + halo_patches) for low, high in (block.rows, block.cols))
            for other in planned:
                overlaps = (
                    other.rows[0] < rows[1]
                    and other.rows[1] > rows[0]
                    and other.cols[0] < cols[1]
                    and other.cols[1] > cols[0]
                )
                assert not overlaps or other.index in inside


def test_a_small_slide_is_one_task_that_reads_its_blocks_itself(made: Cohort, tmp_path: Path) -> None:
    few = write_store(tmp_path / "few", 1, replace(MADE, block=(8, 8)))
    for store, is_one in ((few, True), (made.store, False)):
        slide = open_embedded(store, "S00", None, None)
        planned = slide.stored.planned(slide.array.block_shape)
        assert (len(planned) <= SMALL_SLIDE_BLOCKS) == is_one
        cut = cut_into_pieces(slide, planned, 3 * slide.stored.grid.stride_um, is_reduced=True)
        assert (len(cut.pieces) == 1) == is_one
        assert (not cut.readings) == is_one
        # A slide's size counts, not what is left of it.
        rest = cut_into_pieces(slide, planned[-1:], 3 * slide.stored.grid.stride_um, is_reduced=True)
        assert (not rest.readings) == is_one
        assert [piece.blocks for piece in rest.pieces] == [tuple(planned[-1:])]
        assert cut_into_pieces(slide, [], 99.0, is_reduced=True).pieces == ()


@pytest.mark.e2e
def test_small_slides_that_workers_share_out_have_the_same_maps(cluster: Client, tmp_path: Path) -> None:
    few = write_store(tmp_path / "few", 3, replace(MADE, block=(8, 8)))
    invent_model(few, "S00", tmp_path / "model", 17)
    arguments = (few.location.url, tmp_path / "model")
    seen: list[Progress] = []
    here = predict(*arguments, str(tmp_path / "here"))
    assert predict(*arguments, str(tmp_path / "there"), _on(cluster), on_progress=seen.append) == here
    assert _blocks(tmp_path / "there") == _blocks(tmp_path / "here")
    assert [progress.done for progress in seen] == [result.planned for result in here]


@pytest.mark.e2e
def test_a_worker_killed_in_the_middle_changes_no_byte(made: Cohort, tmp_path: Path) -> None:
    out = tmp_path / "maps"
    with connect(2, None) as client:
        pids = sorted(client.run(os.getpid).values())

        def kill(progress: Progress) -> None:
            if pids:
                os.kill(pids.pop(), signal.SIGKILL)
                pids.clear()

        results = predict(made.store.location.url, made.model, str(out), _on(client), on_progress=kill)
    assert not pids
    assert results == made.results
    assert _blocks(out) == _blocks(made.out)


DEADLY = """
    import os, signal
    import numpy as np

    class Deadly:
        name = "deadly"
        halo_um = 300.0

        @classmethod
        def fit(cls, sections, *, seed=0, epochs=None):
            return cls()

        def predict(self, patches):
            if patches.slide_id == "S01":
                os.kill(os.getpid(), signal.SIGKILL)
            return np.zeros((len(patches), 2), np.float32)

        def config(self):
            return {}

        def state(self):
            return {"nothing": np.zeros(1)}

        @classmethod
        def from_state(cls, config, state):
            return cls()
"""


@pytest.mark.e2e
def test_a_slide_that_kills_workers_is_set_aside_and_the_others_are_finished(
    made: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "deadly_model.py").write_text(textwrap.dedent(DEADLY))
    monkeypatch.syspath_prepend(tmp_path)
    preset = "deadly_model:Deadly"
    card = replace(load_model(made.model).card, preset=preset, genes=("A", "B"))
    save_model(tmp_path / "model", importlib.import_module("deadly_model").Deadly(), card)
    settings = PredictSettings(workers=2, preset=preset)
    results = predict(made.store.location.url, tmp_path / "model", str(tmp_path / "maps"), settings)
    assert "kills the process that predicts it" in results[1].failed
    assert [result.failed for result in results[::2]] == ["", ""]
    store = ExpressionStore.open(str(tmp_path / "maps"))
    for result in results[::2]:
        found = store.map(result.slide_id, result.grid_key)
        assert not found.array.missing(found.planned())


KILLED = """
    import os, signal, sys
    from histosge.prediction.predict import PredictSettings, predict
    def stop(progress):
        if (progress.label, progress.done) == ("S01", 5):
            os.kill(os.getpid(), signal.SIGKILL)
    predict(*sys.argv[1:], on_progress=stop)
"""


def test_killed_in_the_middle_only_what_is_missing_is_computed_and_all_is_the_same(
    made: Cohort, tmp_path: Path
) -> None:
    arguments = [made.store.location.url, str(made.model), str(tmp_path / "maps")]
    killed = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILLED), *arguments], check=False, env=os.environ
    )
    assert killed.returncode == -signal.SIGKILL
    planned = made.results[0].planned
    # Two blocks are worked on at once: the sixth may have been written before the kill.
    there = len(list((tmp_path / "maps" / "S01").rglob("expression/c/*/*/*")))
    assert there in (5, 6)
    again = predict(*arguments)
    assert [result.computed for result in again] == [0, planned - there, planned]
    assert _blocks(tmp_path / "maps") == _blocks(made.out)
    assert [result.computed for result in predict(*arguments)] == [0, 0, 0]


def test_a_block_without_one_of_its_gene_groups_is_missing_and_computed_again(
    made: Cohort, tmp_path: Path
) -> None:
    model, out = tmp_path / "model", tmp_path / "maps"
    invent_model(made.store, "S00", model, GENE_GROUP + 7, preset="mean")
    arguments = (made.store.location.url, model, str(out))
    (whole,) = predict(*arguments, slide_ids=["S00"])
    blocks = _blocks(out)
    assert len(list(out.rglob("expression/c/*/*/*"))) == 2 * whole.planned
    for group in ("0", "1"):
        lost = sorted(out.rglob(f"expression/c/*/*/{group}"))[5]
        lost.unlink()
        (again,) = predict(*arguments, slide_ids=["S00"])
        assert (again.computed, again.planned) == (1, whole.planned)
        assert _blocks(out) == blocks


def _without_block(made: Cohort, folder: Path, *slide_ids: str) -> str:
    shutil.copytree(made.store.location.url, folder)
    store = Store.open(str(folder))
    for slide_id in slide_ids:
        slide = open_embedded(store, slide_id, None, None)
        writable = BlockArray.open(store.location, slide.array.path, read_only=False)
        writable.remove_block(slide.stored.planned((7, 11))[3])
    return str(folder)


@pytest.mark.parametrize("where", ["here", "on workers"])
def test_a_slide_that_lacks_blocks_is_set_aside_and_the_others_are_predicted(
    made: Cohort, cluster: Client, tmp_path: Path, where: str
) -> None:
    broken = _without_block(made, tmp_path / "store", "S01")
    settings = _on(cluster) if where == "on workers" else PredictSettings()
    results = predict(broken, made.model, str(tmp_path / "maps"), settings)
    assert "slide 'S01' has" in results[1].failed
    assert [result.computed for result in results] == [made.results[0].planned, 0, made.results[2].planned]
    assert not (tmp_path / "maps" / "S01").exists()


def test_a_set_aside_slide_is_named_and_the_command_exits_with_1(made: Cohort, tmp_path: Path) -> None:
    broken = _without_block(made, tmp_path / "store", "S00")
    command = ["predict", broken, str(made.model), str(tmp_path / "maps"), "--quiet"]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 1, done.output
    first, *others = done.output.splitlines()
    assert first.startswith("S00: failed: slide 'S00' has")
    assert [line.split(":")[0] for line in others] == ["S01", "S02"]


@pytest.mark.parametrize("slide_ids", [["S01"], ["S01", "S02"]])
def test_what_no_worker_could_predict_is_refused_before_any_starts(
    made: Cohort, tmp_path: Path, slide_ids: list[str]
) -> None:
    broken = _without_block(made, tmp_path / "store", "S01", "S02")
    with pytest.raises(StoreError, match="slide 'S01' has"):
        predict(broken, made.model, str(tmp_path / "maps"), PredictSettings(workers=2), slide_ids=slide_ids)
    assert not (tmp_path / "maps").exists()


def test_slides_are_opened_when_their_turn_comes(made: Cohort, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(made.store.location.url, store)

    def remove_the_second(progress: Progress) -> None:
        shutil.rmtree(store / "S01", ignore_errors=True)

    results = predict(str(store), made.model, str(tmp_path / "maps"), on_progress=remove_the_second)
    assert [bool(result.failed) for result in results] == [False, True, False]


def test_embeddings_that_are_reduced_once_a_block_give_the_map_of_the_whole_slide(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", 1, Made((23, 29), 307, (7, 11), frame=2))
    saved = invent_model(store, "S00", tmp_path / "model", 17)
    assert isinstance(saved.model, ReducingModel)
    reduce, _ = saved.model.split()
    assert reduce is not None
    predict(store.location.url, tmp_path / "model", str(tmp_path / "maps"))
    slide = open_embedded(store, "S00", None, None)
    patches = load_patches(slide)
    assert reduce(patches.embedding).shape[1] < 307
    stored = ExpressionStore.open(str(tmp_path / "maps")).map("S00", slide.stored.grid.spec.key)
    values = stored.array.read((0, 23), (0, 29))[patches.rows, patches.cols]
    np.testing.assert_allclose(values, saved.model.predict(patches), rtol=2e-3, atol=2e-3)
