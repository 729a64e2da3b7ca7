"""Each preset on each encoder, on the same held-out spots."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.section_loading import Selection, load_sections
from histosge.evaluation.encoder_comparison import keep_common_spots
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.evaluation.results import CONTROLS, Scores
from histosge.heldout.leakage import select_spots
from histosge.synthetic import SyntheticSpec, make_section

GRID = GridSpec(mpp=1.0, patch_px=112, stride_px=112)
ENCODERS = ("colour", "morphology")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("encoders")
    section = make_section(folder / "data", SyntheticSpec(size_px=(2800, 2600), spot_pitch_um=80.0))
    sheet, store = folder / "sheet.csv", folder / "store"
    sheet.write_text(f"slide_id,slide,expression\nA,{section.slide},{section.expression}\n")
    embed(str(sheet), str(store), EmbedSettings(ENCODERS, GRID))
    return str(sheet), str(store)


SETTINGS = {"presets": ("mean", "ridge"), "genes": 7}


@pytest.fixture(scope="module")
def both(made: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Scores, Path]:
    """Evaluate both encoders together: the scores, and the folder of the report."""
    folder = tmp_path_factory.mktemp("both")
    return evaluate(*made, folder, EvaluateSettings(encoders=ENCODERS, **SETTINGS)), folder


@pytest.mark.parametrize("encoder", ["colour", pytest.param("morphology", marks=pytest.mark.slow)])
def test_every_preset_is_scored_on_every_encoder_as_it_is_alone(
    made: tuple[str, str], both: tuple[Scores, Path], tmp_path: Path, encoder: str
) -> None:
    together, folder = both
    assert together.presets == (
        "mean on colour",
        "ridge on colour",
        "mean on morphology",
        "ridge on morphology",
    )
    scores = pl.read_csv(folder / "scores.csv")
    assert scores.columns == ["preset", "split", "fold", "seed", "metric", "value", "encoder"]
    assert set(scores["preset"]) == {"mean", "ridge", *CONTROLS}
    alone = evaluate(*made, tmp_path, EvaluateSettings(selection=Selection(None, encoder), **SETTINGS))
    for name in ("scores.csv", "genes.csv"):
        mine = pl.read_csv(folder / name).filter(pl.col("encoder") == encoder)
        assert mine.equals(pl.read_csv(tmp_path / name))
    assert together.mean(f"ridge on {encoder}", "pearson_mean") == alone.mean("ridge", "pearson_mean")
    assert f"encoder {encoder}" in (tmp_path / "report.html").read_text()
    assert together.mean("ridge on colour", "pearson_mean") != together.mean(
        "ridge on morphology", "pearson_mean"
    )


def test_differences_between_encoders_are_paired_and_in_the_report(
    both: tuple[Scores, Path],
) -> None:
    together, folder = both
    rows = pl.read_csv(folder / "differences.csv").filter(
        (pl.col("metric") == "pearson_mean")
        & (pl.col("preset_a") == "ridge")
        & (pl.col("preset_b") == "ridge")
    )
    assert len(rows) == 1
    row = rows.row(0, named=True)
    assert (row["preset_a"], row["preset_b"]) == ("ridge", "ridge")
    assert {row["encoder_a"], row["encoder_b"]} == set(ENCODERS)
    gap = together.mean(f"ridge on {row['encoder_a']}", "pearson_mean") - together.mean(
        f"ridge on {row['encoder_b']}", "pearson_mean"
    )
    assert row["difference"] == pytest.approx(gap, abs=1e-5)
    assert row["low"] < row["difference"] < row["high"]
    page = (folder / "report.html").read_text()
    assert "ridge on colour - ridge on morphology" in page
    assert "encoders colour, morphology" in page
    assert "0.0" in page.split("Noise control: ")[1].split("(morphology)")[0]


def test_encoders_are_compared_on_the_spots_that_all_of_them_cover(made: tuple[str, str]) -> None:
    loaded = {key: load_sections(*made, Selection(None, key)) for key in ENCODERS}
    (item,) = loaded["colour"]
    keep = np.arange(len(item.section.spots)) % 3 > 0
    loaded["colour"] = [replace(item, section=select_spots(item.section, keep))]
    common = keep_common_spots(loaded)
    barcodes = [common[key][0].section.spots.barcodes.tolist() for key in ENCODERS]
    assert barcodes[0] == barcodes[1] == item.section.spots.barcodes[keep].tolist()
