"""Streamed answers against numpy on all patches at once; each block read once a pass; memory that does not grow."""

import asyncio
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from _s3 import Proxy, environment, serving
from make_slides import tissue_like, write_pyramid

from featurestore.analysis.kmeans import KMeans, KMeansSettings, fit_kmeans, reservoir_sample
from featurestore.analysis.neighbours import Metric, patch_at, patch_at_um, similar
from featurestore.analysis.patch_stream import PatchStream, open_stream
from featurestore.analysis.pca import fit_pca, write_scores
from featurestore.analysis.summary import summarise
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import AmbiguousSelectionError, IdentityMismatchError, StoreError
from featurestore.grid import GridSpec, PatchGrid
from featurestore.storage.store import SlideRecord, Store
from featurestore.storage.tree import open_store
from featurestore.tissue.survey import Survey
from histosge.prediction.expression_store import ExpressionStore

SPEC = GridSpec(0.5, 224, 112)
UNI = EncoderIdentity("hf:uni", 7, {"version": 1})
BLOCK = (3, 5)
SHAPES = {"C1": (7, 13), "C2": (11, 5), "C3": (2, 3), "C4": (13, 17)}
EMPTY = "C3"
Draw = Callable[[np.random.Generator, int, int], np.ndarray]


@dataclass(frozen=True)
class Truth:
    """Every patch of a store that has an embedding, as numpy sees it."""

    url: str
    slide: np.ndarray
    row: np.ndarray
    col: np.ndarray
    values: np.ndarray
    absent: dict[str, int]
    blocks: dict[str, int]


def _grid(shape: tuple[int, int], spec: GridSpec = SPEC) -> PatchGrid:
    width, height = ((n - 1) * spec.stride_px + spec.patch_px for n in reversed(shape))
    return PatchGrid.for_slide((width, height), spec.mpp, (spec.mpp,), spec)


