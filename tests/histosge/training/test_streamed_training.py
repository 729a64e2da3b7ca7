"""Training section by section gives the model that training in memory gives, and an oracle that shares no arithmetic."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import _dense_oracle
import numpy as np
import pytest
from _cohorts import MadeCohort, write_cohort, write_section, write_sheet
from _dense_oracle import DenseOracle, predict_exactly
from typer.testing import CliRunner

from featurestore.errors import StoreError
from featurestore.events import Progress
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import Patches
from histosge.errors import ModelError
from histosge.models import scale_differences
from histosge.training.kept_sums import KeptSums
from histosge.training.saved_model import SavedModel, load_model
from histosge.training.streaming.fit_streamed import STREAM_FROM_BYTES
from histosge.training.train import TrainSettings, train
from histosge_cli.main import app

# Two rows of blocks are narrower than the widest Gaussian: bands overlap.
MADE = MadeCohort(sections=5, shape=(37, 41), dim=13, spots=211, genes=23, block=(7, 11), frame=5)
SETTINGS = TrainSettings(genes=19)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    sheet, store = write_cohort(tmp_path_factory.mktemp("cohort"), MADE)
    _spoil_patches(store, "S001")
    return sheet, store


def _spoil_patches(store: Path, slide_id: str) -> None:
    """Make some patches unreadable, as a slide with damaged tiles has them."""
    opened = Store.open(str(store))
    grid, encoder = opened.select(None, None, slide_id)
    stored = opened.grid(slide_id, grid)
    array = BlockArray.open(opened.location, opened.embedding(slide_id, grid, encoder).path, read_only=False)
    block = stored.planned(array.block_shape)[8]
    values = array.read_block(block).copy()
    values[2:4, 3] = np.nan
    array.write(block, values)


def _difference(a: SavedModel, b: SavedModel, store: Path) -> float:
    patches = load_patches(open_embedded(Store.open(str(store)), "S002", None, None))
    one, other = a.predict(patches).values, b.predict(patches).values
    return float(np.abs(one - other).max() / one.std())


@pytest.fixture(scope="module")
def of_five(cohort: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `dense` of five sections that were streamed; only for reading."""
    folder = tmp_path_factory.mktemp("five") / "model"
    train(*cohort, folder, SETTINGS, stream=True)
    assert not list(folder.parent.glob(".*"))
    return folder


@pytest.mark.parametrize("preset", ["dense", "ridge"])
def test_streamed_and_in_memory_are_one_model(
    preset: str, cohort: tuple[Path, Path], of_five: Path, tmp_path: Path
) -> None:
    settings = replace(SETTINGS, preset=preset)
    whole = train(*cohort, tmp_path / "whole", settings, stream=False)
    # A `dense` that was streamed is there already.
    folder = of_five if preset == "dense" else tmp_path / "streamed"
    streamed = train(*cohort, folder, settings, stream=True)
    assert streamed.was_there == (preset == "dense")
    assert streamed.card == whole.card
    # Predictions are in single precision, of which each has an error of 1e-6 of their spread.
    assert _difference(whole, streamed, cohort[1]) < 1e-5
    assert whole.intervals is not None
    assert streamed.intervals is not None
    assert streamed.intervals.n_spots == whole.intervals.n_spots
    assert streamed.intervals.held_out == whole.intervals.held_out
    np.testing.assert_allclose(streamed.intervals.half_width, whole.intervals.half_width, rtol=1e-5)
    np.testing.assert_allclose(streamed.intervals.trust, whole.intervals.trust, atol=1e-5)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("stream", [True, False])
