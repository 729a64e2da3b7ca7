"""Train, predict and evaluate as a user types them: presets, models of their own, and every option once."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata as ad
import own_model
import polars as pl
import pytest

import histosge
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge.errors import HistosgeError
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

Histosge = Callable[..., NamedTuple]
GRID = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
SPEC = SyntheticSpec(
    size_px=(1608, 1528), mpp=0.5, genes=GeneCounts(6, 5, 3, 3), spot_diameter_um=41.0, spot_pitch_um=59.0
)
GENES = 11


class Cohort(NamedTuple):
    """Two sections with their embeddings."""

    sheet: Path
    store: Path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    folder = tmp_path_factory.mktemp("cohort")
    made = Cohort(make_cohort(folder, SPEC, 2).sheet, folder / "store")
    embed(
        str(made.sheet), str(made.store), EmbedSettings(encoders=("colour",), spec=GRID, block_shape=(13, 17))
    )
    return made


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of the user's in it that is on no path."""
    monkeypatch.chdir(tmp_path)
    # Restored afterwards: the commands put the current folder on the path.
    monkeypatch.setattr("sys.path", sys.path[:])
    own_model.write_module(tmp_path, "mymodels")
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)
    return tmp_path


def _one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def _card(model: Path) -> dict[str, object]:
    card: dict[str, object] = json.loads((model / "config.json").read_text())["card"]
    return card


def test_a_class_in_the_current_folder_is_trained_and_predicts_where_it_is_named(
    histosge: Histosge, cohort: Cohort, own_folder: Path
) -> None:
    model, maps = own_folder / "model", own_folder / "maps"
    trained = histosge(
        "train", cohort.sheet, cohort.store, model, "--preset", "mymodels:Line", "--genes", GENES
    )
    assert trained.code == 0, trained.err
    assert "mymodels:Line for 11 genes" in trained.out
    assert _card(model)["preset"] == "mymodels:Line"

    refused = histosge("predict", cohort.store, model, maps)
    assert (refused.code, refused.out) == (2, "")
    assert "add --preset mymodels:Line" in _one_line(refused.err)
    assert not maps.exists()

    report = own_folder / "predict.html"
    named = ("--preset", "mymodels:Line", "--slide", "S1", "--report", report)
    predicted = histosge("predict", cohort.store, model, maps, *named)
    assert predicted.code == 0, predicted.err
    assert report.is_file()
    again = histosge("predict", cohort.store, model, maps, "--preset", "mymodels:Line")
    assert again.code == 0, again.err
    assert again.out.splitlines()[0].startswith("S1: nothing to do")
    assert "S2: " in again.out

    wrong = histosge("predict", cohort.store, model, own_folder / "other", "--preset", "mymodels:Other")
    assert "was trained with 'mymodels:Line', not with 'mymodels:Other'" in _one_line(wrong.err)


@pytest.mark.e2e
def test_workers_find_a_class_in_the_current_folder(
    histosge: Histosge, cohort: Cohort, own_folder: Path
) -> None:
    model, maps = own_folder / "model", own_folder / "maps"
    preset = ("--preset", "mymodels:Line")
    assert histosge("train", cohort.sheet, cohort.store, model, *preset, "--genes", GENES).code == 0
    assert histosge("predict", cohort.store, model, maps, *preset, "--slide", "S1").code == 0
    again = histosge("predict", cohort.store, model, maps, *preset, "--workers", 2)
    assert again.code == 0, again.err
    assert again.out.splitlines()[0].startswith("S1: nothing to do")
    assert "S2: " in again.out


