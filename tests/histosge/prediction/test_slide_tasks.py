"""Prediction that is shared out, killed or repeated leaves the same bytes."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from _models import invent_model
from _stores import Made, write_store
from typer.testing import CliRunner

from featurestore.analysis.cluster_stream import connect
from featurestore.errors import StoreError
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.errors import ModelError
from histosge.models.protocol import ReducingModel
from histosge.prediction.expression_store import GENE_GROUP, ExpressionStore
from histosge.prediction.predict import PredictSettings, predict
from histosge.prediction.slide_tasks import map_slides
from histosge_cli.main import app

SLIDES = 3
MADE = Made((23, 29), 13, (7, 11), frame=2)


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


@pytest.mark.e2e
def test_the_workers_of_a_running_cluster_give_the_same_maps(made: Cohort, tmp_path: Path) -> None:
    with connect(2, None) as client:
        settings = PredictSettings(scheduler=client.scheduler.address)
        results = predict(made.store.location.url, made.model, str(tmp_path / "maps"), settings)
    assert results == made.results
    assert _blocks(tmp_path / "maps") == _blocks(made.out)


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


def _die_once(flag: str, slide_id: str) -> str:
    if slide_id == "b" and not Path(flag).exists():
        Path(flag).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if slide_id == "refused":
        raise ModelError("no")
    return slide_id.upper()


@pytest.mark.slow
def test_a_worker_that_dies_is_replaced_and_a_refusal_is_passed_on(tmp_path: Path) -> None:
    from functools import partial

    seen: list[str] = []
    run = partial(_die_once, str(tmp_path / "flag"))
    assert map_slides(run, ["a", "b", "c"], 2, lambda name, _: seen.append(name)) == ["A", "B", "C"]
    assert sorted(seen) == ["a", "b", "c"]
    with pytest.raises(ModelError, match="no"):
        map_slides(run, ["refused"], 2, lambda *_: None)


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


def test_what_no_worker_could_predict_is_refused_before_any_starts(made: Cohort, tmp_path: Path) -> None:
    broken = write_store(tmp_path / "store", 2, MADE)
    array = broken.embedding("S01", "mpp0.5000_px224_stride112", "random")
    array.remove_block(
        Store.open(broken.location.url).grid("S01", "mpp0.5000_px224_stride112").planned((7, 11))[3]
    )
    with pytest.raises(StoreError, match="slide 'S01' has"):
        predict(broken.location.url, made.model, str(tmp_path / "maps"), PredictSettings(workers=2))
    assert not (tmp_path / "maps").exists()
    assert ExpressionStore.open(str(made.out))


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
