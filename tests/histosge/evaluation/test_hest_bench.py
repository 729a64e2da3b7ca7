"""HEST-Benchmark on a synthetic task in the published layout, against values of the authors' own code.

The values in `AUTHORS` come from the public repository's ``predict_folds`` (commit afd42c3), run beside ours on the same
task and embeddings: ``python benchmarks/hest_bench.py --authors CHECKOUT``.
"""

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
from make_hest import colour_vectors, write_bench

from featurestore.storage.spots import PatchSpots
from featurestore.storage.store import Store
from histosge.errors import ExpressionError
from histosge.evaluation import hest_bench
from histosge.evaluation.hest_bench import read_sample, read_task
from histosge.evaluation.hest_evaluation import PUBLISHED, BenchSettings, evaluate_bench, score_task
from histosge_cli import main

PUBLISHED_ROWS = pl.col("metric") == PUBLISHED
AUTHORS = (0.6398393998597638, 0.6226555489808286, 0.644739809431325)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    bench = tmp_path_factory.mktemp("bench")
    write_bench(bench / "IDC")
    return bench


@pytest.fixture
def bench(published: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(published, tmp_path / "bench"))


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["histosge", "evaluate", "--protocol", "hest", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    return int(stopped.value.code or 0), *capsys.readouterr()


def test_the_benchmark_s_number_is_that_of_the_authors_code(published: Path) -> None:
    task = read_task(published, "IDC")
    spots = {name: read_sample(sample) for name, sample in task.samples.items()}
    vectors = {name: colour_vectors(sample.patches) for name, sample in task.samples.items()}
    np.testing.assert_allclose(
        score_task(task, spots, vectors).scores.filter(PUBLISHED_ROWS)["value"], AUTHORS, atol=1e-6
    )


@pytest.mark.slow
def test_one_command_gives_the_authors_number_and_ours_with_controls(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report"
    options = ("--bench", published, "--task", "IDC", "--encoder", "colour")
    code, printed, message = run(monkeypatch, capsys, *options, report, "--quiet")
    assert code == 0, message
    scores = pl.read_csv(report / "scores.csv")
    found = scores.filter(PUBLISHED_ROWS)
    assert found["fold"].to_list() == ["split0", "split1", "split2"]
    # The encoder's vectors are these colours in other units and half precision.
    np.testing.assert_allclose(found["value"], AUTHORS, atol=0.02)
    number = f"{found['value'].mean():.4f} ± {found['value'].std(ddof=0):.4f}"
    assert f"HEST-Benchmark IDC, colour: {number} over 3 splits" in printed
    assert set(scores["preset"]) == {
        "hest",
        "hest+depth_normalised",
        "ridge",
        "depth",
        "noise",
        "smooth_noise",
    }
    means = scores.filter(pl.col("metric") == "pearson_mean").group_by("preset").agg(pl.col("value").mean())
    value = dict(means.iter_rows())
    assert value["hest"] > 0.3
    assert value["hest+depth_normalised"] > 0.3
    assert abs(value["noise"]) < 0.1
    assert set(pl.read_csv(report / "genes.csv")["gene"]) == {f"G{i}" for i in range(50)}
    # Patches on no grid, in the report's folder; and the same again encodes and fits nothing.
    store = Store.open(report / "embeddings.zarr")
    assert store.slide_ids() == ["P0", "P1", "P2"]
    monkeypatch.setattr(hest_bench, "add_spots", None)
    assert "nothing to do" in run(monkeypatch, capsys, *options, report, "--quiet")[1]
    code, printed, _ = run(
        monkeypatch, capsys, *options, report / "embeddings.zarr", tmp_path / "again", "--quiet"
    )
    assert code == 0
    assert pl.read_csv(tmp_path / "again" / "scores.csv").equals(scores)


@pytest.mark.slow
def test_vectors_are_those_of_the_patches_in_their_order(published: Path, tmp_path: Path) -> None:
    from featurestore.encoders.loading import load_encoder

    settings = BenchSettings(published, "IDC", ("colour", "morphology"))
    scores = evaluate_bench(settings, tmp_path / "report", str(tmp_path / "store"))
    assert scores.encoders == ("colour", "morphology")
    assert "hest on morphology" in scores.presets
    encoder = load_encoder("colour")
    with h5py.File(published / "IDC" / "patches" / "P1.h5") as file:
        expected, corners, side = encoder.encode(file["img"][:]), file["coords"][:], file["img"].shape[1]
    centre = (corners + side / 2) * 112 / side
    spots = PatchSpots(112 / side, side, 112 / side, 112 / side, centre[:, 0], centre[:, 1])
    stored = hest_bench.read_spots(Store.open(tmp_path / "store"), "P1", spots, encoder.identity)
    assert stored is not None
    np.testing.assert_allclose(stored, expected, rtol=1e-3)


def test_a_spot_without_counts_is_scored_by_the_authors_rule_and_left_out_of_ours(
    bench: Path, tmp_path: Path
) -> None:
    import anndata

    file = bench / "IDC" / "adata" / "P0.h5ad"
    data = anndata.read_h5ad(file)
    with h5py.File(bench / "IDC" / "patches" / "P0.h5") as patches:
        name = patches["barcode"][0, 0].decode()
    data.X[data.obs_names.get_loc(name)] = 0
    data.write_h5ad(file)
    scores = evaluate_bench(BenchSettings(bench, "IDC", ("colour",)), tmp_path / "report")
    assert [(fold.n_train, fold.n_test) for fold in scores.folds] == [(114, 56), (113, 57), (113, 57)]
    assert np.isfinite(scores.values("hest", PUBLISHED)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda task: (task / "patches" / "P1.h5").unlink(),
            r"names samples whose files are missing: P1 \(patches/P1.h5\)",
        ),
        (lambda task: (task / "adata" / "P2.h5ad").unlink(), r"files are missing: P2 \(adata/P2.h5ad\)"),
        (lambda task: (task / "splits" / "train_1.csv").unlink(), r"there is no .*train_1.csv"),
        (lambda task: (task / "var_50genes.json").unlink(), r"there is no .*var_50genes.json"),
        (
            lambda task: (task / "var_50genes.json").write_text(json.dumps({"genes": ["G1", "NONE"]})),
            r"sample 'P\d' did not measure 1 of the 2 genes of the list, such as 'NONE'",
        ),
        (
            lambda task: shutil.copy(task / "splits" / "test_0.csv", task / "splits" / "train_0.csv"),
            r"split 0 trains on and holds out P0",
        ),
        (
            lambda task: (task / "splits" / "test_0.csv").write_text(
                "sample_id,patches_path,expr_path\nP0,../../secret.h5,adata/P0.h5ad\n"
            ),
            r"'../../secret.h5' lies outside the task's folder",
        ),
        (lambda task: (task / "patches" / "P1.h5").write_text("no"), r"P1.h5 cannot be read"),
    ],
)
def test_what_is_missing_or_damaged_is_refused_in_one_line(
    bench: Path, tmp_path: Path, change: object, message: str
) -> None:
    change(bench / "IDC")  # type: ignore[operator]
    with pytest.raises(ExpressionError, match=message) as caught:
        evaluate_bench(BenchSettings(bench, "IDC", ("colour",)), tmp_path / "report")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "report").exists()


def test_arguments_that_do_not_go_together_are_refused_in_one_line(
    bench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        (("--bench", bench, "--task", "ICD", tmp_path / "r"), "holds no task 'ICD'; there is IDC"),
        (("--bench", bench, tmp_path / "r"), "--bench and --task belong together"),
        (("--bench", bench, "--task", "IDC", "a", "b", "c"), "give [STORE] REPORT_DIR alone"),
        ((tmp_path,), "Missing argument 'STORE'"),
    ):
        code, _, error = run(monkeypatch, capsys, *arguments)
        assert code == 2
        assert message in error
        assert error.strip().count("\n") == 0