def test_own_models_are_scored_beside_the_presets(
    histosge: Histosge, cohort: Cohort, own_folder: Path
) -> None:
    report = own_folder / "report"
    options = ("--split", "section", "--presets", "mean,ridge,dense,mymodels:Line", "--genes", GENES)
    scored = histosge("evaluate", cohort.sheet, cohort.store, report, *options)
    assert scored.code == 0, scored.err
    assert "mymodels:Line" in scored.out
    scores = pl.read_csv(report / "scores.csv")
    mine = scores.filter((pl.col("preset") == "mymodels:Line") & (pl.col("metric") == "pearson_mean"))
    assert sorted(mine["fold"]) == ["S1", "S2"]
    assert mine["value"].mean() > 0.2
    pairs = pl.read_csv(report / "differences.csv").select("preset_a", "preset_b").rows()
    assert ("dense", "mymodels:Line") in pairs
    assert "mymodels:Line" in (report / "report.html").read_text()


def test_an_installed_model_and_metric_are_used_like_ours_and_asked_for_where_they_are_gone(
    histosge: Histosge, cohort: Cohort, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    with own_model.installed(monkeypatch, tmp_path, "own_offered"):
        shown = " ".join(histosge("train", "--help").out.replace("│", " ").split())
        assert "line: Least squares, by somebody else" in shown
        trained = histosge("train", cohort.sheet, cohort.store, model, "--preset", "line", "--genes", GENES)
        assert trained.code == 0, trained.err
        assert histosge("predict", cohort.store, model, tmp_path / "maps").code == 0
        report = tmp_path / "report"
        options = ("--presets", "mean,line", "--genes", GENES, "--split", "section")
        scored = histosge("evaluate", cohort.sheet, cohort.store, report, *options)
        assert scored.code == 0, scored.err
        per_gene = pl.read_csv(report / "genes.csv").filter(pl.col("preset") == "line")
        means = pl.read_csv(report / "scores.csv").filter(
            (pl.col("preset") == "line") & (pl.col("metric") == "worst_mean")
        )
        assert per_gene["worst"].min() > 0
        assert means["value"].mean() == pytest.approx(per_gene["worst"].mean())
        assert "largest error" in (report / "report.html").read_text()
    gone = histosge("predict", cohort.store, model, tmp_path / "maps")
    assert gone.code == 2
    assert "'line' is not installed: install the package that offers it (it was line-models 1.7" in _one_line(
        gone.err
    )


def test_classes_and_objects_are_taken_in_python(cohort: Cohort, own_folder: Path) -> None:
    sys.path.insert(0, str(own_folder))
    import mymodels

    from histosge.training.saved_model import load_model

    settings = histosge.TrainSettings(preset=mymodels.Half(), genes=GENES)
    saved = histosge.train(cohort.sheet, cohort.store, own_folder / "model", settings)
    assert saved.card.preset == "mymodels:Line"
    assert load_model(own_folder / "model", preset=mymodels.Line).fingerprint == saved.fingerprint

    by_folder = histosge.predict(
        cohort.store,
        own_folder / "model",
        own_folder / "a",
        histosge.PredictSettings(preset=mymodels.Line),
        slide_ids=["S1"],
    )
    in_memory = histosge.predict(cohort.store, saved, own_folder / "b", slide_ids=["S1"])
    bare = histosge.predict(
        cohort.store, saved.model, own_folder / "c", slide_ids=["S1"], genes=saved.card.genes
    )
    assert [r.computed for r in (*by_folder, *in_memory, *bare)] == [by_folder[0].planned] * 3
    chunks = [sorted(p for p in (own_folder / n).rglob("expression/c/*/*/0")) for n in "abc"]
    assert len(chunks[0]) > 3
    for first, second, third in zip(*chunks, strict=True):
        assert first.read_bytes() == second.read_bytes() == third.read_bytes()
    with pytest.raises(HistosgeError, match="predicts 11 genes, and 1 names were given"):
        histosge.predict(cohort.store, saved.model, own_folder / "d", genes=["A"])
    with pytest.raises(HistosgeError, match="workers=2 load the model themselves"):
        histosge.predict(cohort.store, saved, own_folder / "d", histosge.PredictSettings(workers=2))
    assert not (own_folder / "d").exists()

    evaluated = histosge.EvaluateSettings(
        split="block", presets=["mean", mymodels.Line, mymodels.Half()], genes=GENES
    )
    scores = histosge.evaluate(cohort.sheet, cohort.store, own_folder / "report", evaluated)
    assert scores.presets == ("mean", "line", "half")
    assert scores.mean("line", "pearson_mean") > scores.mean("mean", "pearson_mean")


def test_two_models_of_one_name_are_refused(cohort: Cohort, own_folder: Path) -> None:
    sys.path.insert(0, str(own_folder))
    import mymodels

    settings = histosge.EvaluateSettings(presets=[mymodels.Half(), mymodels.Half()])
    with pytest.raises(HistosgeError, match="two models are named 'half'"):
        histosge.evaluate(cohort.sheet, cohort.store, own_folder / "report", settings)


@pytest.mark.parametrize(
    ("command", "options", "message"),
    [
        ("train", ("--preset", "denze"), "unknown preset 'denze': did you mean dense"),
        ("train", ("--preset", "nomodule:X"), "there is no module 'nomodule'"),
        ("train", ("--loss", "huber"), "has no loss 'huber': choose one of mse, poisson, nb"),
        ("train", ("--preset", "ridge", "--loss", "nb"), "it has mse alone"),
        ("train", ("--preset", "ridge", "--stains"), "takes no stain pairs; leave --stains out"),
        ("train", ("--epochs", 0), "at least 1"),
        ("train", ("--genes", 0), "ask for at least 1"),
        ("train", ("--genes", "no_file"), "--genes no_file: neither a number, all, seurat_v3:N, N+A,B"),
        ("evaluate", ("--genes", "no_file"), "--genes no_file: neither a number, all, seurat_v3:N, N+A,B"),
        ("evaluate", ("--presets", "denze"), "unknown preset 'denze': did you mean dense"),
        ("evaluate", ("--presets", "paper+no"), "unknown switch 'no'"),
        ("evaluate", ("--split", "patient"), "unknown split 'patient': choose one of block, section"),
        ("evaluate", ("--seeds", 0), "at least 1 seed"),
        ("evaluate", ("--epochs", 0), "at least 1"),
        ("evaluate", ("--protocol", "hist"), "unknown protocol 'hist'"),
    ],
)
def test_settings_are_refused_before_any_data_is_loaded(
    histosge: Histosge, tmp_path: Path, command: str, options: tuple[object, ...], message: str
) -> None:
    # There is no sheet and no store: whoever looked for them first would say so.
    refused = histosge(command, tmp_path / "no.csv", tmp_path / "no_store", tmp_path / "out", *options)
    assert (refused.code, refused.out) == (2, "")
    assert message in _one_line(refused.err)
    assert not (tmp_path / "out").exists()


def test_epochs_and_losses_reach_the_model(histosge: Histosge, cohort: Cohort, tmp_path: Path) -> None:
    def train(name: str, *options: object) -> dict[str, object]:
        ran = histosge("train", cohort.sheet, cohort.store, tmp_path / name, "--genes", 5, *options)
        assert ran.code == 0, ran.err
        document = json.loads((tmp_path / name / "config.json").read_text())
        return {"model": document["model"], "keys": (tmp_path / name / "model.safetensors").read_bytes()}

    assert train("paper", "--preset", "paper", "--epochs", 2)["model"]["epochs"] == 2  # type: ignore[index]
    counts = train("nb", "--loss", "nb")["keys"]
    assert b"counts.weight" in counts  # type: ignore[operator]
    assert b"counts.weight" not in train("mse")["keys"]  # type: ignore[operator]


def test_stains_are_encoded_and_penalised(histosge: Histosge, cohort: Cohort, tmp_path: Path) -> None:
    ran = histosge("train", cohort.sheet, cohort.store, tmp_path / "m", "--genes", 5, "--stains")
    assert ran.code == 0, ran.err
    assert "in 4 other stains" in ran.err
    assert json.loads((tmp_path / "m" / "config.json").read_text())["model"]["stain_penalty"] > 0


def test_measured_spots_condition_the_map(histosge: Histosge, cohort: Cohort, tmp_path: Path) -> None:
    model = tmp_path / "model"
    options = ("--preset", "ridge", "--genes", 5)
    assert histosge("train", cohort.sheet, cohort.store, model, *options).code == 0
    spots = cohort.sheet.parent / "S2.h5ad"
    ran = histosge(
        "predict", cohort.store, model, tmp_path / "maps", "--slide", "S2", "--condition-on", spots
    )
    assert ran.code == 0, ran.err
    assert "conditioned on" in ran.err
    plain = histosge("predict", cohort.store, model, tmp_path / "maps", "--slide", "S2")
    assert plain.code == 2
    assert "give another OUT" in _one_line(plain.err)
    two = histosge("predict", cohort.store, model, tmp_path / "other", "--condition-on", spots)
    assert "--condition-on belongs to one slide" in _one_line(two.err)


def test_a_model_folder_of_an_earlier_version_still_loads(
    histosge: Histosge, cohort: Cohort, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    assert histosge("train", cohort.sheet, cohort.store, model, "--preset", "mean", "--genes", 5).code == 0
    document = json.loads((model / "config.json").read_text())
    # What offers the model stands beside the card, outside the fingerprint: a folder without it is as whole.
    assert "offered_by" not in document
    (model / "config.json").write_text(json.dumps(document | {"offered_by": {"package": "a\nb"}}))
    other = tmp_path / "copy"
    shutil.copytree(model, other)
    assert histosge("predict", cohort.store, other, tmp_path / "maps").code == 0


def test_the_version_is_said(histosge: Histosge) -> None:
    import histosge as package

    ran = histosge("--version")
    assert (ran.code, ran.out) == (0, f"histosge {package.__version__}\n")
    assert package.__version__[0].isdigit()


def test_genes_can_be_all_of_them_or_some_and_named_ones(
    histosge: Histosge, cohort: Cohort, tmp_path: Path
) -> None:
    def trained_on(genes: str) -> tuple[str, ...]:
        ran = histosge(
            *("train", cohort.sheet, cohort.store, tmp_path / "m", "--preset", "mean", "--genes", genes),
            "--overwrite",
        )
        assert ran.code == 0, ran.err
        assert (
            f"of {len(_card(tmp_path / 'm')['genes'])} genes (held-out donors, empirical, 2 donors)"
            in ran.out
        )  # type: ignore[arg-type]
        return tuple(_card(tmp_path / "m")["genes"])  # type: ignore[arg-type]

    every = trained_on("all")
    assert len(every) > 12
    some = trained_on(f"2+{every[-1]},{every[-2]}")
    assert some == (*every[:2], every[-1], every[-2])


def test_the_first_help_page_loads_no_model() -> None:
    code = (
        "import sys; sys.argv = ['histosge', '--help']; from histosge_cli import main\n"
        "try:\n    main.main()\n"
        "except SystemExit:\n    print([m for m in sys.modules if m.startswith('histosge.models')], file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "Train and predict" in ran.stdout
    assert ran.stderr.strip() == "[]"


@pytest.fixture(scope="module")
def shifted(cohort: Cohort) -> Path:
    """The sheet of the cohort with the first section's spots shifted by 600 pixels to the right and down."""
    data = ad.read_h5ad(cohort.sheet.parent / "S1.h5ad")
    data.obsm["spatial"] = data.obsm["spatial"] + [600, 600]
    data.write_h5ad(cohort.sheet.parent / "shifted.h5ad")
    sheet = cohort.sheet.parent / "shifted.csv"
    sheet.write_text(cohort.sheet.read_text().replace("S1.h5ad", "shifted.h5ad"))
    return sheet


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_misplaced_spots_are_refused_with_the_correction_and_forced(
    histosge: Histosge, cohort: Cohort, shifted: Path, tmp_path: Path, command: str
) -> None:
    options = {"train": ("--preset", "ridge"), "evaluate": ("--presets", "ridge", "--split", "section")}[
        command
    ]
    arguments = (command, shifted, cohort.store, tmp_path / "out", *options, "--genes", GENES)
    refused = histosge(*arguments)
    assert (refused.code, refused.out) == (2, "")
    x, y = re.findall(r"\(x, y\) -> \(x - (\d+), y - (\d+)\) in pixels", _last_line(refused.err))[0]
    assert abs(int(x) - 600) < 40
    assert abs(int(y) - 600) < 40
    assert not (tmp_path / "out").exists()
    forced = histosge(*arguments, "--force")
    assert forced.code == 0, forced.err
    assert "taken all the same" in forced.err
    assert (tmp_path / "out").exists()


def test_a_model_is_not_conditioned_on_misplaced_spots_unless_forced(
    histosge: Histosge, cohort: Cohort, shifted: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    trained = histosge("train", cohort.sheet, cohort.store, model, "--preset", "ridge", "--genes", GENES)
    assert trained.code == 0, trained.err
    spots = shifted.with_suffix(".h5ad")
    arguments = ("predict", cohort.store, model, tmp_path / "maps", "--slide", "S1", "--condition-on", spots)
    refused = histosge(*arguments)
    assert refused.code == 2
    assert "shifting them by" in refused.err
    forced = histosge(*arguments, "--force")
    assert forced.code == 0, forced.err
    assert "taken all the same" in forced.err


def test_in_python_force_is_an_argument(cohort: Cohort, shifted: Path, tmp_path: Path) -> None:
    settings = histosge.TrainSettings(preset="ridge", genes=GENES)
    with pytest.raises(HistosgeError, match="shifting them by"):
        histosge.train(shifted, cohort.store, tmp_path / "model", settings)
    with pytest.raises(HistosgeError, match="shifting them by"):
        histosge.SpotTargets.from_samples(shifted, cohort.store, GENES)
    messages: list[str] = []
    saved = histosge.train(
        shifted, cohort.store, tmp_path / "model", settings, force=True, on_message=messages.append
    )
    assert len(saved.card.sections) == 2
    assert any("taken all the same" in message for message in messages)
    targets = histosge.SpotTargets.from_samples(shifted, cohort.store, GENES, force=True)
    assert targets.slide_ids == ("S1", "S2")


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def test_cells_get_their_expression_beside_the_maps_or_in_the_named_file(
    histosge: Histosge, world: Path, tmp_path: Path
) -> None:
    ring = [[300, 300], [330, 300], [330, 330], [300, 330], [300, 300]]
    feature = {"type": "Feature", "id": "c1", "geometry": {"type": "Polygon", "coordinates": [ring]}}
    (tmp_path / "cells.geojson").write_text(json.dumps([feature]))
    slide = Store.open(str(world / "store")).slide_ids()[0]
    call = ("predict", world / "store", world / "model", tmp_path / "maps.zarr", "--slide", slide)
    ran = histosge(*call, "--cells", tmp_path / "cells.geojson")
    assert ran.code == 0
    assert (
        f"maps_{slide}_cells.h5ad: 1 cell x 3 genes. The map has one value for each patch of 48 µm" in ran.out
    )
    named = histosge(*call, "--cells", tmp_path / "cells.geojson", "--h5ad", tmp_path / "mine.h5ad")
    assert (named.code, (tmp_path / "mine.h5ad").is_file()) == (0, True)
    feature["geometry"]["coordinates"] = [[[1, 1], [2, 1], [2, 2], [1, 1]]]
    (tmp_path / "small.geojson").write_text(json.dumps([feature]))
    for arguments, message in (
        ((*call, "--cells", tmp_path / "small.geojson"), "the median outline of"),
        (
            (*call[:-2], "--cells", tmp_path / "cells.geojson"),
            "--cells writes one slide; name it with --slide ID",
        ),
    ):
        refused = histosge(*arguments)
        assert (refused.code, len(refused.err.strip().splitlines())) == (2, 1)
        assert message in refused.err
