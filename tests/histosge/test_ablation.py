from dataclasses import replace

import numpy as np
import polars as pl
import pytest
from scipy import sparse

from histosge.ablation import METRICS, ablate, score_variant
from histosge.errors import HistosgeError
from histosge.models.paper import PaperModel, PaperSwitches, lattice_position
from histosge.protocol_hest import score_hest
from histosge.report_blocks import ablation_block, hest_blocks
from histosge.scoring import evaluate_sections
from histosge.sections import Patches, Section, Spots, TrainingSection
from histosge.tasks import Plan

SIDE, DIM, GENES, STEP_UM = 11, 7, 13, 53.0


def make_section(slide_id: str, seed: int, donor: str = "d1", signal: float = 1.0) -> Section:
    rng = np.random.default_rng(seed)
    rows, cols = (index.ravel() for index in np.indices((SIDE, SIDE)))
    embedding = rng.standard_normal((rows.size, DIM)).astype(np.float32)
    patches = Patches(slide_id, rows, cols, embedding, STEP_UM, STEP_UM)
    weights = np.random.default_rng(101).standard_normal((DIM, GENES)) * signal
    rates = np.exp(embedding @ weights / np.sqrt(DIM))
    depth = rng.lognormal(7, 0.6, rows.size)
    counts = rng.poisson(rates / rates.sum(axis=1, keepdims=True) * depth[:, None]).astype(np.float32)
    names = tuple(f"G{i}" for i in range(GENES))
    barcodes = np.array([f"b{i}" for i in range(rows.size)])
    spots = Spots(slide_id, donor, barcodes, patches.xy_um, 43.0, sparse.csr_matrix(counts), names)
    overlap = sparse.eye(rows.size, format="csr", dtype=np.float32)
    return Section(patches, spots, overlap, np.full((SIDE, SIDE, 3), 181, np.uint8))


def training(section: Section) -> TrainingSection:
    target = np.log1p(section.spots.counts.toarray()).astype(np.float32)
    return TrainingSection(section.patches, section.overlap, section.spots.xy_um, target)


def test_an_ablation_has_a_row_for_paper_each_switch_and_all() -> None:
    sections = [make_section("A", 1)]
    swapped = [
        replace(s, patches=s.patches.with_embedding(s.patches.embedding[:, ::-1].copy())) for s in sections
    ]
    encoded = {frozenset(): sections, frozenset({"bgr"}): swapped}
    found = ablate(
        encoded, split="random", genes=7, seeds=[0], epochs=1, left_out=["fixed_pixel_crop: no slide"]
    )
    assert found.variants == (
        "paper",
        "paper+file_order_groups",
        "paper+integer_coordinates",
        "paper+bgr",
        "paper+hvg_before_split",
        "paper+all_spots_metric",
        "paper+all",
    )
    assert len(found.scores) == len(found.variants) * len(METRICS)
    assert found.mean("paper", "as_reported") == found.mean("paper", "pearson_mean")
    assert found.mean("paper+all_spots_metric", "as_reported") == found.mean("paper", "paper_all_spots")
    assert found.mean("paper+bgr", "pearson_mean") != found.mean("paper", "pearson_mean")
    block = ablation_block(found)
    assert "Left out: fixed_pixel_crop: no slide" in block.points
    assert [row[0] for row in block.tables[0].rows] == list(found.variants)


@pytest.mark.slow
def test_the_all_spots_figure_rewards_memory_of_noise_and_the_held_out_one_does_not() -> None:
    sections = [make_section(name, seed, signal=0.0) for name, seed in (("A", 1), ("B", 2))]
    (task,) = Plan.of(sections, "random", GENES).tasks([0])
    held_out, all_spots = score_variant(task, PaperSwitches(), epochs=150)
    assert all_spots > 0.3
    assert abs(held_out) < 0.15


def test_groups_in_file_order_depend_on_the_order_and_spatial_ones_do_not() -> None:
    section = training(make_section("A", 1))
    order = np.random.default_rng(0).permutation(SIDE * SIDE)
    patches = section.patches
    shuffled = replace(
        patches, rows=patches.rows[order], cols=patches.cols[order], embedding=patches.embedding[order]
    )
    for on in (False, True):
        model = PaperModel.fit([section], epochs=2, switches=PaperSwitches(file_order_groups=on))
        same = np.allclose(model.predict(patches)[order], model.predict(shuffled), atol=1e-4)
        assert same is not on


def test_integer_coordinates_collapse_half_steps_and_continuous_ones_do_not() -> None:
    xy_um = np.array([[200.0, 100.0], [230.0, 100.0]])
    whole, between = (lattice_position(xy_um, 100.0, whole=w) for w in (True, False))
    assert (whole[0] == whole[1]).all()
    np.testing.assert_allclose(between, [[1, 2], [1, 2.3]])


def test_switches_survive_saving_and_older_models_had_whole_positions() -> None:
    model = PaperModel.fit([training(make_section("A", 1))], epochs=1, switches=PaperSwitches(True, False))
    assert PaperModel.from_state(model.config(), model.state()).switches == PaperSwitches(True, False)
    older = {key: value for key, value in model.config().items() if key != "switches"}
    assert PaperModel.from_state(older, model.state()).switches == PaperSwitches(False, True)


def test_the_depth_oracle_earns_from_depth_and_nothing_once_it_is_taken_out() -> None:
    sections = [make_section("A", 1), make_section("B", 2)]
    for section in sections:
        # Rates that follow depth: what an oracle of library size can see.
        counts = section.spots.counts.toarray()
        size = counts.sum(axis=1)
        counts[:, 0] = (size / 500) ** 2
        section.spots.counts[:, :] = sparse.csr_matrix(counts)
    scores = evaluate_sections(sections, ["depth", "ridge"], split="section", genes=["G0"], seeds=[0])
    assert scores.mean("depth", "pearson_mean") > 0.8
    assert abs(scores.mean("depth", "pearson_depth_adjusted")) < 1e-6
    assert any("depth is an oracle" in note for note in scores.notes)
    assert scores.default_preset == "ridge"


def test_presets_that_need_positions_are_left_out_where_whole_sections_are_held_out() -> None:
    sections = [make_section("A", 1), make_section("B", 2)]
    by_section = evaluate_sections(sections, ["knn", "ridge"], split="section", genes=5, seeds=[0])
    assert by_section.presets == ("ridge",)
    assert any(note.startswith("knn only knows slides") for note in by_section.notes)
    within = evaluate_sections(sections, ["knn", "ridge"], split="random", genes=5, seeds=[0])
    assert within.presets == ("knn", "ridge")
    assert set(within.scores["metric"]) >= {"ssim", "moran_measured", "moran_predicted", "n_constant", "r2"}


def test_the_hest_protocol_finds_a_signal_and_holds_donors_out_whole() -> None:
    sections = [make_section(name, i, f"d{i % 2}") for i, name in enumerate("ABC")]
    found = score_hest(sections, draws=3)
    assert found.split == "donor"
    assert found.values("hest", "pearson_mean").mean() > 0.2
    assert abs(found.values("hest_noise", "pearson_mean_depth_normalised").mean()) < 0.15
    assert found.scores.columns == ["preset", "split", "fold", "seed", "metric", "value"]
    assert found.scores.filter(pl.col("preset") == "hest")["fold"].n_unique() == 2
    assert "without intercept" in " ".join(hest_blocks(found)[1].points)


def test_the_ablation_of_a_lone_encoding_needs_the_stored_one() -> None:
    with pytest.raises(HistosgeError, match="as they are stored"):
        ablate({frozenset({"bgr"}): []}, split="random", genes=5, seeds=[0])
