from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from make_sections import N_GENES, make_section
from scipy import sparse
from scipy.stats import pearsonr

from histosge.data.genes import choose_genes, library_size
from histosge.data.sections import Section
from histosge.errors import HistosgeError
from histosge.evaluation.ablation import SWITCHES, PublishedCode, ablation_names
from histosge.evaluation.hest_protocol import HestMethod, HestModel, hest_split, score_hest
from histosge.evaluation.method_choice import find_methods
from histosge.evaluation.methods import LibrarySizeMethod
from histosge.evaluation.report import evaluation_blocks
from histosge.evaluation.report_files import write_evaluation
from histosge.evaluation.results import Scores
from histosge.evaluation.runner import evaluate_sections
from histosge.evaluation.tasks import Plan
from histosge.models.library_size import DepthOracle
from histosge.models.linear_algebra import principal_axes
from histosge.reporting.page import render_report

ALONE = [f"paper+{name}" for name in SWITCHES]


def _page(scores: Scores) -> str:
    """Return the page without its maps, which take most of the time and are looked at elsewhere."""
    return render_report("t", evaluation_blocks(replace(scores, maps=())))


@pytest.fixture(scope="module")
def three() -> list[Section]:
    return [make_section(name, seed) for name, seed in (("A", 1), ("B", 2), ("C", 3))]


def test_depth_is_told_the_held_out_totals_and_keeps_nothing_once_depth_is_removed(
    three: list[Section],
) -> None:
    scores = evaluate_sections(three, ["depth"], split="section", genes=19, seeds=(0,))
    assert scores.mean("depth", "pearson_depth_adjusted") == 0
    assert scores.maps == ()
    task = next(iter(Plan.from_sections(three, "section", 19).tasks([0])))
    fitted = LibrarySizeMethod().fit(task, None)
    ((held_out, target),) = task.held_out()
    straight = np.log(library_size(held_out.spots))
    got = fitted.predict_spots(held_out)
    # A parabola in log depth: nothing but depth enters.
    basis = np.stack([np.ones_like(straight), straight, straight**2], axis=1)
    residual = got - basis @ np.linalg.lstsq(basis, got, rcond=None)[0]
    assert np.abs(residual).max() < 1e-4
    assert got.shape == target.shape


def test_depth_recovers_what_depth_alone_decides() -> None:
    depth = np.random.default_rng(3).lognormal(7, 0.4, 211)
    target = np.stack([0.3 + 0.5 * np.log(depth), 5 - 0.2 * np.log(depth) ** 2], axis=1)
    oracle = DepthOracle.fit(depth[:101], target[:101])
    np.testing.assert_allclose(oracle.predict(depth[101:]), target[101:], rtol=1e-5)


def test_the_oracle_is_marked_wherever_it_is_shown(three: list[Section]) -> None:
    scores = evaluate_sections(three, ["depth", "mean"], split="section", genes=5, seeds=(0,))
    page = _page(scores)
    assert "oracle: knows the total counts" in page
    assert "depth is an oracle" in page


@pytest.mark.parametrize("split", ["section", "donor"])
def test_presets_that_only_know_their_own_slides_are_left_out_where_whole_slides_are_held_out(
    split: str,
) -> None:
    found, left_out = find_methods(["knn", "ridge"], split)
    assert [method.name for method in found] == ["ridge"]
    assert len(left_out) == 1
    assert left_out[0].startswith("knn is left out")
    assert [c.name for c in find_methods(["knn", "ridge"], "block")[0]] == ["knn", "ridge"]


def test_between_spots_interpolation_finds_what_is_smooth_and_the_image_what_follows_it(
    three: list[Section],
) -> None:
    smooth = []
    for section in three[:2]:
        x, y = section.spots.xy_um.T / 100
        rates = np.stack([1 + np.sin(x / 2 + phase) * np.cos(y / 2) for phase in range(N_GENES)], axis=1)
        counts = np.random.default_rng(3).poisson(rates * 40).astype(np.float32)
        smooth.append(replace(section, spots=replace(section.spots, counts=sparse.csr_matrix(counts))))
    presets = ("nearest", "linear", "cubic", "ridge")
    scores = evaluate_sections(smooth, presets, split="checkerboard", genes=5, seeds=(0,))
    assert [(fold.name, fold.n_train, fold.n_test) for fold in scores.folds] == [
        ("checkerboard0", 220, 222),
        ("checkerboard1", 222, 220),
    ]
    for name in ("nearest", "linear", "cubic"):
        assert scores.mean(name, "pearson_mean") > 0.6
    assert scores.mean("linear", "pearson_mean") > scores.mean("nearest", "pearson_mean")
    assert abs(scores.mean("ridge", "pearson_mean")) < 0.1
    page = render_report("t", evaluation_blocks(scores))
    assert "every second spot" in page
    assert "The spots between those shown are training spots" in page


