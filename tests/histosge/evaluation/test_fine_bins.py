"""Maps scored at measured bins that are finer than the spots of training."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from numpy.typing import NDArray
from scipy import sparse
from write_hd_truth import write_hd

import histosge
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.expression.pseudo_spots import pool_spots
from histosge.data.sections import Patches, Section, Spots
from histosge.data.spot_overlap import spot_overlap, square_overlap
from histosge.errors import ExpressionError, HistosgeError
from histosge.evaluation import fine_bins
from histosge.evaluation.bin_scores import HeldOutBins
from histosge.evaluation.fine_bins import FineBins
from histosge.evaluation.results import Scores
from histosge.evaluation.runner import evaluate_sections
from histosge.evaluation.tasks import Plan
from histosge.evaluation.unit_pooling import pool_units
from histosge.synthetic import GeneCounts, SyntheticSpec, load_truth, make_cohort

STEP = 8.0
N_GENES, DIM = 13, 3
SHAPE = (48, 61)
GENES = tuple(f"G{i}" for i in range(N_GENES))
WEIGHTS = np.random.default_rng(101).standard_normal((DIM, N_GENES))


def true_log_rates(embedding: NDArray[np.float32]) -> NDArray[np.float64]:
    rates = np.exp(embedding @ WEIGHTS)
    return np.log1p(rates / rates.sum(axis=1, keepdims=True) * 1e4)


def make_fine(slide_id: str, seed: int, depth: float = 400.0) -> tuple[Section, Spots]:
    """A section whose patches, one every 8 µm, each have rates of their own: its spots, and its bins of 8 µm."""
    rng = np.random.default_rng(seed)
    rows, cols = (index.ravel() for index in np.indices(SHAPE))
    embedding = rng.standard_normal((rows.size, DIM)).astype(np.float32) * 0.7
    patches = Patches(slide_id, rows, cols, embedding, STEP, STEP)
    rates = np.expm1(true_log_rates(embedding)) / 1e4
    counts = sparse.csr_matrix(rng.poisson(rates * depth).astype(np.float32))
    names = np.array([f"b{i}" for i in range(rows.size)])
    bins = Spots(slide_id, "D", names, patches.xy_um, STEP, counts, GENES, "square")
    lattice = np.stack(np.meshgrid(np.arange(30, 470, 60.0), np.arange(30, 360, 60.0)), axis=-1).reshape(
        -1, 2
    )
    places = np.array([f"s{i}" for i in range(len(lattice))])
    empty = sparse.csr_matrix((len(lattice), N_GENES))
    spots = Spots(slide_id, "D", places, lattice, 55.0, empty, GENES)
    overlap = spot_overlap(spots, patches)
    # 38 patches under a disc: its counts are theirs.
    measured = rng.poisson(np.asarray(overlap @ rates) * depth * 37).astype(np.float32)
    spots = replace(spots, counts=sparse.csr_matrix(measured))
    return Section(patches, spots, overlap, np.full((*SHAPE, 3), 200, np.uint8)), bins


def fine_of(pairs: Sequence[tuple[Section, Spots]], side_um: float) -> FineBins:
    return FineBins.from_sections([(s, [s.patches], bins) for s, bins in pairs], side_um, 55.0)


@pytest.fixture(scope="module")
def pairs() -> list[tuple[Section, Spots]]:
    return [make_fine(name, seed) for name, seed in (("A", 1), ("B", 2), ("C", 3))]


@pytest.fixture(scope="module")
def scored(pairs: list[tuple[Section, Spots]]) -> Scores:
    # Of A no bins are known: it is trained on, and scored at its spots alone.
    return evaluate_sections(
        [section for section, _ in pairs],
        ["mean", "ridge"],
        split="section",
        genes=GENES,
        seeds=(0,),
        bins=fine_of(pairs[1:], STEP),
    )


def held_out_at(section: Section, bins: Spots, side_um: float) -> HeldOutBins:
    """The bins of a section that is held out whole."""
    tasks = Plan.from_sections([make_fine("Z", 9)[0], section], "section", GENES).tasks((0,))
    task = next(task for task in tasks if task.fold.test[section.slide_id].any())
    found = HeldOutBins.from_task(fine_of([(section, bins)], side_um), task)
    assert found is not None
    return found


def test_a_map_finer_than_spots_scores_within_them_and_a_shuffled_or_blurred_one_does_not(
    pairs: list[tuple[Section, Spots]],
) -> None:
    section, bins = pairs[0]
    found = held_out_at(section, bins, STEP)
    truth = true_log_rates(section.patches.embedding)
    fine = found.score(truth).values
    assert fine["pearson_mean_at_8um"] > 0.6
    assert fine["pearson_within_spots_at_8um"] > 0.6
    shuffled = found.score(np.random.default_rng(5).permutation(truth)).values
    assert abs(shuffled["pearson_mean_at_8um"]) < 0.02
    assert abs(shuffled["pearson_within_spots_at_8um"]) < 0.02
    # The mean of each square as wide as a spot: all that a measurement of spots could show.
    n = np.bincount(found.square)
    means = np.stack([np.bincount(found.square, column) / n for column in truth.T], axis=1)[found.square]
    blurred = found.score(means).values
    assert blurred["pearson_mean_at_8um"] > 0.05
    assert blurred["pearson_within_spots_at_8um"] == 0


def test_the_attainable_score_is_about_that_of_the_true_rates(pairs: list[tuple[Section, Spots]]) -> None:
    for depth in (60.0, 400.0):
        section, bins = make_fine("A", 1, depth)
        values = held_out_at(section, bins, STEP).score(true_log_rates(section.patches.embedding)).values
        assert values["attainable_at_8um"] == pytest.approx(values["pearson_depth_adjusted_at_8um"], rel=0.15)
        assert values["median_counts_at_8um"] == pytest.approx(depth, rel=0.05)
        assert values["gene_counts_at_8um"] < depth / N_GENES * 1.5


def test_bins_are_scored_beside_the_controls_with_the_columns_of_all_scores(scored: Scores) -> None:
    rows = scored.scores
    assert rows.columns == ["preset", "split", "fold", "seed", "metric", "value"]
    at_bins = rows.filter(pl.col("metric") == "pearson_mean_at_8um")
    assert set(at_bins["fold"]) == {"B", "C"}
    assert set(at_bins["preset"]) == {"mean", "ridge", "depth", "noise", "smooth_noise"}
    # Trained on spots of 38 patches: what it learnt is told apart within a spot.
    assert scored.mean("ridge", "pearson_within_spots_at_8um") > 0.3
    assert scored.mean("mean", "pearson_mean_at_8um") == 0
    for control in ("noise", "smooth_noise"):
        assert abs(scored.mean(control, "pearson_mean_at_8um")) < 0.03
        assert abs(scored.mean(control, "pearson_within_spots_at_8um")) < 0.03
    per_gene = scored.genes.filter((pl.col("preset") == "ridge") & (pl.col("fold") == "B"))
    own = at_bins.filter((pl.col("preset") == "ridge") & (pl.col("fold") == "B"))["value"].item()
    assert per_gene["pearson_at_8um"].mean() == pytest.approx(own)
    assert scored.genes.filter(pl.col("fold") == "A")["pearson_at_8um"].is_null().all()
    assert scored.bins is not None
    assert scored.bins.maps == ("one value every 8 µm, from patches of 8 µm",)


def test_scores_at_spots_are_the_same_with_and_without_bins(
    pairs: list[tuple[Section, Spots]], scored: Scores
) -> None:
    plain = evaluate_sections(
        [section for section, _ in pairs], ["mean", "ridge"], split="section", genes=GENES, seeds=(0,)
    )
    mine = scored.scores.filter(~pl.col("metric").str.ends_with("_at_8um"))
    assert mine.equals(plain.scores)
    assert plain.bins is None


@pytest.mark.parametrize("turned", [0.0, 7.0, -31.0])
@pytest.mark.parametrize("mpp", [0.0, 0.5])
def test_pooling_by_two_is_the_sum_of_a_plain_reshape(turned: float, mpp: float) -> None:
    counts = np.random.default_rng(3).poisson(3, (*SHAPE, 5))
    n_rows, n_cols = SHAPE
    rows, cols = (index.ravel() for index in np.indices(SHAPE))
    angle = np.radians(turned)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    xy_um = np.stack([cols, rows], axis=1) * STEP @ turn + (1234.5, 987.6)
    if mpp:  # as files with whole pixels have them
        xy_um = np.rint(xy_um / mpp) * mpp
    shuffled = np.random.default_rng(4).permutation(rows.size)
    names = np.array([f"b{i}" for i in range(rows.size)])
    table = sparse.csr_matrix(counts.reshape(-1, 5)[shuffled])
    units = Spots("A", "D", names, xy_um[shuffled], STEP, table, tuple("abcde"), "square")
    bins, bin_of_unit, found = pool_units(units, 16.0)
    # The last column of 61 has half of its units, and stays: the sum is of those that are there.
    padded = np.concatenate([counts, np.zeros((n_rows, 1, 5), int)], axis=1)
    expected = padded.reshape(n_rows // 2, 2, (n_cols + 1) // 2, 2, 5).sum(axis=(1, 3)).reshape(-1, 5)
    np.testing.assert_array_equal(bins.counts.toarray(), expected)
    assert found == pytest.approx(abs(turned), abs=0.1)
    assert (bin_of_unit >= 0).all()
    centres = np.stack(np.meshgrid(np.arange(31) * 2 + 0.5, np.arange(24) * 2 + 0.5), axis=-1).reshape(-1, 2)
    np.testing.assert_allclose(bins.xy_um, centres * STEP @ turn + (1234.5, 987.6), atol=0.3)


def test_bins_of_the_files_own_size_are_the_files_own(pairs: list[tuple[Section, Spots]]) -> None:
    _, units = pairs[0]
    bins, _, _ = pool_units(units, STEP)
    order = np.lexsort(np.rint(bins.xy_um).T)
    own = np.lexsort(np.rint(units.xy_um).T)
    np.testing.assert_allclose(bins.xy_um[order], units.xy_um[own], atol=1e-6)
    assert (bins.counts[order] != units.counts[own]).nnz == 0


@pytest.mark.parametrize("split", ["block", "random"])
def test_no_bin_holds_a_count_that_training_saw(split: str) -> None:
    section, units = make_fine("A", 1)
    # Squares of 28 µm, as such a file is pooled for training: bins of 8 µm lie across their borders.
    spots = pool_spots(units, 28.0)
    overlap = square_overlap(spots.xy_um, 28.0, section.patches)
    section = replace(section, spots=spots, overlap=overlap)
    bins = FineBins.from_sections([(section, [section.patches], units)], 16.0, 28.0)
    for task in Plan.from_sections([section], split, GENES).tasks((0,)):
        found = HeldOutBins.from_task(bins, task)
        assert found is not None
        trained = {spots.barcodes[i] for i in np.flatnonzero(task.fold.train["A"])}
        square_of_unit = [f"{int(y // 28)}x{int(x // 28)}" for x, y in units.xy_um.tolist()]
        seen = units.xy_um[[square in trained for square in square_of_unit]]
        ((_, mask, chosen, _),) = found.parts
        gap = np.abs(chosen.xy_um[:, None] - seen[None]).max(axis=2)
        assert gap.min() > 8
        assert len(chosen) > 20
        if split == "block":
            assert mask is not None
            assert not (mask & task.patch_splits["A"].train).any()


@pytest.mark.parametrize(
    ("side_um", "change", "message"),
    [
        (4.0, {}, r"4 µm is finer than what was measured, bins of 8 µm; give --at 8 or more"),
        (12.0, {}, r"12 µm is no whole number of its bins of 8 µm; give --at 8 or 16"),
        (
            8.0,
            {"diameter_um": 55.0, "shape": "disc"},
            "8 µm is finer than what was measured, spots of 55 µm; use Visium HD or Xenium as truth",
        ),
        (
            100.0,
            {"diameter_um": 55.0, "shape": "disc"},
            "its spots of 55 µm leave gaps between them, so they do not measure squares of 100 µm; leave out --at",
        ),
        (
            8.0,
            {"diameter_um": 10.4, "shape": "disc"},
            r"8 µm is finer than what was measured, cells of 10\.4 µm; give --at 11 or more",
        ),
    ],
)
def test_what_was_not_measured_at_this_size_is_refused_with_the_numbers(
    pairs: list[tuple[Section, Spots]], side_um: float, change: dict[str, object], message: str
) -> None:
    _, units = pairs[0]
    with pytest.raises(ExpressionError, match=message):
        pool_units(replace(units, **change), side_um)


def test_bins_with_few_counts_are_left_out_and_too_many_of_them_refused_with_a_size_that_works() -> None:
    section, units = make_fine("A", 1, depth=3.0)
    with pytest.raises(
        HistosgeError, match=r"at 8 µm: A: \d+ of 2928 bins have fewer than 10 .*give --at 16"
    ):
        fine_of([(section, units)], 8.0)
    pooled = fine_of([(section, units)], 16.0)
    (facts,) = pooled.facts.sections
    assert 0 < facts.n_few < facts.n_bins / 2
    assert np.asarray(pooled.sections["A"].spots.counts.sum(axis=1)).min() >= 10


def test_a_map_that_cannot_show_such_bins_is_refused(pairs: list[tuple[Section, Spots]]) -> None:
    section, units = pairs[0]
    coarse = replace(section.patches, stride_um=56.0, patch_um=112.0)
    with pytest.raises(HistosgeError, match="one value every 56 µm can show; give --at 14 or more"):
        FineBins.from_sections([(section, [coarse], units)], 8.0, 55.0)


def test_a_section_without_fine_bins_is_named_and_the_others_are_scored(
    pairs: list[tuple[Section, Spots]],
) -> None:
    (first, _), (second, bins), _ = pairs
    found = FineBins.from_sections(
        [(first, [first.patches], first.spots), (second, [second.patches], bins)], 8.0, 55.0
    )
    assert list(found.sections) == ["B"]
    assert "A: 8 µm is finer than what was measured, spots of 55 µm" in found.facts.notes[0]


def test_of_very_many_bins_whole_squares_as_wide_as_a_spot_are_drawn(
    pairs: list[tuple[Section, Spots]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fine_bins, "MOST_BINS", 700)
    section, units = pairs[0]
    drawn = fine_of([(section, units)], 8.0).sections["A"]
    assert 600 < len(drawn.spots) <= 700
    assert drawn.facts.n_scored == len(drawn.spots)
    all_squares, n = np.unique(np.floor(units.xy_um / 55), axis=0, return_counts=True)
    mine, kept = np.unique(np.floor(drawn.spots.xy_um / 55), axis=0, return_counts=True)
    size = {tuple(square): count for square, count in zip(all_squares, n, strict=True)}
    assert kept.tolist() == [size[tuple(square)] for square in mine]
    assert drawn.touched.shape == (len(drawn.spots), len(section.spots))


def test_visium_hd_on_disk_is_the_truth_of_models_trained_on_visium(tmp_path: Path) -> None:
    spec = SyntheticSpec(
        size_px=(808, 760), genes=GeneCounts(8, 3, 2, 3), spot_diameter_um=41.0, spot_pitch_um=59.0
    )
    cohort = make_cohort(tmp_path, spec, 2)
    truth = load_truth(cohort.sections[1].truth)
    _, counts, _ = write_hd(tmp_path / "hd", truth, spec.mpp, counts_per_bin=60.0)
    sheet = cohort.sheet.with_name("mixed.csv")
    sheet.write_text(cohort.sheet.read_text().replace("S2.h5ad", "hd"))
    embed(str(sheet), str(tmp_path / "store"), EmbedSettings(("colour",), GridSpec(0.5, 112, 32)))
    settings = histosge.EvaluateSettings("section", ("ridge",), genes="all", at_um=8.0)
    report, said = tmp_path / "report", []
    scores = histosge.evaluate(sheet, tmp_path / "store", report, settings, on_message=said.append)
    total = np.asarray(counts.sum(axis=1)).ravel()
    assert scores.bins is not None
    (facts,) = scores.bins.sections
    assert (facts.slide_id, facts.n_bins, facts.n_few) == ("S2", len(total), 0)
    assert facts.n_scored == len(total) - facts.n_uncovered > 0.9 * len(total)
    assert facts.median_counts == pytest.approx(np.median(total), rel=0.05)
    median = facts.median_counts
    line = f"S2: {facts.n_scored} of {facts.n_scored} bins of 8 µm scored, median {median:g} counts; 0 with too few"
    assert line in " ".join(said)
    rows = pl.read_csv(report / "scores.csv")
    assert rows.columns == ["preset", "split", "fold", "seed", "metric", "value", "encoder"]
    mine = rows.filter((pl.col("metric") == "pearson_mean_at_8um") & (pl.col("preset") == "ridge"))
    assert mine["fold"].to_list() == ["S2"]
    assert mine["value"].item() > 0.05
    page = (report / "report.html").read_text()
    for text in (
        "bins of 8 µm",
        f"with a median of {median:.0f} counts",
        "one value every 16 µm, from patches of 56 µm",
    ):
        assert text in page
    # The same again is read back, with what is known of the bins.
    again = histosge.evaluate(sheet, tmp_path / "store", report, settings)
    assert again.was_there
    assert again.bins == scores.bins
    for side in (0.0, -8.0, float("nan"), 1e6):
        with pytest.raises(HistosgeError, match="give --at a side of 1 to 500 µm"):
            replace(settings, at_um=side).check()
    with pytest.raises(HistosgeError, match="protocol hest has no maps to score at 8 µm"):
        replace(settings, protocol="hest").check()
