"""Patches of a small synthetic cohort, read again in other ways, and the ablation that needs them."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.slides.open_slide import open_slide
from featurestore.slides.sample_sheet import read_samples
from histosge.data.section_loading import LoadedSection, Selection, load_sections
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.reencoding import CROP_PX, Reencoder

SPEC = SyntheticSpec(size_px=(2200, 2000), genes=GeneCounts(8, 4, 4, 4))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("cohort")
    sheet, store = str(make_cohort(folder, SPEC, 2).sheet), str(folder / "store")
    grid = GridSpec(mpp=0.5, patch_px=112, stride_px=112)
    embed(sheet, store, EmbedSettings(spec=grid, encoders=("colour",)))
    return sheet, store


@pytest.fixture(scope="module")
def loaded(cohort: tuple[str, str]) -> list[LoadedSection]:
    return load_sections(*cohort, Selection())


@pytest.fixture(scope="module")
def reencoder(cohort: tuple[str, str], loaded: list[LoadedSection]) -> Reencoder:
    made = Reencoder.for_sections(read_samples(cohort[0]), loaded)
    assert made is not None
    return made


def under(item: LoadedSection) -> np.ndarray:
    return np.flatnonzero(np.asarray(item.section.overlap.sum(axis=0)).ravel() > 0)


def test_read_as_the_store_reads_them_patches_get_the_stores_vectors(
    reencoder: Reencoder, loaded: list[LoadedSection]
) -> None:
    (same, _) = reencoder([item.section for item in loaded], frozenset())
    np.testing.assert_allclose(same.patches.embedding, loaded[0].section.patches.embedding, rtol=2e-3)


def test_red_and_blue_change_places_and_nothing_else(
    reencoder: Reencoder, loaded: list[LoadedSection]
) -> None:
    # `colour` is mean and spread of R, G and B, so the swap can be seen in its numbers.
    section = loaded[0].section
    (swapped, _) = reencoder([item.section for item in loaded], frozenset(["bgr"]))
    where = under(loaded[0])
    was, now = section.patches.embedding[where], swapped.patches.embedding[where]
    np.testing.assert_allclose(now, was[:, [2, 1, 0, 5, 4, 3]], rtol=2e-3)
    elsewhere = np.setdiff1d(np.arange(len(section.patches)), where)
    np.testing.assert_array_equal(swapped.patches.embedding[elsewhere], section.patches.embedding[elsewhere])


def test_a_fixed_crop_is_fifty_pixels_around_the_patch(
    cohort: tuple[str, str], reencoder: Reencoder, loaded: list[LoadedSection]
) -> None:
    item = loaded[0]
    (cropped, _) = reencoder([i.section for i in loaded], frozenset(["fixed_pixel_crop"]))
    patch = int(under(item)[7])
    slide = open_slide(read_samples(cohort[0])[0].slide)
    x_um, y_um = item.section.patches.xy_um[patch]
    x, y = (round(at / slide.mpp - CROP_PX / 2) for at in (x_um, y_um))
    mean = slide.read_region(x, y, CROP_PX, CROP_PX, slide.mpp).mean(axis=(0, 1))
    slide.close()
    found = cropped.patches.embedding[patch, :3]
    np.testing.assert_allclose(found, mean / 255, rtol=0.02)


def test_without_the_slide_or_its_encoder_nothing_can_be_encoded_anew(
    cohort: tuple[str, str], loaded: list[LoadedSection], tmp_path: Path
) -> None:
    samples = read_samples(cohort[0])
    gone = [replace(sample, slide=str(tmp_path / "gone.tif")) for sample in samples]
    assert Reencoder.for_sections(gone, loaded) is None
    identity = replace(loaded[0].slide.identity, facts={"another": "version"})
    other = [replace(item, slide=replace(item.slide, identity=identity)) for item in loaded]
    assert Reencoder.for_sections(samples, other) is None


def test_an_ablation_from_the_sheet_reads_the_slides(cohort: tuple[str, str], tmp_path: Path) -> None:
    settings = EvaluateSettings(presets=("paper+bgr", "paper+spots"), genes=5, epochs=1)
    scores = evaluate(*cohort, tmp_path, settings)
    assert scores.presets == ("paper+bgr", "paper+spots")
    assert scores.split == "block"
    assert scores.mean("paper+bgr", "pearson_mean") != scores.mean("paper+spots", "pearson_mean")


@pytest.mark.slow
def test_the_command_prints_the_ablation_and_says_what_is_no_held_out_figure(
    cohort: tuple[str, str], tmp_path: Path, command: Callable[..., Any]
) -> None:
    ran = command(
        "evaluate", *cohort, tmp_path, "--presets", "paper", "--ablate", "--epochs", 1, "--genes", 5
    )
    assert ran.returncode == 0
    assert "paper+file_order_groups" in ran.stdout
    assert "paper_all_spots" in ran.stdout
    rows = pl.read_csv(tmp_path / "scores.csv")
    assert rows["split"].unique().to_list() == ["random"]
    assert {"paper", "paper+spots", "paper+all", "noise"} <= set(rows["preset"])


@pytest.fixture
def command() -> Callable[..., Any]:
    def run(*arguments: object) -> Any:
        told = [sys.executable, "-m", "histosge_cli", *map(str, arguments)]
        return subprocess.run(told, capture_output=True, text=True, check=False)

    return run