def test_nothing_left_is_refused_with_the_reason() -> None:
    with pytest.raises(HistosgeError, match="knn is left out"):
        find_methods(["knn"], "section")


def test_what_was_left_out_is_said_in_the_report(three: list[Section]) -> None:
    scores = evaluate_sections(three, ["knn", "mean"], split="section", genes=5, seeds=(0,))
    assert scores.presets == ("mean",)
    assert "knn is left out" in _page(scores)


@pytest.mark.parametrize(
    ("name", "message"), [("paper+nothing", "unknown switch 'nothing'"), ("papr", "unknown preset 'papr'")]
)
def test_unknown_names_are_refused_with_those_that_there_are(name: str, message: str) -> None:
    with pytest.raises(HistosgeError, match=message):
        find_methods([name], "block")


def test_a_name_says_its_switches_in_one_order() -> None:
    (one,), _ = find_methods(["paper+integer_coordinates+file_order_groups"], "block")
    assert one.name == "paper+file_order_groups+integer_coordinates"
    assert PublishedCode(frozenset()).name == "paper+spots"
    assert PublishedCode(frozenset(SWITCHES)).name == "paper+all"
    assert ablation_names(patches=True) == ("paper+spots", *ALONE, "paper+all")


class Channels:
    """Stands for an encoder: every way of reading gives other embeddings, and is counted."""

    def __init__(self) -> None:
        self.asked: list[frozenset[str]] = []

    def __call__(self, sections: Sequence[Section], switches: frozenset[str]) -> tuple[Section, ...]:
        self.asked.append(switches)
        return tuple(replace(s, patches=s.patches.with_embedding(-s.patches.embedding)) for s in sections)


@pytest.mark.parametrize("split", ["random", pytest.param("section", marks=pytest.mark.slow)])
def test_an_ablation_scores_each_defect_alone_and_together(split: str, three: list[Section]) -> None:
    reencode = Channels()
    scores = evaluate_sections(
        three[:2],
        ["mean"],
        split=split,
        genes=7,
        seeds=(0,),
        epochs=2,
        ablate=True,
        reencode=reencode,
    )
    assert scores.presets == ("mean", "paper+spots", *ALONE, "paper+all")
    assert set(reencode.asked) == {
        frozenset(["bgr"]),
        frozenset(["fixed_pixel_crop"]),
        frozenset(["bgr", "fixed_pixel_crop"]),
    }
    metrics = {"paper_all_spots", "as_reported", "pearson_mean_on_noise", "paper_all_spots_on_noise"}
    for name in scores.presets[1:]:
        mine = scores.scores.filter(pl.col("preset") == name)
        assert metrics <= set(mine["metric"])
        reported, honest = (scores.mean(name, metric) for metric in ("as_reported", "pearson_mean"))
        if name in ("paper+all_spots_metric", "paper+all"):
            assert reported == scores.mean(name, "paper_all_spots")
        else:
            assert reported == honest
    assert scores.mean("paper+all_spots_metric", "pearson_mean") == scores.mean("paper+spots", "pearson_mean")
    page = _page(scores)
    assert "What the published code&#39;s defects do" in page
    assert "paper_all_spots is no held-out figure" in page


def test_without_slides_the_defects_of_reading_are_left_out_and_said_so(three: list[Section]) -> None:
    scores = evaluate_sections(
        three[:2], ["mean"], split="section", genes=5, seeds=(0,), epochs=1, ablate=True
    )
    assert not any("bgr" in name or "crop" in name for name in scores.presets)
    assert any("bgr and fixed_pixel_crop are left out" in sentence for sentence in scores.left_out)


def test_genes_chosen_before_the_split_see_the_held_out_section(three: list[Section]) -> None:
    task = next(iter(Plan.from_sections(three, "section", 5).tasks([0])))
    leaky = PublishedCode(frozenset(["hvg_before_split"])).prepare(task)
    assert len(leaky.genes) == len(task.genes)
    assert leaky.genes == choose_genes([s.spots for s in three], 5)
    given = next(iter(Plan.from_sections(three, "section", ("G3", "G7")).tasks([0])))
    assert PublishedCode(frozenset(["hvg_before_split"])).prepare(given).genes == ("G3", "G7")


