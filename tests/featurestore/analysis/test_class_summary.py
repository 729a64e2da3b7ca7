"""Means of annotated classes against numpy on the patches that shapely finds in them."""

import json
from pathlib import Path

import numpy as np
import pytest
import shapely
from make_slides import tissue_like, write_pyramid
from PIL import Image
from typer.testing import CliRunner

from featurestore.analysis.class_summary import annotation_files, summarise_classes
from featurestore.analysis.patch_stream import open_stream
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import MaskError
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge_cli.main import app

SPEC = GridSpec(0.5, 64, 32)
WIDTH, HEIGHT = 733, 611
AREAS = {
    "Tumor": [[100, 90], [420, 130], [390, 470], [130, 400], [100, 90]],
    "Stroma": [[300, 300], [700, 320], [690, 600], [310, 580], [300, 300]],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    (folder / "slides").mkdir()
    for number, name in enumerate(("A", "B", "C")):
        image = tissue_like(WIDTH, HEIGHT, 0.5, number)
        write_pyramid(folder / "slides" / f"{name}.tif", image, 0.5, levels=1)
    embed(folder / "slides", folder / "store", EmbedSettings(("colour",), SPEC, tissue="none"))
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name}},
        }
        for name, ring in AREAS.items()
    ]
    masks = folder / "masks"
    masks.mkdir()
    (masks / "A.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (masks / "B.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features[:1]}))
    return folder / "store"


def truth(store: Path, slide_id: str, name: str) -> np.ndarray:
    opened = Store.open(store)
    grid, array = opened.grid(slide_id, SPEC.key).grid, opened.embedding(slide_id, SPEC.key, "colour")
    values = np.full((grid.n_rows, grid.n_cols, array.shape[2]), np.nan)
    for block in opened.grid(slide_id, SPEC.key).planned(array.block_shape):
        values[block.slices] = array.read_block(block)
    area = shapely.Polygon(AREAS[name])
    inside = [
        values[r, c]
        for r in range(grid.n_rows)
        for c in range(grid.n_cols)
        if shapely.box(c * 32, r * 32, c * 32 + 64, r * 32 + 64).intersection(area).area >= 0.5 * 64**2
    ]
    return np.array(inside)


def test_means_are_those_of_the_patches_that_a_class_covers_by_half(store: Path) -> None:
    stream = open_stream(store)
    files = annotation_files(str(store.parent / "masks"), stream.names)
    frame = summarise_classes(stream, files, lambda slide_id: (WIDTH, HEIGHT))
    rows = frame.to_dicts()
    assert [(row["slide"], row["class"]) for row in rows] == [
        ("A", "Stroma"),
        ("A", "Tumor"),
        ("B", "Tumor"),
        (None, "Stroma"),
        (None, "Tumor"),
    ]
    for row in rows[:3]:
        expected = truth(store, row["slide"], row["class"])
        # A patch that a class covers by 49 or 51 % may fall on either side of the drawing.
        assert row["patches"] == pytest.approx(len(expected), abs=3)
        np.testing.assert_allclose(row["mean"], expected.mean(axis=0), atol=0.02)
        np.testing.assert_allclose(row["sd"], expected.std(axis=0, ddof=1), atol=0.02)
    assert rows[4]["patches"] == rows[1]["patches"] + rows[2]["patches"]


def test_the_command_takes_a_folder_a_sheet_or_one_file(store: Path, tmp_path: Path) -> None:
    def run(*arguments: object) -> list[dict[str, object]]:
        result = CliRunner().invoke(app, ["analyse", str(store), "summary", "--json", *map(str, arguments)])
        assert result.exit_code == 0, result.output
        return list(json.loads(result.stdout[result.stdout.index("[") :]))

    masks = store.parent / "masks"
    of_folder = run("--annotations", masks, "--quiet")
    sheet = tmp_path / "sheet.csv"
    lines = [f"{name},{store.parent}/slides/{name}.tif,{masks}/{name}.geojson" for name in "AB"]
    sheet.write_text("slide_id,slide,mask\n" + "\n".join(lines) + "\n")
    assert run("--annotations", sheet, "--quiet") == of_folder
    one = run("--annotations", masks / "B.geojson", "--slide", "B")
    assert [row["class"] for row in one] == ["Tumor", "Tumor"]
    assert one[0]["patches"] == of_folder[2]["patches"]


def test_a_picture_is_read_by_its_values(store: Path, tmp_path: Path) -> None:
    values = np.zeros((HEIGHT // 4, WIDTH // 4), np.uint8)
    values[20:100, 20:80] = 3
    Image.fromarray(values).save(tmp_path / "A.png")
    stream = open_stream(store, ["A"])
    frame = summarise_classes(stream, {"A": str(tmp_path / "A.png")}, lambda slide_id: (WIDTH, HEIGHT))
    assert frame["class"].to_list() == ["3", "3"]
    assert frame["patches"][0] == pytest.approx(80 * 60 * 16 / 32**2, rel=0.2)
    with pytest.raises(MaskError, match="maps do not know the size of their slide"):
        summarise_classes(stream, {"A": str(tmp_path / "A.png")}, lambda slide_id: None)


def test_annotations_that_fit_no_slide_are_one_line(store: Path, tmp_path: Path) -> None:
    masks = store.parent / "masks"
    with pytest.raises(MaskError, match="is one file, and the store has 3 slides; name one with --slide"):
        annotation_files(str(masks / "A.geojson"), ["A", "B", "C"])
    with pytest.raises(MaskError, match="has no file for any of the 1 slides, such as Z"):
        annotation_files(str(masks), ["Z"])
    with pytest.raises(MaskError, match=r"--annotations .* is no folder"):
        annotation_files(str(tmp_path / "absent"), ["A"])
