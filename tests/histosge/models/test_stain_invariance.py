"""A model trained with stain pairs follows tissue, not stain, and nothing else about it changes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import read_samples
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import Patches, StainPairs, TrainingSection
from histosge.data.spot_overlap import disc_overlap
from histosge.errors import ModelError
from histosge.models.dense import DenseModel
from histosge.models.ridge_sums import RidgeSolver, RidgeSums
from histosge.models.stain_invariance import STRENGTH, stain_covariance
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.saved_model import load_model
from histosge.training.stain_augmentation import PATCHES, STAINS, Stain, augment_stains
from histosge.training.train import TrainSettings, train

TISSUE = np.array([[[200, 120, 170], [120, 80, 160]], [[230, 160, 200], [90, 60, 130]]], np.uint8)


def test_the_same_stain_gives_the_same_pixels_and_stronger_dyes_let_less_light_through() -> None:
    same = Stain((1.0, 1.0)).apply(TISSUE)
    assert np.abs(same.astype(int) - TISSUE).max() <= 1
    assert (Stain((1.3, 1.3)).apply(TISSUE) < TISSUE).all()
    assert (Stain((0.7, 0.7)).apply(TISSUE) > TISSUE).all()
    # Eosin absorbs green, haematoxylin red as well.
    eosin = Stain((1.0, 1.5)).apply(TISSUE).astype(int) - TISSUE
    haematoxylin = Stain((1.5, 1.0)).apply(TISSUE).astype(int) - TISSUE
    assert (eosin[..., 1] < eosin[..., 0]).all()
    assert haematoxylin[..., 0].mean() < eosin[..., 0].mean()


def test_the_penalty_is_what_training_on_every_patch_in_every_stain_comes_to() -> None:
    rng = np.random.default_rng(1)
    X, Y = rng.standard_normal((90, 6)) @ rng.standard_normal((6, 6)), rng.standard_normal((90, 2))
    shifts = np.concatenate([rows := rng.standard_normal((20, 6)) * np.arange(6), -rows])
    noisy = RidgeSums.from_rows(X, Y).with_input_noise(shifts.T @ shifts / len(shifts))
    copies = RidgeSums.from_rows((X[:, None] + shifts).reshape(-1, 6), np.repeat(Y, len(shifts), axis=0))
    np.testing.assert_allclose(
        RidgeSolver.from_sums(noisy).solve(1e-9).weight,
        RidgeSolver.from_sums(copies).solve(1e-9).weight,
        atol=1e-7,
    )


def _section(seed: int, side: int = 13) -> TrainingSection:
    """Feature 0 of the embedding follows the tissue; feature 1 follows it more closely, but the stain as well."""
    rng = np.random.default_rng(seed)
    rows, cols = (a.ravel() for a in np.mgrid[:side, :side])
    tissue = rng.standard_normal(side * side)
    noise = rng.standard_normal((side * side, 3))
    embedding = np.column_stack([tissue + 0.6 * noise[:, 0], tissue + 0.3 * noise[:, 1], noise[:, 2]])
    patches = Patches(f"S{seed}", rows, cols, embedding.astype(np.float32), 100.0, 100.0)
    target = 5 + tissue[:, None] * np.ones(6) + 0.3 * rng.standard_normal((side * side, 6))
    library = np.exp(8 + 0.3 * tissue)
    overlap = disc_overlap(patches.xy_um, 55.0, patches)
    return TrainingSection(patches, overlap, patches.xy_um, target.astype(np.float32), library)


def _with_stain_pairs(section: TrainingSection) -> TrainingSection:
    plain = section.patches.embedding[:30]
    stained = np.stack([plain + np.float32([0, shift, 0]) for shift in (-2, -1, 1, 2)])
    return replace(section, stain_pairs=StainPairs(plain, stained))


def test_a_penalised_model_changes_less_with_the_stain_and_still_predicts() -> None:
    sections, unseen = [_section(seed) for seed in range(3)], _section(9)
    pink = unseen.patches.with_embedding(unseen.patches.embedding + np.float32([0, 1.5, 0]))
    change, pearson, depth_change = {}, {}, {}
    every = np.arange(len(pink))
    for name, training in (("plain", sections), ("penalised", [_with_stain_pairs(s) for s in sections])):
        model = DenseModel.fit(training)
        assert model.stain_penalty == (STRENGTH if name == "penalised" else 0)
        before, depth = model.predict_with_depth(unseen.patches, every)
        after, other_depth = model.predict_with_depth(pink, every)
        assert depth is not None
        assert other_depth is not None
        change[name] = float(np.abs(after - before).mean())
        depth_change[name] = float(np.abs(other_depth - depth).mean())
        pearson[name] = float(np.corrcoef(before[:, 0], unseen.target[:, 0])[0, 1])
    assert change["penalised"] < 0.3 * change["plain"]
    assert depth_change["penalised"] < 0.3 * depth_change["plain"]
    assert pearson["penalised"] > 0.7
    again = DenseModel.from_state(model.config(), model.state())
    np.testing.assert_array_equal(again.predict(pink), model.predict(pink))
    assert again.stain_penalty == STRENGTH


def test_the_means_around_a_patch_shift_as_the_whole_slide_does() -> None:
    section = _with_stain_pairs(_section(1))
    for own in (True, False):
        covariance = stain_covariance([section], own=own, strength=1.0)
        assert covariance is not None
        np.testing.assert_allclose(np.sqrt(np.diag(covariance)), [0, np.sqrt(2.5), 0], atol=1e-3)
    # What differs between patches is gone from the mean over a neighbourhood.
    assert section.stain_pairs is not None
    stained = section.stain_pairs.stained.copy()
    stained[:, ::2, 2] += 5
    stained[:, 1::2, 2] -= 5
    mixed = replace(section, stain_pairs=replace(section.stain_pairs, stained=stained))
    own, around = (stain_covariance([mixed], own=own, strength=1.0) for own in (True, False))
    assert own is not None
    assert around is not None
    assert own[2, 2] == pytest.approx(25, rel=0.01)
    assert around[2, 2] == pytest.approx(0, abs=1e-3)
    assert stain_covariance([_section(1)], own=True) is None
    assert section.subset(np.arange(len(section.target)) < 5).stain_pairs is section.stain_pairs


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    folder = tmp_path_factory.mktemp("stains")
    spec = SyntheticSpec(
        (1208, 1128), mpp=0.5, genes=GeneCounts(4, 3, 2, 2), spot_diameter_um=41, spot_pitch_um=59
    )
    sheet, store = str(make_cohort(folder / "data", spec, 2).sheet), str(folder / "store")
    embed(sheet, store, EmbedSettings(encoders=("colour",), spec=GridSpec(1.0, 48, 48)))
    return folder, sheet, store


def test_training_measures_stains_on_some_patches_of_each_slide(made: tuple[Path, str, str]) -> None:
    folder, sheet, store = made
    loaded = load_sections(sheet, store, Selection())
    genes = loaded[0].section.spots.genes
    plain = [training_section(item.section, genes) for item in loaded]
    one, other = (augment_stains(read_samples(sheet), loaded, plain, 3) for _ in range(2))
    for section, same in zip(one, other, strict=True):
        assert section.stain_pairs is not None
        assert same.stain_pairs is not None
        assert section.stain_pairs.stained.shape == (STAINS, PATCHES, section.patches.embedding.shape[1])
        np.testing.assert_array_equal(section.stain_pairs.stained, same.stain_pairs.stained)
        away = np.abs(section.stain_pairs.stained - section.stain_pairs.plain).mean()
        assert away > 0.05 * section.stain_pairs.plain.std()
    said: list[str] = []
    train(sheet, store, folder / "model", TrainSettings(genes=5, stains=True), on_message=said.append)
    assert load_model(folder / "model").model.config()["stain_penalty"] == STRENGTH
    assert any("other stains" in line for line in said)


def test_stains_are_refused_where_they_cannot_be_measured(
    made: tuple[Path, str, str], tmp_path: Path
) -> None:
    _, sheet, store = made
    with pytest.raises(ModelError, match="leave --stains out"):
        train(sheet, store, tmp_path / "m", TrainSettings(preset="ridge", genes=5, stains=True))
    broken, data = tmp_path / "broken.tif", Path(sheet).parent
    broken.write_text("no slide")
    head, *lines = (line.split(",") for line in Path(sheet).read_text().splitlines())
    for line in lines:
        line[head.index("slide")] = str(broken)
        line[head.index("expression")] = str(data / line[head.index("expression")])
    other = tmp_path / "other.csv"
    other.write_text("\n".join(",".join(line) for line in (head, *lines)) + "\n")
    with pytest.raises(ModelError, match=r"broken\.tif.*leave --stains out"):
        train(str(other), store, tmp_path / "m", TrainSettings(genes=5, stains=True))
    assert not (tmp_path / "m").exists()


def test_a_slide_that_is_not_the_embedded_one_is_refused(made: tuple[Path, str, str], tmp_path: Path) -> None:
    _, sheet, store = made
    rows = [line.split(",") for line in Path(sheet).read_text().splitlines()]
    head, data = rows[0], Path(sheet).parent
    slide, expression = head.index("slide"), head.index("expression")
    slides = [str(data / row[slide]) for row in rows[1:]]
    for row, other in zip(rows[1:], reversed(slides), strict=True):
        row[slide], row[expression] = other, str(data / row[expression])
    swapped = tmp_path / "swapped.csv"
    swapped.write_text("\n".join(",".join(row) for row in rows) + "\n")
    with pytest.raises(ModelError, match="not the slide that was embedded"):
        train(str(swapped), store, tmp_path / "m", TrainSettings(genes=5, stains=True))