def _noise(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    """Correlated features about a large common mean, which a naive sum of squares would drown in."""
    return 30 + rng.normal(size=(n, dim)) @ rng.normal(size=(dim, dim))


def make_store(
    url: str,
    shapes: dict[str, tuple[int, int]],
    identity: EncoderIdentity = UNI,
    block: tuple[int, int] = BLOCK,
    draw: Draw = _noise,
    spec: GridSpec = SPEC,
    tissue_share: float = 0.6,
) -> Truth:
    """Write a store in which one tissue patch in twenty is unreadable and slide C3 has no tissue."""
    store, rng = Store.open_or_create(url), np.random.default_rng(5)
    found: list[tuple[np.ndarray, ...]] = []
    absent, n_blocks = {}, {}
    for slide_id, shape in shapes.items():
        grid = _grid(shape, spec)
        tissue = np.where(rng.random(shape) < tissue_share, rng.integers(26, 256, shape), 25)
        tissue = (tissue * (slide_id != EMPTY)).astype(np.uint8)
        store.add_slide(SlideRecord(slide_id, f"{slide_id}.tif", (9, 9), spec.mpp, f"9-{slide_id}"))
        store.add_grid(slide_id, grid, Survey(tissue, np.zeros((*shape, 3), np.uint8), {"name": "toy"}), {})
        array = store.add_embedding(slide_id, grid, identity, block)
        store.consolidate(slide_id)
        values = np.full((*shape, identity.dim), np.nan, np.float16)
        rows, cols = np.nonzero((tissue > 25) & (rng.random(shape) > 0.05))
        values[rows, cols] = draw(rng, len(rows), identity.dim)
        planned = store.grid(slide_id, grid.spec.key).planned(array.block_shape)
        for stored in planned:
            array.write(stored, values[stored.slices])
        absent[slide_id], n_blocks[slide_id] = int((tissue > 25).sum()) - len(rows), len(planned)
        found.append((np.full(len(rows), slide_id), rows, cols, values[rows, cols].astype(np.float64)))
    return Truth(url, *(np.concatenate(part) for part in zip(*found, strict=True)), absent, n_blocks)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return make_store(str(tmp_path_factory.mktemp("cohort") / "store"), SHAPES)


class _Opens:
    """Counts files that this process opens; an audit hook cannot be taken off again, only silenced."""

    def __init__(self) -> None:
        self.counts: Counter[str] | None = None
        sys.addaudithook(self._heard)

    def _heard(self, event: str, arguments: tuple[object, ...]) -> None:
        counts = self.counts
        if counts is not None and event == "open" and re.search(r"/embedding/c/", str(arguments[0])):
            counts[str(arguments[0])] += 1

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        self.counts = counts = Counter[str]()
        yield counts
        self.counts = None


OPENS = _Opens()


# ---------------------------------------------------------------------- the stream


def test_every_readable_tissue_patch_is_streamed_once(cohort: Truth) -> None:
    stream = open_stream(cohort.url)
    seen = {
        (patches.slide_id, int(row), int(col)): value
        for patches in stream.blocks()
        for row, col, value in zip(patches.rows, patches.cols, patches.values, strict=True)
    }
    expected = dict(zip(zip(cohort.slide, cohort.row, cohort.col, strict=True), cohort.values, strict=True))
    assert seen.keys() == expected.keys()
    assert all(np.array_equal(seen[key], expected[key]) for key in seen)
    assert stream.counts.patches == len(expected)
    assert stream.counts.blocks == sum(cohort.blocks.values())
    assert {s: n for s, n in cohort.absent.items() if n} == dict(+stream.counts.absent)
    assert sum(cohort.absent.values()) > 3


def test_slides_come_in_order_and_an_empty_one_comes_with_nothing(cohort: Truth) -> None:
    counts = {
        slide.slide_id: sum(len(p.rows) for p in blocks)
        for slide, blocks in open_stream(cohort.url).by_slide()
    }
    assert list(counts) == sorted(SHAPES)
    assert counts == {name: int((cohort.slide == name).sum()) for name in SHAPES}
    assert counts[EMPTY] == 0


def test_slides_whose_blocks_are_not_taken_are_skipped(cohort: Truth) -> None:
    assert [slide.slide_id for slide, _ in open_stream(cohort.url).by_slide()] == sorted(SHAPES)


def test_a_block_that_is_not_stored_yet_counts_as_absent(tmp_path: Path) -> None:
    truth = make_store(str(tmp_path / "store"), {"C1": SHAPES["C1"]})
    block = sorted((tmp_path / "store").rglob("embedding/c/*/*/0"))[0]
    block.unlink()
    stream = open_stream(truth.url)
    taken = sum(len(patches.rows) for patches in stream.blocks())
    inside = (truth.row < BLOCK[0]) & (truth.col < BLOCK[1])
    assert taken == (~inside).sum()
    assert stream.counts.absent["C1"] == truth.absent["C1"] + inside.sum()


def test_a_pass_that_is_given_up_leaves_no_thread_behind(cohort: Truth) -> None:
    import threading

    before = threading.active_count()
    stream = open_stream(cohort.url)
    blocks = stream.blocks()
    next(blocks)
    assert threading.active_count() > before
    blocks.close()
    assert threading.active_count() <= before


def test_a_damaged_block_is_not_averaged_over(tmp_path: Path) -> None:
    truth = make_store(str(tmp_path / "store"), {"C1": SHAPES["C1"]})
    block = sorted((tmp_path / "store").rglob("embedding/c/*/*/0"))[2]
    data = bytearray(block.read_bytes())
    data[3] ^= 1
    block.write_bytes(data)
    with pytest.raises(ValueError, match="checksum"):
        summarise(open_stream(truth.url))


def test_large_blocks_are_read_ahead_in_small_numbers(cohort: Truth, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_stream(cohort.url).read_ahead == 8
    monkeypatch.setattr("featurestore.analysis.patch_stream.READ_AHEAD_BYTES", 3 * 3 * 5 * 7 * 6)
    assert open_stream(cohort.url).read_ahead == 3
    monkeypatch.setattr("featurestore.analysis.patch_stream.READ_AHEAD_BYTES", 1)
    assert open_stream(cohort.url).read_ahead == 1


# ---------------------------------------------------------------------- which embedding


def test_several_encoders_are_refused_with_the_list_until_one_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    make_store(url, {"C1": (7, 13)})
    store, other = Store.open(url), EncoderIdentity("other", 3, {})
    store.add_embedding("C1", _grid((7, 13)), other, BLOCK)
    store.consolidate("C1")
    with pytest.raises(AmbiguousSelectionError, match=r"--encoder hf-uni; --grid \S+ --encoder other"):
        open_stream(url)
    assert open_stream(url, encoder="hf:uni").dim == 7
    assert open_stream(url, encoder="hf-uni").dim == 7
    assert open_stream(url, encoder="other").dim == 3
    with pytest.raises(StoreError, match="it has: --grid"):
        open_stream(url, encoder="uni3")


def test_slides_on_unlike_grids_are_refused_until_one_is_named(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    make_store(url, {"C1": (7, 13)})
    coarse = GridSpec(1.0, 224, 224)
    make_store(url, {"C2": (5, 3)}, spec=coarse)
    with pytest.raises(AmbiguousSelectionError, match=f"--grid {SPEC.key} .*--grid {coarse.key}"):
        summarise(open_stream(url))
    stream = open_stream(url, grid=coarse.key)
    assert [slide.slide_id for slide in stream.slides] == ["C2"]
    assert stream.skipped == ("C1",)
    with pytest.raises(StoreError, match="'C1' has no embedding"):
        open_stream(url, ["C1", "C2"], grid=coarse.key)
    with pytest.raises(StoreError, match=f"'C2' has no embedding --grid {SPEC.key} --encoder hf-uni"):
        summarise(open_stream(url, ["C1", "C2"], grid=SPEC.key))


def test_unlike_encoders_of_one_name_are_never_mixed(tmp_path: Path) -> None:
    url = str(tmp_path / "store")
    make_store(url, {"C1": (7, 13)})
    make_store(url, {"C2": (5, 3)}, EncoderIdentity("hf:uni", 7, {"version": 2}))
    with pytest.raises(IdentityMismatchError, match=r"'C1' and 'C2'"):
        summarise(open_stream(url))
    assert len(open_stream(url, ["C2"]).slides) == 1


def test_an_unknown_slide_and_an_empty_store_are_refused(cohort: Truth, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no slide 'C9'"):
        open_stream(cohort.url, ["C1", "C9"])
    Store.open_or_create(str(tmp_path / "new"))
    with pytest.raises(StoreError, match="run histosge embed"):
        open_stream(str(tmp_path / "new"))


def test_metadata_that_was_not_gathered_is_found_all_the_same(tmp_path: Path) -> None:
    import json

    truth = make_store(str(tmp_path / "store"), {"C1": (7, 13)})
    document = tmp_path / "store" / "C1" / "zarr.json"
    plain = {k: v for k, v in json.loads(document.read_text()).items() if k != "consolidated_metadata"}
    document.write_text(json.dumps(plain))
    assert summarise(open_stream(truth.url))["patches"][0] == len(truth.row)
    assert open_store(truth.url)[f"C1/{SPEC.key}/hf-uni"]["embedding"].shape == (7, 13, 7)


# ---------------------------------------------------------------------- summary


def test_the_summary_is_numpys(cohort: Truth) -> None:
    frame = summarise(open_stream(cohort.url))
    assert frame["slide"].to_list() == [*sorted(SHAPES), None]
    for row in frame.iter_rows(named=True):
        values = cohort.values if row["slide"] is None else cohort.values[cohort.slide == row["slide"]]
        assert row["patches"] == len(values)
        if not len(values):
            assert (row["mean"], row["sd"], row["shift"]) == (None, None, None)
            continue
        np.testing.assert_allclose(row["mean"], values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(row["sd"], values.std(axis=0, ddof=1), rtol=1e-10)
        shift = (values.mean(axis=0) - cohort.values.mean(axis=0)) / cohort.values.std(axis=0, ddof=1)
        assert row["shift"] == pytest.approx(np.sqrt((shift**2).mean()), abs=1e-12)
    assert frame["absent"].to_list() == [*cohort.absent.values(), sum(cohort.absent.values())]


# ---------------------------------------------------------------------- PCA


def test_components_are_those_of_the_full_matrix(cohort: Truth) -> None:
    fitted = fit_pca(open_stream(cohort.url))
    centred = cohort.values - cohort.values.mean(axis=0)
    _, sizes, axes = np.linalg.svd(centred, full_matrices=False)
    variance = sizes**2 / (len(centred) - 1)
    assert fitted.n_patches == len(centred)
    np.testing.assert_allclose(fitted.mean, cohort.values.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(fitted.explained_variance, variance, rtol=1e-9)
    np.testing.assert_allclose(fitted.explained_variance_ratio, variance / variance.sum(), rtol=1e-9)
    np.testing.assert_allclose(np.abs(fitted.components @ axes.T), np.eye(7), atol=1e-7)
    largest = np.abs(fitted.components).argmax(axis=1)
    assert (fitted.components[np.arange(7), largest] > 0).all()


def test_fewer_components_are_the_first_of_all(cohort: Truth) -> None:
    stream = open_stream(cohort.url)
    few, every = fit_pca(stream, 3), fit_pca(stream)
    np.testing.assert_allclose(few.components, every.components[:3], atol=1e-9)
    np.testing.assert_allclose(few.explained_variance_ratio, every.explained_variance_ratio[:3], rtol=1e-9)


def test_scores_come_slide_by_slide_where_the_patches_lie(cohort: Truth) -> None:
    stream = open_stream(cohort.url)
    fitted = fit_pca(stream, 3)
    expected = (cohort.values - fitted.mean) @ fitted.components.T
    scores = fitted.transform(stream)
    assert stream.passes == 1, "nothing is read before it is asked for"
    for slide_id, array in scores:
        mine = cohort.slide == slide_id
        assert array.dims == ("y", "x", "component")
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array.x, _grid(SHAPES[slide_id]).x_um)
        got = array.to_numpy()[cohort.row[mine], cohort.col[mine]]
        np.testing.assert_allclose(got, expected[mine], rtol=1e-4, atol=1e-4)
        assert np.isfinite(array.to_numpy()).all(axis=2).sum() == mine.sum()


def test_scores_written_are_the_scores(cohort: Truth, tmp_path: Path) -> None:
    stream = open_stream(cohort.url)
    fitted = fit_pca(stream, 2)
    write_scores(fitted, stream, tmp_path / "scores")
    frame = pl.concat(pl.read_parquet(tmp_path / "scores" / f"{name}.parquet") for name in sorted(SHAPES))
    assert frame.columns == ["slide", "row", "col", "x_um", "y_um", "pc1", "pc2"]
    np.testing.assert_array_equal(frame["slide"], cohort.slide)
    np.testing.assert_array_equal(frame["row"], cohort.row)
    np.testing.assert_array_equal(frame["col"], cohort.col)
    np.testing.assert_allclose(frame["x_um"], (cohort.col * 112 + 112) * 0.5)
    np.testing.assert_allclose(frame["y_um"], (cohort.row * 112 + 112) * 0.5)
    expected = ((cohort.values - fitted.mean) @ fitted.components.T).astype(np.float32)
    np.testing.assert_allclose(frame.select("pc1", "pc2").to_numpy(), expected, rtol=1e-4, atol=1e-4)


def test_what_pca_cannot_do_is_refused_with_the_number_that_it_can(cohort: Truth, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="give 1 to 7"):
        fit_pca(open_stream(cohort.url), 8)
    with pytest.raises(StoreError, match="0 patches"):
        fit_pca(open_stream(cohort.url, [EMPTY]))
    other = make_store(str(tmp_path / "other"), {"C1": (7, 13)}, EncoderIdentity("hf:uni", 7, {"version": 2}))
    with pytest.raises(IdentityMismatchError, match="fitted on embeddings of encoder"):
        next(fit_pca(open_stream(cohort.url)).transform(open_stream(other.url)))


# ---------------------------------------------------------------------- k-means

GROUPS = 5


def _grouped(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
    places = 20 * np.random.default_rng(1).normal(size=(GROUPS, dim))
    return places[rng.integers(GROUPS, size=n)] + rng.normal(scale=0.1, size=(n, dim))


def _truth_of(values: np.ndarray) -> np.ndarray:
    places = 20 * np.random.default_rng(1).normal(size=(GROUPS, values.shape[1]))
    return ((values[:, None] - places) ** 2).sum(axis=2).argmin(axis=1)


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return make_store(str(tmp_path_factory.mktemp("grouped") / "store"), SHAPES, draw=_grouped)


@pytest.mark.parametrize("mini_batch", [False, True])
@pytest.mark.parametrize("seed", [0, 3])
def test_separate_groups_are_recovered(grouped: Truth, seed: int, mini_batch: bool) -> None:
    fitted = fit_kmeans(
        open_stream(grouped.url), KMeansSettings(GROUPS, seed, mini_batch=mini_batch, sample=67)
    )
    label, group = fitted.assign(grouped.values.astype(np.float32)), _truth_of(grouped.values)
    assert len(set(zip(label.tolist(), group.tolist(), strict=True))) == GROUPS == len(set(label.tolist()))
    assert fitted.converged


def test_the_result_is_a_fixed_point_on_all_patches(cohort: Truth) -> None:
    stream = open_stream(cohort.url)
    fitted = fit_kmeans(stream, KMeansSettings(3, passes=100, tolerance=0, sample=31))
    distance = ((cohort.values[:, None] - fitted.centres) ** 2).sum(axis=2)
    label = distance.argmin(axis=1)
    assert fitted.converged
    assert fitted.inertia == pytest.approx(distance.min(axis=1).sum(), rel=1e-9)
    for cluster in range(3):
        np.testing.assert_allclose(fitted.centres[cluster], cohort.values[label == cluster].mean(axis=0))
    counts = np.bincount(label, minlength=3)
    assert list(counts) == sorted(counts, reverse=True)
    for row in fitted.counts.iter_rows(named=True):
        mine = cohort.slide == row["slide"]
        assert row["patches"] == (label[mine] == row["cluster"]).sum()
        assert row["share"] == pytest.approx(row["patches"] / max(mine.sum(), 1))
    assert fitted.counts.height == 3 * len(SHAPES)


def test_clusters_are_better_for_more_passes(cohort: Truth) -> None:
    stream = open_stream(cohort.url)
    inertia = [
        fit_kmeans(stream, KMeansSettings(7, passes=p, tolerance=0, sample=1)).inertia for p in (0, 30)
    ]
    assert inertia[1] <= inertia[0]


def _same(one: KMeans, other: KMeans) -> bool:
    return np.array_equal(one.centres, other.centres) and one.counts.equals(other.counts)


@pytest.mark.parametrize("mini_batch", [False, True])
def test_the_same_seed_gives_the_same_bits(cohort: Truth, mini_batch: bool) -> None:
    settings = KMeansSettings(4, 11, passes=3, mini_batch=mini_batch, sample=37)
    one, other = (fit_kmeans(open_stream(cohort.url), settings) for _ in range(2))
    assert _same(one, other)
    assert one.inertia == other.inertia
    elsewhere = KMeansSettings(4, 12, passes=0, mini_batch=mini_batch, sample=37)
    assert not _same(fit_kmeans(open_stream(cohort.url), elsewhere), one)


def test_labels_lie_where_the_patches_do(grouped: Truth, tmp_path: Path) -> None:
    fitted = fit_kmeans(open_stream(grouped.url), KMeansSettings(GROUPS), tmp_path / "a" / "labels")
    said = pl.read_parquet_metadata(tmp_path / "a" / "labels" / f"{min(SHAPES)}.parquet")["made_by"]
    assert (
        said
        == f"k-means with {GROUPS} clusters and seed 0 on the embeddings of encoder {fitted.encoder[:16]}"
    )
    frame = pl.concat(
        pl.read_parquet(tmp_path / "a" / "labels" / f"{name}.parquet") for name in sorted(SHAPES)
    )
    assert frame.columns == ["slide", "row", "col", "x_um", "y_um", "cluster"]
    np.testing.assert_array_equal(frame["slide"], grouped.slide)
    np.testing.assert_array_equal(frame.select("row", "col"), np.stack([grouped.row, grouped.col], axis=1))
    np.testing.assert_array_equal(frame["cluster"], fitted.assign(grouped.values.astype(np.float32)))


def test_a_reservoir_holds_each_patch_with_equal_chance(cohort: Truth) -> None:
    stream = open_stream(cohort.url)
    places = {value.tobytes(): i for i, value in enumerate(cohort.values)}
    drawn = np.zeros(len(places))
    for seed in range(60):
        sample = reservoir_sample(stream, 53, seed)
        indices = [places[value.tobytes()] for value in sample]
        assert len(indices) == len(set(indices)) == 53
        drawn[indices] += 1
    thirds = np.array_split(drawn, 3)
    expected = 60 * 53 / 3
    assert all(abs(part.sum() - expected) < 0.12 * expected for part in thirds)


def test_more_clusters_than_patches_are_refused(cohort: Truth) -> None:
    with pytest.raises(StoreError, match="0 patches cannot form 8 clusters"):
        fit_kmeans(open_stream(cohort.url, [EMPTY]))
    with pytest.raises(StoreError, match="at least 1 cluster"):
        KMeansSettings(0)


def test_identical_patches_make_clusters_without_a_warning(tmp_path: Path) -> None:
    truth = make_store(str(tmp_path / "store"), {"C1": (7, 13)}, draw=lambda rng, n, dim: np.ones((n, dim)))
    fitted = fit_kmeans(open_stream(truth.url), KMeansSettings(3))
    assert fitted.inertia == 0
    assert fitted.counts["patches"].sum() == len(truth.row)
    assert fit_pca(open_stream(truth.url), 2).explained_variance.tolist() == [0, 0]
    assert summarise(open_stream(truth.url))["shift"].to_list() == [None, None]


# ---------------------------------------------------------------------- neighbours


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("exclude_um", [None, 0.0, 200.0])
@pytest.mark.parametrize("n", [1, 19, 10_000])
def test_neighbours_are_those_of_brute_force(
    cohort: Truth, metric: Metric, exclude_um: float | None, n: int
) -> None:
    of_slide = np.flatnonzero(cohort.slide == "C4")
    q = of_slide[len(of_slide) // 2]
    stream = open_stream(cohort.url)
    query = patch_at(stream, "C4", int(cohort.row[q]), int(cohort.col[q]))
    found = similar(stream, query, n, metric, exclude_um)

    values, vector = cohort.values, cohort.values[q]
    if metric == "euclidean":
        distance = np.linalg.norm(values - vector, axis=1)
    else:
        distance = 1 - values @ vector / np.linalg.norm(values, axis=1) / np.linalg.norm(vector)
    step_um = np.hypot(cohort.row - cohort.row[q], cohort.col - cohort.col[q]) * 56
    radius = 111.9 if exclude_um is None else exclude_um
    distance[(cohort.slide == "C4") & (step_um <= radius)] = np.inf
    order = np.argsort(distance, kind="stable")[: min(n, int(np.isfinite(distance).sum()))]
    np.testing.assert_allclose(found["distance"], distance[order], atol=1e-12)
    np.testing.assert_array_equal(found["slide"], cohort.slide[order])
    np.testing.assert_array_equal(
        found.select("row", "col"), np.stack([cohort.row[order], cohort.col[order]], 1)
    )
    np.testing.assert_allclose(found["x_um"], (cohort.col[order] * 112 + 112) * 0.5)


def test_a_patch_is_found_by_its_place_in_microns(cohort: Truth) -> None:
    stream = open_stream(cohort.url, ["C1"])
    row, col = int(cohort.row[7]), int(cohort.col[7])
    query = patch_at_um(stream, "C1", (col * 112 + 112) * 0.5 + 13, (row * 112 + 112) * 0.5 - 11)
    assert (query.row, query.col) == (row, col)
    np.testing.assert_array_equal(query.vector, cohort.values[7])


def test_a_place_without_an_embedding_is_refused_with_a_better_one(cohort: Truth) -> None:
    stream = open_stream(cohort.url)
    slide = stream.slide("C1")
    tissue = slide.read_tissue()
    there = np.zeros(tissue.shape, bool)
    mine = cohort.slide == "C1"
    there[cohort.row[mine], cohort.col[mine]] = True
    row, col = map(int, np.argwhere(~tissue)[0])
    with pytest.raises(StoreError, match=r"is background; the nearest tissue is patch \(\d+, \d+\)"):
        patch_at(stream, "C1", row, col)
    row, col = map(int, np.argwhere(tissue & ~there)[0])
    with pytest.raises(StoreError, match="unreadable, or not embedded yet"):
        patch_at(stream, "C1", row, col)
    with pytest.raises(StoreError, match="rows are 0 to 6, cols 0 to 12"):
        patch_at(stream, "C1", 7, 0)
    with pytest.raises(StoreError, match="cover x 0 to 784 um and y 0 to 448 um"):
        patch_at_um(stream, "C1", 785, 3)
    with pytest.raises(StoreError, match="no tissue"):
        patch_at(stream, EMPTY, 0, 0)
    with pytest.raises(StoreError, match="among those analysed: C1, C2, C3, C4"):
        patch_at(stream, "C9", 0, 0)


def test_a_vector_without_direction_is_never_near(tmp_path: Path) -> None:
    def first_is_zero(rng: np.random.Generator, n: int, dim: int) -> np.ndarray:
        values = rng.uniform(1, 2, (n, dim))
        values[0] = 0
        return values

    truth = make_store(str(tmp_path / "store"), {"C1": (7, 13)}, draw=first_is_zero)
    stream = open_stream(truth.url)
    query = patch_at(stream, "C1", int(truth.row[9]), int(truth.col[9]))
    last = similar(stream, query, 1000, exclude_um=0)[-1]
    assert (last["row"][0], last["col"][0], last["distance"][0]) == (truth.row[0], truth.col[0], 1)
    zero = patch_at(stream, "C1", int(truth.row[0]), int(truth.col[0]))
    with pytest.raises(StoreError, match="no direction"):
        similar(stream, zero)
    assert similar(stream, zero, 3, "euclidean").height == 3


# ---------------------------------------------------------------------- reads and memory


def _clusters(stream: PatchStream) -> object:
    return fit_kmeans(stream, KMeansSettings(3, passes=2, tolerance=-1, sample=256))


def _scores(stream: PatchStream) -> object:
    return [name for name, _ in fit_pca(stream, 3).transform(stream)]


def _similar(stream: PatchStream) -> object:
    first = next(iter(stream.slides))
    row, col = np.argwhere(first.read_tissue())[0]
    vector = np.ones(stream.dim)
    from featurestore.analysis.neighbours import Query

    return similar(stream, Query(first.slide_id, int(row), int(col), vector), 9)


ANALYSES = [(summarise, 1), (fit_pca, 1), (_scores, 2), (_clusters, 4), (_similar, 1)]


@pytest.mark.parametrize(("analysis", "passes"), ANALYSES)
def test_each_block_is_read_once_a_pass(
    cohort: Truth, analysis: Callable[[PatchStream], object], passes: int
) -> None:
    stream = open_stream(cohort.url)
    with OPENS.counted() as opened:
        analysis(stream)
    stored = {str(p) for p in Path(cohort.url).rglob("embedding/c/*/*/0")}
    assert len(stored) == sum(cohort.blocks.values())
    assert opened == dict.fromkeys(stored, passes)
    assert stream.passes == passes


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    shapes = {f"S{i}": (64, 96) for i in range(6)}
    draw: Draw = lambda rng, n, dim: rng.normal(size=(n, dim)).astype(np.float16)  # noqa: E731
    identity = EncoderIdentity("wide", 256, {})
    url = str(tmp_path_factory.mktemp("wide") / "store")
    return make_store(url, shapes, identity, (16, 16), draw, tissue_share=1.0).url


@pytest.mark.parametrize(("analysis", "passes"), ANALYSES)
def test_memory_is_some_blocks_and_not_slides(
    wide: str, analysis: Callable[[PatchStream], object], passes: int
) -> None:
    stored = sum(p.stat().st_size for p in Path(wide).rglob("embedding/c/*/*/0"))
    stream = open_stream(wide)
    tracemalloc.start()
    try:
        analysis(stream)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    block = 16 * 16 * 256 * 4
    assert stored > 18e6
    assert peak < 8e6, f"{peak / block:.0f} blocks"


def test_a_longer_cohort_takes_no_more_memory(wide: str) -> None:
    peaks = []
    for slides in (["S0"], None):
        stream = open_stream(wide, slides)
        tracemalloc.start()
        try:
            fit_pca(stream)
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


# ---------------------------------------------------------------------- the tree, S3, the guide


def test_the_tree_is_lazy_and_a_chunk_is_a_block(cohort: Truth) -> None:
    with OPENS.counted() as opened:
        tree = open_store(cohort.url)
        embedding = tree[f"C4/{SPEC.key}/hf-uni"]["embedding"]
        assert not opened
        assert embedding.chunks == ((3, 3, 3, 3, 1), (5, 5, 5, 2), (7,))
        mine = np.flatnonzero(cohort.slide == "C4")[23]
        place = {"y": (cohort.row[mine] * 112 + 112) * 0.5 + 9, "x": (cohort.col[mine] * 112 + 112) * 0.5 - 9}
        np.testing.assert_array_equal(embedding.sel(place, method="nearest"), cohort.values[mine])
        assert sum(opened.values()) == 1
    assert sorted(tree.children) == sorted(SHAPES)
    assert float(embedding.mean(skipna=True).compute()) == pytest.approx(
        cohort.values[cohort.slide == "C4"].mean(), rel=1e-2
    )


def test_slides_that_were_really_embedded_are_analysed(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    for seed in (1, 2):
        image = tissue_like(1100, 1000, 0.5, seed)
        write_pyramid(tmp_path / "slides" / f"S{seed}.tif", image, 0.5)
    blank = np.full((700, 600, 3), 245, np.uint8)
    write_pyramid(tmp_path / "slides" / "blank.tif", blank, 0.5)
    url = str(tmp_path / "store")
    settings = EmbedSettings(encoders=("colour", "morphology"), spec=GridSpec(0.5, 64, 32))
    results = embed(str(tmp_path / "slides"), url, settings)
    with pytest.raises(AmbiguousSelectionError, match=r"colour.*morphology"):
        open_stream(url)
    frame = summarise(open_stream(url, encoder="morphology"))
    assert dict(frame.select("slide", "patches").iter_rows()) == {
        **{result.slide_id: result.patches for result in results},
        None: sum(result.patches for result in results),
    }
    assert frame["patches"][-1] > 200
    assert fit_pca(open_stream(url, encoder="morphology"), 5).explained_variance_ratio.sum() > 0.5


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxy]:
    import s3fs

    with serving(tmp_path_factory.mktemp("objects")) as server, pytest.MonkeyPatch.context() as patch:
        proxy = Proxy(server.port)
        for name, value in environment(proxy.port).items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
        _close_sessions(list(s3fs.S3FileSystem._cache.values()))
        s3fs.S3FileSystem.clear_instance_cache()
        proxy.close()


def _close_sessions(systems: list[Any]) -> None:
    """What s3fs leaves open would be complained of when the interpreter ends."""
    from zarr.core.sync import _get_loop

    for system in systems:
        if getattr(system, "_s3creator", None) is not None:
            loop = _get_loop() if system.asynchronous else system.loop
            leaving = system._s3creator.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(leaving, loop).result(10)


def _gets(proxy: Proxy, pattern: str = "") -> Counter[str]:
    """Objects read; s3fs may ask for an object's size first (HEAD), which reads nothing."""
    return Counter(path for method, path in proxy.log if method == "GET" and re.search(pattern, path))


@pytest.mark.s3
def test_on_s3_each_block_is_one_request_a_pass_and_a_slide_is_opened_by_one(s3: Proxy) -> None:
    truth = make_store("s3://test/counted", SHAPES)
    s3.reset()
    stream = open_stream(truth.url)
    assert list(_gets(s3, "/C[1-4]/")) == ["/test/counted/C1/zarr.json"], "the first slide alone"
    fitted = fit_pca(stream)
    blocks = _gets(s3, "/embedding/c/")
    assert set(blocks.values()) == {1}
    assert len(blocks) == sum(truth.blocks.values())
    assert _gets(s3, "/C[1-4]/").total() == len(blocks) + 2 * len(SHAPES), "metadata and tissue of each slide"
    np.testing.assert_allclose(fitted.mean, truth.values.mean(axis=0))
    s3.reset()
    fit_pca(stream)
    assert _gets(s3).total() == len(blocks) + len(SHAPES), "another pass reads tissue again, and no metadata"


@pytest.mark.s3
@pytest.mark.e2e
def test_on_s3_the_first_patches_come_before_most_slides_are_opened(s3: Proxy) -> None:
    truth = make_store("s3://test/many", {f"M{i:03}": (3, 5) for i in range(25)})
    s3.reset()
    blocks = open_stream(truth.url).blocks()
    next(blocks)
    opened = _gets(s3, "/M[0-9]+/zarr.json")
    blocks.close()
    assert 1 <= len(opened) <= 18, "the first slide, and those whose blocks are read ahead"


@pytest.mark.s3
def test_on_s3_a_tree_costs_a_constant_number_of_requests_a_slide(s3: Proxy) -> None:
    truth = make_store("s3://test/tree", SHAPES)
    s3.reset()
    tree = open_store(truth.url)
    per_slide = [_gets(s3, f"/{name}/").total() for name in SHAPES]
    assert per_slide == [3] * len(SHAPES), "its metadata, y and x"
    s3.reset()
    embedding = tree[f"C1/{SPEC.key}/hf-uni"]["embedding"]
    assert embedding.chunks == ((3, 3, 1), (5, 5, 3), (7,))
    assert not s3.log
    np.testing.assert_array_equal(embedding[truth.row[0], truth.col[0]], truth.values[0])
    assert _gets(s3, "/embedding/c/").total() == _gets(s3).total() == 1


def _write_maps(url: str, out: str, spec: GridSpec) -> None:
    """Maps of four genes, drawn at random, on the grids of a store."""
    store, maps, rng = Store.open(url), ExpressionStore.open_or_create(out), np.random.default_rng(3)
    for slide_id in store.slide_ids():
        stored = store.grid(slide_id, spec.key)
        array = maps.add_map(
            stored, ("ERBB2", "CD3E", "EPCAM", "COL1A1"), (16, 16), {"model": "m", "encoder": "e"}
        ).array
        for block in stored.planned((16, 16)):
            values = rng.gamma(2, 0.5, (*block.shape, 4))
            values[~stored.is_tissue[block.slices]] = np.nan
            array.write(block, values)


@pytest.mark.s3
@pytest.mark.slow
def test_every_block_of_the_guide_runs(s3: Proxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = GridSpec(0.5, 224, 224)
    identity = EncoderIdentity("uni2-h", 24, {"weights": "made up"})
    make_store(
        "s3://test/cohort", {"C1": (20, 31), "C2": (23, 37), "C4": (19, 29)}, identity, (16, 16), spec=spec
    )
    _write_maps("s3://test/cohort", "s3://test/maps", spec)
    text = (
        (Path(__file__).parents[3] / "docs" / "analysis.md").read_text().replace("s3://bucket/", "s3://test/")
    )
    blocks = re.findall(r"```(python|shell)\n(.*?)```", text, re.DOTALL)
    assert {kind for kind, _ in blocks} == {"python", "shell"}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "masks").mkdir()
    ring = [[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]
    (tmp_path / "masks" / "C1.geojson").write_text(json.dumps({"type": "Polygon", "coordinates": [ring]}))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    names: dict[str, object] = {}
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, "docs/analysis.md", "exec"), names)
            continue
        done = subprocess.run(
            ["bash", "-ec", code], env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"


def test_analysis_loads_neither_torch_nor_dask(cohort: Truth) -> None:
    code = (
        "import sys\n"
        "from featurestore.analysis import kmeans, neighbours, pca, summary\n"
        "from featurestore.analysis.patch_stream import open_stream\n"
        f"stream = open_stream({cohort.url!r})\n"
        "pca.fit_pca(stream); summary.summarise(stream); kmeans.fit_kmeans(stream)\n"
        "print([m for m in ('torch', 'dask', 'timm') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
