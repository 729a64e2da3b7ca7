"""`histosge analyse` as a user types it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import polars as pl
import pytest

from featurestore.analysis.kmeans import KMeansSettings, fit_kmeans
from featurestore.analysis.patch_stream import open_stream
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

Histosge = Callable[..., NamedTuple]
MORPHOLOGY = ("--encoder", "morphology")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    spec = SyntheticSpec(size_px=(1300, 1100), genes=GeneCounts(2, 1, 1, 1))
    cohort = make_cohort(tmp_path_factory.mktemp("slides"), spec, 2)
    url = str(tmp_path_factory.mktemp("run") / "store")
    embed(str(cohort.sheet), url, EmbedSettings(("morphology", "colour"), GridSpec(0.5, 64, 48)))
    return url


def test_several_encoders_are_refused_with_the_list(histosge: Histosge, store: str) -> None:
    for command in (["summary"], ["pca"], ["clusters"], ["similar", "--slide", "S1", "--row", 1, "--col", 1]):
        ran = histosge("analyse", store, *command)
        assert ran.code == 2
        assert ran.err.count("\n") == 1
        assert "--encoder colour" in ran.err
        assert "--encoder morphology" in ran.err


def test_the_summary_is_a_table_or_json_and_a_file_with_every_feature(
    histosge: Histosge, store: str, tmp_path: Path
) -> None:
    file = tmp_path / "new" / "summary.parquet"
    printed = histosge("analyse", store, "summary", *MORPHOLOGY, "--out", file)
    assert printed.code == 0
    assert [line.split()[0] for line in printed.out.splitlines()] == ["slide", "S1", "S2", "(all)"]
    rows = json.loads(histosge("analyse", store, "summary", *MORPHOLOGY, "--json").out)
    assert [row["slide"] for row in rows] == ["S1", "S2", None]
    assert rows[2]["patches"] == rows[0]["patches"] + rows[1]["patches"] > 100
    assert "mean" not in rows[0]
    frame = pl.read_parquet(file)
    assert frame["patches"].to_list() == [row["patches"] for row in rows]
    assert frame["mean"].dtype == pl.Array(pl.Float64, 164)
    one = json.loads(histosge("analyse", store, "summary", *MORPHOLOGY, "--slide", "S2", "--json").out)
    assert [row["patches"] for row in one] == [rows[1]["patches"]] * 2


def test_components_and_scores(histosge: Histosge, store: str, tmp_path: Path) -> None:
    options = ("--components", 3, "--scores", tmp_path / "scores", "--out", tmp_path / "c.parquet", "--json")
    ran = histosge("analyse", store, "pca", *MORPHOLOGY, *options)
    assert ran.code == 0
    ratios = [row["ratio"] for row in json.loads(ran.out)]
    assert ratios == sorted(ratios, reverse=True)
    assert len(ratios) == 3
    assert pl.read_parquet(tmp_path / "c.parquet")["loadings"].dtype == pl.Array(pl.Float64, 164)
    scores = pl.read_parquet(tmp_path / "scores" / "*.parquet")
    assert scores.columns == ["slide", "row", "col", "x_um", "y_um", "pc1", "pc2", "pc3"]
    assert scores["pc1"].var() == pytest.approx(json.loads(ran.out)[0]["variance"], rel=1e-3)
    many = histosge("analyse", store, "pca", "--encoder", "colour", "--components", 7)
    assert (many.code, many.out) == (2, "")
    assert "give 1 to 6" in many.err


def test_clusters_are_counted_and_labelled_and_the_same_again(
    histosge: Histosge, store: str, tmp_path: Path
) -> None:
    command = ("analyse", store, "clusters", *MORPHOLOGY, "--k", 3, "--seed", 5, "--json")
    first = histosge(*command, "--labels", tmp_path / "labels", "--out", tmp_path / "counts.parquet")
    assert first.code == 0
    assert "passes, centres" in first.err
    counts = json.loads(first.out)
    assert [(row["slide"], row["cluster"]) for row in counts] == [
        (s, c) for s in ("S1", "S2") for c in range(3)
    ]
    labels = pl.read_parquet(tmp_path / "labels" / "*.parquet")
    counted = {key: frame.height for key, frame in labels.group_by("slide", "cluster")}
    assert counted == {(row["slide"], row["cluster"]): row["patches"] for row in counts if row["patches"]}
    assert pl.read_parquet(tmp_path / "counts.parquet").to_dicts() == counts
    again = histosge(*command, "--quiet")
    assert (json.loads(again.out), again.err) == (counts, "")


def test_mini_batches_move_the_centres_after_each_block(histosge: Histosge, store: str) -> None:
    command = ("analyse", store, "clusters", *MORPHOLOGY, "--k", 3, "--seed", 5, "--passes", 1, "--json")
    whole, batches = histosge(*command), histosge(*command, "--mini-batch")
    assert whole.code == batches.code == 0
    settings = KMeansSettings(3, 5, 1, mini_batch=True)
    fitted = fit_kmeans(open_stream(store, encoder="morphology"), settings)
    assert json.loads(batches.out) == fitted.counts.to_dicts()
    assert f"inertia {fitted.inertia:.6g} after 3 passes" in batches.err
    assert f"inertia {fitted.inertia:.6g} " not in whole.err


def test_more_of_this_is_found_on_every_slide(histosge: Histosge, store: str, tmp_path: Path) -> None:
    embedded = histosge("analyse", store, "clusters", *MORPHOLOGY, "--k", 2, "--labels", tmp_path / "l")
    assert embedded.code == 0
    here = pl.read_parquet(tmp_path / "l" / "S1.parquet").row(11, named=True)
    options = ("--slide", "S1", *MORPHOLOGY, "--n", 200, "--json")
    by_place = histosge("analyse", store, "similar", *options, "--x-um", here["x_um"], "--y-um", here["y_um"])
    by_index = histosge("analyse", store, "similar", *options, "--row", here["row"], "--col", here["col"])
    assert by_place.code == 0
    assert by_place.out == by_index.out
    found = json.loads(by_place.out)
    assert len(found) == 200
    assert {row["slide"] for row in found} == {"S1", "S2"}
    assert [row["distance"] for row in found] == sorted(row["distance"] for row in found)
    printed = histosge("analyse", store, "similar", *options[:-1], "--row", here["row"], "--col", here["col"])
    assert len(printed.out.splitlines()) == 201


def test_what_cannot_be_answered_is_one_line_with_the_fix(
    histosge: Histosge, store: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    similar = ("similar", *MORPHOLOGY, "--slide", "S1")
    wrong = {
        ("summary", *MORPHOLOGY, "--slide", "S7"): "no slide 'S7'",
        ("summary", "--encoder", "uni"): "it has: --grid",
        ("summary", *MORPHOLOGY, "--out", "s3://bucket/x.parquet"): "on this machine",
        ("summary", *MORPHOLOGY, "--out", str(tmp_path / "file" / "x.parquet")): "Not a directory",
        ("summary", *MORPHOLOGY, "--out", str(tmp_path)): "is a folder",
        ("clusters", *MORPHOLOGY, "--labels", str(tmp_path / "file")): "is a file",
        ("clusters", *MORPHOLOGY, "--k", "0"): "at least 1 cluster",
        similar: "--row R --col C, or --x-um X --y-um Y",
        (*similar, "--row", "3"): "--row R --col C, or --x-um X --y-um Y",
        (*similar, "--row", "0", "--col", "0"): "nearest tissue is patch",
        (*similar, "--x-um", "9e9", "--y-um", "1"): "outside the patches",
        (*similar, "--row", "12", "--col", "15", "--metric", "hamming"): "cosine, euclidean",
    }
    for command, said in wrong.items():
        ran = histosge("analyse", store, *command)
        assert (ran.code, ran.out) == (2, ""), (command, ran)
        assert said in ran.err, (command, ran.err)
        assert ran.err.count("\n") == 1
    missing = histosge("analyse", tmp_path / "missing", "summary")
    assert missing.code == 2
    assert "no store" in missing.err
    assert not (tmp_path / "missing").exists()


def test_missing_embeddings_are_remarked_upon(histosge: Histosge, store: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(store, copy)
    next(p for p in sorted((copy / "S2").rglob("morphology/embedding/c/*/*/0"))).unlink()
    ran = histosge("analyse", copy, "summary", *MORPHOLOGY, "--json")
    assert ran.code == 0
    assert f"{json.loads(ran.out)[1]['absent']} tissue patches left out, with no embedding" in ran.err
    assert "S2" in ran.err
    assert histosge("analyse", copy, "summary", *MORPHOLOGY, "--json", "--quiet").err == ""


@pytest.mark.e2e
def test_workers_print_what_one_process_prints(histosge: Histosge, store: str, tmp_path: Path) -> None:
    commands = (
        ("summary", *MORPHOLOGY),
        ("clusters", *MORPHOLOGY, "--k", 3),
        ("similar", *MORPHOLOGY, "--slide", "S1", "--row", 12, "--col", 15),
    )
    for command in commands:
        alone = histosge("analyse", store, *command, "--json")
        shared = histosge("analyse", store, *command, "--json", "--workers", 2)
        assert (shared.code, shared.err.count("Traceback")) == (0, 0)
        for row, same in zip(json.loads(shared.out), json.loads(alone.out), strict=True):
            assert {k: v for k, v in row.items() if not isinstance(v, float)} == {
                k: v for k, v in same.items() if not isinstance(v, float)
            }
            floats = {k: v for k, v in same.items() if isinstance(v, float)}
            assert {k: row[k] for k in floats} == pytest.approx(floats, rel=1e-9)


def test_ways_to_run_that_contradict_each_other_are_refused(histosge: Histosge, store: str) -> None:
    wrong = {
        ("summary", "--workers", "two"): "is no number of processes",
        ("summary", "--workers", "2", "--scheduler", "tcp://localhost:1"): "give one of them",
        ("summary", "--scheduler", "nowhere"): "names no host and port",
        ("clusters", "--mini-batch", "--workers", "2"): "one process reads them all",
        ("summary", "--workers", "9999"): "9999 worker processes for the",
    }
    for command, said in wrong.items():
        ran = histosge("analyse", store, *command, *MORPHOLOGY)
        assert (ran.code, ran.out) == (2, "")
        assert said in ran.err
        assert ran.err.count("\n") == 1
    ran = histosge("analyse", f"{store}-absent", "summary", "--workers", "9999")
    assert "there is no store" in ran.err