def test_dense_equals_scikit_learn_in_double_precision(
    stream: bool, cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    streamed = train(*cohort, tmp_path / "model", replace(SETTINGS, intervals=False), stream=stream)
    loaded = load_sections(str(cohort[0]), str(cohort[1]), Selection())
    sections = [training_section(item.section, streamed.card.genes) for item in loaded]
    oracle = DenseOracle.fit(sections)
    patches = sections[3].patches
    wanted, found = oracle.predict(patches), predict_exactly(streamed.model.state(), patches)
    assert np.abs(found - wanted).max() / wanted.std() < 1e-6


@pytest.fixture
def short_embeddings_are_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embeddings of 13 numbers are projected, as those of a thousand are."""
    for module in (scale_differences, _dense_oracle):
        monkeypatch.setattr(module, "MAX_DIM", MADE.dim - 2)
        monkeypatch.setattr(module, "N_COMPONENTS", 5)
        monkeypatch.setattr(module, "SAMPLED", 300)
    monkeypatch.setattr(scale_differences, "_CANDIDATES", 800)
    monkeypatch.setattr(_dense_oracle, "CANDIDATES", 800)


@pytest.mark.usefixtures("short_embeddings_are_long")
def test_long_embeddings_are_projected_alike_whichever_way_sections_come(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, intervals=True)
    whole, streamed = (
        train(*cohort, tmp_path / str(stream), settings, stream=stream) for stream in (False, True)
    )
    loaded = load_sections(str(cohort[0]), str(cohort[1]), Selection())
    sections = [training_section(item.section, streamed.card.genes) for item in loaded]
    patches = sections[1].patches
    oracle = DenseOracle.fit(sections)
    assert oracle.projection is not None
    assert oracle.projection.shape == (MADE.dim, 5)
    wanted = oracle.predict(patches)
    for saved in (whole, streamed):
        assert len(saved.model.config()["weights"]) == 6
        found = predict_exactly(saved.model.state(), patches)
        assert np.abs(found - wanted).max() / wanted.std() < 1e-6
    one, other = (predict_exactly(saved.model.state(), patches) for saved in (whole, streamed))
    assert np.abs(one - other).max() / one.std() < 1e-6
    # The fits without a fold share the components of all sections: of embeddings alone, and nearly the same.
    assert whole.intervals is not None
    assert streamed.intervals is not None
    widths = [saved.intervals.half_width.mean() for saved in (whole, streamed) if saved.intervals]
    assert widths[0] == pytest.approx(widths[1], rel=0.02)


@pytest.mark.usefixtures("short_embeddings_are_long")
def test_sections_are_added_with_the_projection_of_the_first_ones(
    cohort: tuple[Path, Path], seven: tuple[Path, Path], tmp_path: Path
) -> None:
    patches = load_patches(open_embedded(Store.open(str(cohort[1])), "S006", None, None))
    for stream in (True, False):
        five = train(*cohort, tmp_path / f"five-{stream}", replace(SETTINGS, intervals=False), stream=stream)
        further = train(*seven, tmp_path / f"further-{stream}", start_from=tmp_path / f"five-{stream}")
        wanted = _with_patterns_and_weights(*seven, further.card.genes, five, patches)
        found = predict_exactly(further.model.state(), patches)
        assert np.abs(found - wanted).max() / wanted.std() < 1e-6
    # And once more: the projection is kept again.
    assert KeptSums.open(tmp_path / "further-True").differences.projection.shape == (MADE.dim, 5)  # type: ignore[union-attr]


def test_sums_of_an_earlier_version_go_on_without_a_ridge_on_differences(
    cohort: tuple[Path, Path], seven: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as earlier:
        earlier.setattr("histosge.models.scale_ridges.WITH_DIFFERENCES", False)
        five = train(*cohort, tmp_path / "five", replace(SETTINGS, intervals=False), stream=True)
    document = json.loads((tmp_path / "five" / "stats" / "stats.json").read_text())
    assert document["format"] == 1
    assert "n_differences" not in document
    said = list[str]()
    further = train(*seven, tmp_path / "further", start_from=tmp_path / "five", on_message=said.append)
    assert sum("without the ridge on differences" in line for line in said) == 1
    patches = load_patches(open_embedded(Store.open(str(cohort[1])), "S006", None, None))
    wanted = _with_patterns_and_weights(*seven, further.card.genes, five, patches)
    found = predict_exactly(further.model.state(), patches)
    assert np.abs(found - wanted).max() / wanted.std() < 1e-6
    assert [len(further.model.config()[key]) for key in ("weights", "penalties")] == [5, 5]
    # Sums that do not go with the model's weights are refused.
    document["n_differences"] = 5 * MADE.dim
    (tmp_path / "five" / "stats" / "stats.json").write_text(json.dumps(document))
    with pytest.raises(ModelError, match="has sums of 6 ridges, and the model weights of 5"):
        train(*seven, tmp_path / "other", start_from=tmp_path / "five")


def test_each_block_is_read_once_a_pass(
    cohort: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: dict[tuple[str, object], int] = {}
    read_block = BlockArray.read_block

    def count(array: BlockArray, block, *args, **kwargs):  # type: ignore[no-untyped-def]
        key = (array.path, block.index)
        reads[key] = reads.get(key, 0) + 1
        return read_block(array, block, *args, **kwargs)

    monkeypatch.setattr(BlockArray, "read_block", count)
    train(*cohort, tmp_path / "model", SETTINGS, stream=True)
    # Three passes read embeddings: the survey, the sums, and the predictions of held-out sections.
    assert set(reads.values()) == {3}
    planned = open_embedded(Store.open(str(cohort[1])), "S000", None, None)
    n_blocks = len(planned.stored.planned(planned.array.block_shape))
    assert len(reads) == MADE.sections * n_blocks


class StoppedError(Exception):
    """As if the process were killed."""


def test_an_interrupted_training_goes_on_where_it_was(
    cohort: tuple[Path, Path], of_five: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = load_model(of_five)
    monkeypatch.setattr("histosge.training.streaming.gather.SECONDS_BETWEEN_SAVES", 0.0)

    def stop_at(label: str):  # type: ignore[no-untyped-def]
        def stop(progress: Progress) -> None:
            if label in progress.label:
                raise StoppedError

        return stop

    for label in ("survey of S003", "reading S002", "holding out S001", "intervals on S004"):
        with pytest.raises(StoppedError):
            train(*cohort, tmp_path / "model", SETTINGS, stream=True, on_progress=stop_at(label))
    reads: list[str] = []
    read_block = BlockArray.read_block
    monkeypatch.setattr(
        BlockArray,
        "read_block",
        lambda array, *a, **k: reads.append(array.path) or read_block(array, *a, **k),
    )
    again = train(*cohort, tmp_path / "model", SETTINGS, stream=True)
    assert reads == []
    assert again.fingerprint == undisturbed.fingerprint
    assert not list(tmp_path.glob(".*"))


def test_a_missing_block_is_named_with_the_command(cohort: tuple[Path, Path], tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(cohort[1], store)
    block = sorted(store.glob("S003/**/c/3/*/0"))[0]
    block.unlink()
    with pytest.raises(StoreError, match="S003") as refused:
        train(cohort[0], store, tmp_path / "model", SETTINGS, stream=True)
    assert "histosge embed" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_what_cannot_be_streamed_is_refused_with_the_reason(
    cohort: tuple[Path, Path], tmp_path: Path
) -> None:
    cases = (
        (replace(SETTINGS, preset="knn"), "preset"),
        (replace(SETTINGS, stains=True), "--stains"),
    )
    for settings, why in cases:
        with pytest.raises(ModelError, match=why):
            train(*cohort, tmp_path / "model", settings, stream=True)
    few = write_sheet(cohort[0].parent, tmp_path / "few.csv", MADE, range(3))
    with pytest.raises(ModelError, match="3 sections are fewer than 4"):
        train(few, cohort[1], tmp_path / "model", SETTINGS, stream=True)


def test_a_large_cohort_is_streamed_by_itself(
    cohort: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    train(*cohort, tmp_path / "small", replace(SETTINGS, preset="ridge"), on_message=said.append)
    assert not any("streamed" in line for line in said)
    assert STREAM_FROM_BYTES == 1 << 30
    monkeypatch.setattr("histosge.training.streamed.STREAM_FROM_BYTES", 1000)
    train(*cohort, tmp_path / "large", replace(SETTINGS, preset="ridge"), on_message=said.append)
    assert any("sections are streamed" in line for line in said)
    train(*cohort, tmp_path / "other", replace(SETTINGS, preset="knn"), on_message=said.append)
    assert any("held in memory" in line and "preset" in line for line in said)


@pytest.fixture(scope="module")
def seven(cohort: tuple[Path, Path]) -> tuple[Path, Path]:
    """The same cohort with two further sections."""
    folder = cohort[0].parent
    for number in (5, 6):
        write_section(folder, Store.open_or_create(str(cohort[1])), MADE, number)
    return write_sheet(folder, folder / "seven.csv", MADE, range(7)), cohort[1]


@pytest.mark.parametrize("preset", ["dense", "ridge"])
def test_sections_added_to_sums_give_the_model_of_all_sections(
    preset: str, cohort: tuple[Path, Path], seven: tuple[Path, Path], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, preset=preset, intervals=False)
    patches = load_patches(open_embedded(Store.open(str(cohort[1])), "S006", None, None))
    whole = None
    for stream in (True, False):
        five = tmp_path / f"five-{stream}"
        train(*cohort, five, settings, stream=stream)
        further = train(*seven, tmp_path / f"further-{stream}", start_from=five)
        genes = further.card.genes
        if whole is None:
            whole = train(*seven, tmp_path / "whole", replace(settings, genes=genes), stream=True)
        assert whole.card.genes == genes
        if preset == "ridge":
            wanted = whole.predict(patches).values
            assert np.abs(further.predict(patches).values - wanted).max() / wanted.std() < 1e-5
            continue
        wanted = _with_patterns_and_weights(*seven, genes, load_model(five), patches)
        found = predict_exactly(further.model.state(), patches)
        assert np.abs(found - wanted).max() / wanted.std() < 1e-6
        # With patterns and weights of its own, a full training is another model, but nearly the same.
        own = predict_exactly(whole.model.state(), patches)
        assert 1e-6 < np.abs(found - own).max() / own.std() < 0.3


def _with_patterns_and_weights(
    sheet: Path, store: Path, genes: tuple[str, ...], saved: SavedModel, patches: Patches
) -> np.ndarray:
    """Return the oracle's predictions of a training on all sections with the patterns and weights of a model."""
    sections = [
        training_section(item.section, genes) for item in load_sections(str(sheet), str(store), Selection())
    ]
    state, config = saved.model.state(), saved.model.config()
    # The first five sections are those of the model.
    oracle = DenseOracle.fit(sections, state["targets.axes"], np.array(config["weights"]), sections[:5])
    return oracle.predict(patches)


def test_old_sections_are_not_read_again(
    of_five: Path, seven: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, paths = list[str](), set[str]()
    read_block = BlockArray.read_block
    monkeypatch.setattr(
        BlockArray, "read_block", lambda array, *a, **k: paths.add(array.path) or read_block(array, *a, **k)
    )
    further = train(*seven, tmp_path / "model", start_from=of_five, on_message=said.append)
    assert {path.split("/")[0] for path in paths} == {"S005", "S006"}
    assert [section["slide_id"] for section in further.card.sections] == [f"S{i:03}" for i in range(7)]
    assert any("intervals cover" in line and "new sections" in line for line in said)
    assert train(*seven, tmp_path / "model", start_from=of_five).was_there
    # And on from there: what is in the model is known.
    with pytest.raises(ModelError, match="all 7 sections of the sheet are in the model already"):
        train(*seven, tmp_path / "again", start_from=tmp_path / "model")


def test_a_changed_section_is_refused_by_name(
    of_five: Path, seven: tuple[Path, Path], tmp_path: Path
) -> None:
    sheet = tmp_path / "changed.csv"
    folder = seven[0].parent
    # Another section's counts under an old name.
    sheet.write_text(seven[0].read_text().replace(str(folder / "S002.h5ad"), str(folder / "S005.h5ad"), 1))
    with pytest.raises(ModelError, match="expression of section 'S002' has changed") as refused:
        train(sheet, seven[1], tmp_path / "model", start_from=of_five)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "model").exists()


def test_sums_are_left_out_where_they_are_not_wanted(
    cohort: tuple[Path, Path], seven: tuple[Path, Path], tmp_path: Path
) -> None:
    train(*cohort, tmp_path / "bare", replace(SETTINGS, preset="ridge", intervals=False), keep_sums=False)
    assert not (tmp_path / "bare" / "stats").exists()
    # What adds to sums says how many it adds to; without them the weights are adapted.
    said = list[str]()
    bare = train(*seven, tmp_path / "model", start_from=tmp_path / "bare", on_message=said.append)
    assert bare.card.origin is not None
    assert not any("sums of 5" in line for line in said)


def test_the_preset_of_another_kind_is_refused_with_both_names(
    cohort: tuple[Path, Path], seven: tuple[Path, Path], tmp_path: Path
) -> None:
    """`dense` is also what is trained where no preset is given: it must not pass for one that was left out."""
    train(*cohort, tmp_path / "five", replace(SETTINGS, preset="ridge", intervals=False))
    command = ["train", *map(str, (*seven, tmp_path / "model")), "--from", str(tmp_path / "five"), "--quiet"]
    refused = CliRunner().invoke(app, [*command, "--preset", "dense"])
    assert isinstance(refused.exception, ModelError)
    assert "preset 'ridge', which stays, and 'dense' was given" in str(refused.exception)
    assert "\n" not in str(refused.exception)
    assert not (tmp_path / "model").exists()
    same = CliRunner().invoke(app, [*command, "--preset", "ridge"])
    assert same.exit_code == 0, same.output
    assert load_model(tmp_path / "model").card.preset == "ridge"


def test_other_genes_presets_and_damaged_sums_are_refused(
    of_five: Path, seven: tuple[Path, Path], tmp_path: Path
) -> None:
    for settings, why in (
        (TrainSettings(genes=5), "leave --genes out"),
        (TrainSettings(genes=1000), "leave --genes out"),
        (TrainSettings(preset="ridge"), "leave --preset out"),
        (TrainSettings(loss="nb"), "leave --loss"),
    ):
        with pytest.raises(ModelError, match=why):
            train(*seven, tmp_path / "model", settings, start_from=of_five)
    damaged = tmp_path / "damaged"
    shutil.copytree(of_five, damaged)
    file = damaged / "stats" / "group-1.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"group-1\.safetensors cannot be read"):
        train(*seven, tmp_path / "model", start_from=damaged)