def test_differences_are_written_beside_the_scores(three: list[Section], tmp_path) -> None:  # type: ignore[no-untyped-def]
    scores = evaluate_sections(three, ["mean", "ridge"], split="section", genes=7, seeds=(0, 1))
    write_evaluation(scores, tmp_path)
    rows = pl.read_csv(tmp_path / "differences.csv").filter(pl.col("metric") == "pearson_mean")
    assert rows.select("preset_a", "preset_b").rows() == [("ridge", "mean")]
    expected = scores.mean("ridge", "pearson_mean") - scores.mean("mean", "pearson_mean")
    assert rows["difference"][0] == pytest.approx(expected, abs=1e-5)
    assert rows["low"][0] < expected < rows["high"][0]


def test_scores_hold_the_pattern_in_space_and_count_constant_genes(three: list[Section]) -> None:
    scores = evaluate_sections(three[:1], ["mean", "ridge"], split="block", genes=7, seeds=(0,))
    assert scores.mean("mean", "n_constant") == 7
    assert scores.mean("ridge", "n_constant") == 0
    assert scores.mean("mean", "ssim") < scores.mean("ridge", "ssim")
    assert scores.mean("mean", "moran_measured") == scores.mean("ridge", "moran_measured")
    assert {"ssim", "moran_measured", "moran_predicted"} <= set(scores.genes.columns)


def test_the_hest_protocol_is_a_ridge_without_intercept_on_standardised_components() -> None:
    rng = np.random.default_rng(3)
    X, Y = rng.standard_normal((211, 31)) * 3 + 5, rng.random((211, 7)) + 2
    model = HestModel.fit(X, Y)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    alpha = 100 / (31 * 7)
    expected = Z @ np.linalg.solve(Z.T @ Z + alpha * np.eye(31), Z.T @ Y)
    found = model.standardiser.apply(X) @ model.weight
    # As far as the solver goes before it stops.
    np.testing.assert_allclose(found, expected, atol=0.02 * expected.std())
    assert abs(found.mean()) < 1e-6  # no intercept: the genes' means are lacking


def test_the_hest_protocol_stops_before_the_exact_solution_as_the_benchmark_does() -> None:
    import torch
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(4)
    X = rng.standard_normal((180, 60)) * np.geomspace(1, 1e-3, 60) @ np.linalg.qr(rng.random((60, 60)))[0]
    Y = X[:, :5] + 0.5 * rng.standard_normal((180, 5)) + 3
    model = HestModel.fit(X, Y)
    Z = (X - X.mean(axis=0)) / X.std(axis=0)
    Z = (Z @ principal_axes(Z, 60)).astype(np.float32)
    alpha = 100 / (60 * 5)
    # The benchmark hands over tensors, which scikit-learn solves in double precision; arrays it would solve in single.
    tensor = torch.from_numpy(Z)
    theirs = Ridge(alpha, fit_intercept=False, solver="lsqr", max_iter=1000).fit(tensor, Y).predict(tensor)
    exact = Z @ np.linalg.solve(Z.T @ Z + alpha * np.eye(60), Z.T @ Y)
    found = model.standardiser.apply(X) @ model.weight
    apart = np.abs(theirs - exact).max()
    assert apart > 0.01
    assert np.abs(found - theirs).max() < 0.01 * apart


def test_the_hest_protocol_says_its_quirks_and_what_depth_is_worth(three: list[Section]) -> None:
    scores = score_hest(three, hest_split(three))
    assert scores.split == "section"  # one donor
    assert scores.protocol == "hest"
    assert scores.mean("hest+depth_normalised", "pearson_mean") > 0.3
    page = _page(scores)
    for quirk in ("not normalised for depth", "without intercept", "chosen on all spots"):
        assert quirk in page


def test_hest_targets_hold_depth_unless_it_is_normalised(three: list[Section]) -> None:
    task = next(iter(Plan.from_sections(three, "section", 5).tasks([0])))
    depth = np.log(library_size(three[0].spots))
    held = {}
    for name, normalised in (("raw", False), ("normalised", True)):
        target = HestMethod(name, depth_normalised=normalised).prepare(task).targets[0]
        held[name] = np.mean([pearsonr(depth, column)[0] for column in target.T])
    assert held["raw"] > 0.15 + abs(held["normalised"])
