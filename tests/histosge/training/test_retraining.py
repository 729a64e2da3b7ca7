"""A model folder that is trained again: the same is nothing to do, another is refused or replaced whole."""

import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, NamedTuple

import pytest
from killed_steps import COUNT_STEPS
from threadpoolctl import threadpool_info, threadpool_limits

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import EarlierResultError
from featurestore.grid import GridSpec
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.protocol import Model
from histosge.models.registry import load_preset
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.model_files import CONFIG, WEIGHTS
from histosge.training.saved_model import load_model
from histosge.training.train import TrainSettings, train

SPEC = SyntheticSpec(
    size_px=(808, 760), mpp=0.5, genes=GeneCounts(4, 3, 2, 2), spot_diameter_um=41.0, spot_pitch_um=59.0
)
SETTINGS = TrainSettings(preset="ridge", genes=7, seed=3, intervals=False)


class Cohort(NamedTuple):
    sheet: Path
    store: Path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort")
    made = make_cohort(folder / "data", SPEC, 3)
    settings = EmbedSettings(encoders=("colour",), spec=GridSpec(1.0, 48, 48))
    embed(made.sheet, folder / "store", settings)
    return Cohort(Path(made.sheet), folder / "store")


@pytest.fixture(scope="module")
def trained(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "model"
    train(*cohort, folder, SETTINGS)
    return folder


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained model, which a test may write into."""
    shutil.copytree(trained, tmp_path / "model")
    return tmp_path / "model"


def _contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _refusal(cohort: Cohort, model: Path, settings: TrainSettings = SETTINGS) -> str:
    before = _contents(model)
    with pytest.raises(EarlierResultError) as refused:
        train(*cohort, model, settings)
    assert _contents(model) == before
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_the_same_again_is_nothing_to_do(cohort: Cohort, model: Path) -> None:
    before = _contents(model)
    again = train(*cohort, model, SETTINGS)
    assert again.was_there
    assert again.fingerprint == load_model(model).fingerprint
    assert _contents(model) == before


def test_the_same_is_trained_again_where_it_is_to_be_replaced(cohort: Cohort, model: Path) -> None:
    before = _contents(model)
    again = train(*cohort, model, SETTINGS, overwrite=True)
    assert not again.was_there
    after = _contents(model)
    assert {name: content for name, (_, content) in after.items()} == {
        name: content for name, (_, content) in before.items()
    }
    assert after[WEIGHTS][0] > before[WEIGHTS][0]


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        ({"genes": 5}, "genes 7 (now 5)"),
        ({"genes": ["G1", "G2"]}, 'genes 7 (now ["G1", "G2"])'),
        ({"seed": 4}, "seed 3 (now 4)"),
        ({"epochs": 2}, "epochs null (now 2)"),
        ({"preset": "mean"}, "preset ridge (now mean)"),
        ({"intervals": None}, "intervals false (now null)"),
    ],
)
def test_other_settings_are_refused_with_both_values(
    cohort: Cohort, model: Path, change: dict[str, object], shown: str
) -> None:
    assert shown in _refusal(cohort, model, replace(SETTINGS, **change))


def test_other_inputs_are_refused_with_both_values(cohort: Cohort, model: Path, tmp_path: Path) -> None:
    lines = cohort.sheet.read_text().splitlines()
    data = tmp_path / "data"
    shutil.copytree(cohort.sheet.parent, data)
    sheet = data / "changed.csv"
    sheet.write_text("\n".join(lines[:-1]) + "\n")
    assert "(now none)" in _refusal(Cohort(sheet, cohort.store), model)
    column = lines[0].split(",").index("donor")
    cells = lines[1].split(",")
    cells[column] = "somebody"
    sheet.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]) + "\n")
    assert "donor D1 (now somebody)" in _refusal(Cohort(sheet, cohort.store), model)
    first, second = (data / line.split(",")[lines[0].split(",").index("expression")] for line in lines[1:3])
    shutil.copy(second, first)
    sheet.write_text("\n".join(lines) + "\n")
    assert "sections S1 expression" in _refusal(Cohort(sheet, cohort.store), model)


def test_a_sheet_elsewhere_with_its_rows_in_another_order_is_the_same(
    cohort: Cohort, model: Path, tmp_path: Path
) -> None:
    data = tmp_path / "moved"
    shutil.copytree(cohort.sheet.parent, data)
    header, *rows = cohort.sheet.read_text().splitlines()
    sheet = data / "turned.csv"
    sheet.write_text("\n".join([header, *reversed(rows)]) + "\n")
    assert train(sheet, cohort.store, model, SETTINGS).was_there
    # Not only said to be the same: trained from it, every bit is.
    other = train(sheet, cohort.store, tmp_path / "other", SETTINGS)
    assert not other.was_there
    assert other.fingerprint == load_model(model).fingerprint


def test_a_model_that_does_not_say_what_it_was_made_with_is_kept(cohort: Cohort, model: Path) -> None:
    document = json.loads((model / CONFIG).read_text())
    del document["made_with"]
    (model / CONFIG).write_text(json.dumps(document))
    assert "replace it with --overwrite" in _refusal(cohort, model)
    assert load_model(model).card.preset == "ridge"
    assert not train(*cohort, model, SETTINGS, overwrite=True).was_there
    assert train(*cohort, model, SETTINGS).was_there


def test_a_damaged_model_is_not_passed_off_as_finished(cohort: Cohort, model: Path) -> None:
    (model / WEIGHTS).write_bytes(b"no weights")
    with pytest.raises(ModelError, match="train again, with --overwrite"):
        train(*cohort, model, SETTINGS)
    train(*cohort, model, SETTINGS, overwrite=True)
    assert load_model(model).card.seed == 3


def test_a_folder_of_something_else_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("miaow")
    for overwrite in (False, True):
        with pytest.raises(ModelError, match="holds something that is no histosge model"):
            train("no sheet.csv", "no store", tmp_path / "photos", SETTINGS, overwrite=overwrite)
    assert (tmp_path / "photos" / "cat.txt").read_text() == "miaow"


def test_files_of_a_model_can_be_read_by_whom_the_umask_allows(model: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in model.rglob("*") if path.is_file()}
    probe = model.parent / "probe"
    probe.write_text("")
    assert modes == {stat.S_IMODE(probe.stat().st_mode)}


KILLED = (
    COUNT_STEPS
    + """
from histosge.training import saved_model

old, new, target = (Path(text) for text in sys.argv[1:4])
loaded = saved_model.load_model(new)

counted(os, "chmod")
for way in ("swap", "two renames"):
    if way == "two renames":
        whole_file._swap = lambda one, other: False
    at, killed = 0, True
    while killed:
        at += 1
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(old, target)
        child = os.fork()
        if not child:
            in_child = True
            saved_model.save_model(target, loaded.model, loaded.card)
            os._exit(0)
        killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        print(f"{way}:", "killed" if killed else "finished", saved_model.load_model(target).card.seed)
"""
)


def test_a_kill_at_any_step_of_replacing_a_model_leaves_the_old_or_the_new_one(
    cohort: Cohort, model: Path, tmp_path: Path
) -> None:
    train(*cohort, tmp_path / "new", replace(SETTINGS, seed=5))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, model, tmp_path / "new", tmp_path / "killed"],
        capture_output=True,
        text=True,
        check=True,
    )
    # Both ways in one process, most of whose time is imports.
    for way in ("swap", "two renames"):
        lines = [line.removeprefix(f"{way}: ") for line in done.stdout.splitlines() if line.startswith(way)]
        assert lines[-1] == "finished 5"
        # Both are seen, so some kills came before the replacement and some after it.
        assert set(lines[:-1]) == {"killed 3", "killed 5"}


class _CountsThreads:
    """A model that is the mean, and keeps how many threads products of matrices had while it was fitted."""

    name = "threads"
    threads: ClassVar[set[int]] = set()

    def fit(self, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Model:
        self.threads.update(info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas")
        return load_preset("mean").fit(sections)


def test_a_model_is_fitted_with_one_thread_for_products_of_matrices(cohort: Cohort, tmp_path: Path) -> None:
    """Several would wait for each other at every small product, most of all where other processes run."""
    with threadpool_limits(2, user_api="blas"):
        train(*cohort, tmp_path / "model", replace(SETTINGS, preset=_CountsThreads()))
        after = {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}
    assert (_CountsThreads.threads, after) == ({1}, {2})
