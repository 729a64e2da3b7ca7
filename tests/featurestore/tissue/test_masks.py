"""Masks and annotations as tissue: what is read, what is recorded, what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import shapely
import tifffile
from make_slides import tissue_like, write_pyramid
from PIL import Image

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import IdentityMismatchError, MaskError, SlideWarning, TissueError
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.storage.store import Store
from featurestore.tissue.annotation import Frame
from featurestore.tissue.annotation_file import masks_by_slide, read_annotation
from featurestore.tissue.label_picture import LabelPicture
from featurestore.tissue.outlines import read_outlines
from featurestore.tissue.polygon_raster import fill_crossing_rings, fill_rings
from featurestore.tissue.region import Region, TissueRequest
from featurestore.tissue.survey import Survey, survey
from featurestore.tissue.threshold import is_tissue

MPP = 2.0
WIDTH, HEIGHT = 733, 557
SPEC = GridSpec(MPP, 32, 32)
CENTRE, HALF_AXES = (0.45 * WIDTH, 0.55 * HEIGHT), (0.3 * WIDTH, 0.3 * HEIGHT)
"""The ellipse of tissue on the slide, level-0 pixels."""


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    return write_pyramid(folder / "A.tif", tissue_like(WIDTH, HEIGHT, MPP), MPP, levels=1)


@pytest.fixture(scope="module")
def slide(slide_file: Path) -> Slide:
    return open_slide(str(slide_file))


@pytest.fixture(scope="module")
def grid(slide: Slide) -> PatchGrid:
    return PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, SPEC)


def ellipse(scale: float = 1.0) -> list[list[float]]:
    turn = np.linspace(0, 2 * np.pi, 73)
    corners = np.column_stack(
        [CENTRE[0] + HALF_AXES[0] * np.cos(turn), CENTRE[1] + HALF_AXES[1] * np.sin(turn)]
    )
    return (corners * scale).tolist()


def square(x: float, y: float, side: float) -> list[list[float]]:
    return [[x, y], [x + side, y], [x + side, y + side], [x, y + side], [x, y]]


def feature(rings: list[list[list[float]]], name: str | None = None, **about: object) -> dict[str, object]:
    """A feature as QuPath 0.5 writes it."""
    named = {"classification": {"name": name, "color": [200, 0, 0]}} if name else {}
    return {
        "type": "Feature",
        "id": "0f2b",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {"objectType": "annotation", **named, **about},
    }


def write_json(path: Path, document: object) -> str:
    path.write_text(json.dumps(document))
    return str(path)


def collection(*features: dict[str, object]) -> dict[str, object]:
    return {"type": "FeatureCollection", "features": list(features)}


def find(
    slide: Slide, grid: PatchGrid, file: str, method: str = "mask", **classes: tuple[str, ...]
) -> Survey:
    return survey(slide, grid, TissueRequest(method, Region(file, **classes)))


def truth(grid: PatchGrid) -> np.ndarray:
    """Share of each patch inside the ellipse, by shapely: another hand than the raster's."""
    outline = shapely.Polygon(ellipse())
    side = grid.spec.patch_px
    return np.array(
        [
            [
                shapely.box(c * side, r * side, (c + 1) * side, (r + 1) * side).intersection(outline).area
                / side**2
                for c in range(grid.n_cols)
            ]
            for r in range(grid.n_rows)
        ]
    )


# ------------------------------------------------------------------ areas


def test_a_pixel_is_filled_where_shapely_finds_its_centre_in_the_polygon() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        turn = np.sort(rng.uniform(0, 2 * np.pi, 17))
        far = rng.uniform(8, 60, 17)
        outer = np.column_stack([37 + far * np.cos(turn), 29 + far * np.sin(turn)])
        hole = np.array(square(*rng.uniform(20, 30, 2), 7.3))
        filled = np.zeros((61, 71), bool)
        fill_rings([outer, hole], filled)
        y, x = np.mgrid[:61, :71] + 0.5
        area = shapely.Polygon(outer).symmetric_difference(shapely.Polygon(hole))
        np.testing.assert_array_equal(filled, shapely.contains_xy(area, x, y))


def test_a_pixel_is_filled_where_shapely_repairs_an_outline_that_crosses_itself() -> None:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:61, :71] + 0.5
    for _ in range(60):
        outer = rng.uniform(-5, 75, (int(rng.integers(4, 14)), 2))
        filled = np.zeros((61, 71), bool)
        fill_crossing_rings([outer], filled)
        mended = shapely.make_valid(shapely.Polygon(outer), method="structure", keep_collapsed=False)
        np.testing.assert_array_equal(filled, shapely.contains_xy(mended, x, y))
    bow = [(10, 10), (60, 50), (60, 10), (10, 50), (10, 10)]
    for hole in (square(40, 20, 30), square(12, 20, 5), square(2, 2, 5)):
        filled = np.zeros((61, 71), bool)
        fill_crossing_rings([np.array(bow, float), np.array(hole, float)], filled)
        mended = shapely.make_valid(shapely.Polygon(bow, [hole]), method="structure", keep_collapsed=False)
        np.testing.assert_array_equal(filled, shapely.contains_xy(mended, x, y))


def test_a_scribble_of_thousands_of_corners_is_filled() -> None:
    # They cross each other 5 million times: shapely takes more than a minute to repair them.
    corners = np.random.default_rng(0).uniform(0, 600, (4000, 2)).tolist()
    found = read_outlines(json.dumps(feature([[*corners, corners[0]]])).encode(), "A")
    drawn = found.draw([""], Frame((600, 600), 1.0, (600, 600), 1.0))
    assert 0.85 < drawn.mean() < 1


def test_polygons_beyond_the_picture_are_cut() -> None:
    filled = np.zeros((5, 7), bool)
    fill_rings([np.array(square(-10, -10, 13.0))], filled)
    fill_rings([np.array(square(100, 100, 13.0))], filled)
    expected = np.zeros((5, 7), bool)
    expected[:3, :3] = True
    np.testing.assert_array_equal(filled, expected)


@pytest.mark.parametrize("wrapped", ["collection", "list", "feature", "geometry", "multipolygon", "several"])
def test_geojson_is_read_however_it_is_wrapped(
    slide: Slide, grid: PatchGrid, tmp_path: Path, wrapped: str
) -> None:
    one = feature([ellipse()], "Tissue")
    multi = {"type": "MultiPolygon", "coordinates": [[ellipse()], [square(1, 1, 2)]]}
    document = {
        "collection": collection(one),
        "list": [one],
        "feature": one,
        "geometry": one["geometry"],
        "multipolygon": collection({**one, "geometry": multi}),
        "several": {
            "type": "GeometryCollection",
            "geometries": [multi, {"type": "Point", "coordinates": [1, 2]}],
        },
    }[wrapped]
    found = find(slide, grid, write_json(tmp_path / "A.geojson", document))
    np.testing.assert_allclose(found.tissue / 255, truth(grid), atol=0.06)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.237, 0.05])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_picture_of_any_scale_gives_the_share_of_each_patch(
    slide: Slide, grid: PatchGrid, tmp_path: Path, scale: float, suffix: str
) -> None:
    width, height = round(WIDTH * scale), round(HEIGHT * scale)
    y, x = (np.mgrid[:height, :width] + 0.5) / scale
    inside = ((x - CENTRE[0]) / HALF_AXES[0]) ** 2 + ((y - CENTRE[1]) / HALF_AXES[1]) ** 2 < 1
    values = np.where(inside, 255, 0).astype(np.uint8)
    file = tmp_path / f"A{suffix}"
    if suffix == ".png":
        Image.fromarray(values).save(file)
    else:
        tifffile.imwrite(file, values)
    shares = find(slide, grid, str(file)).tissue / 255
    # A patch is 8 x 8 pixels of the overview, and an edge that runs along them is rounded to one of them.
    np.testing.assert_allclose(shares, truth(grid), atol=0.09 if scale > 0.2 else 0.5)
    assert shares.sum() == pytest.approx(truth(grid).sum(), rel=0.005 if scale > 0.2 else 0.05)


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGB", "RGBA", "red", "I;16"])
def test_every_way_of_writing_one_value_a_pixel_is_the_same_mask(tmp_path: Path, mode: str) -> None:
    labels = np.zeros((30, 40), np.uint8)
    labels[5:20, 7:31] = 1
    if mode == "red":  # as the PANDA challenge wrote its masks
        picture = Image.fromarray(np.stack([labels, 0 * labels, 0 * labels], axis=2))
    elif mode == "1":
        picture = Image.fromarray(labels.astype(bool))
    elif mode == "P":
        picture = Image.fromarray(labels)
        picture.putpalette([200, 10, 10, 0, 90, 200])
    elif mode == "I;16":
        picture = Image.fromarray(labels.astype(np.uint16))
    else:
        picture = Image.fromarray(labels).convert(mode)
    picture.save(tmp_path / "A.png")
    found = read_annotation(str(tmp_path / "A.png")).annotation
    assert found.classes == ("1",)
    frame = Frame((40, 30), 1.0, (30, 40), 1.0)
    np.testing.assert_array_equal(found.draw(["1"], frame), labels == 1)


def test_of_a_tiff_with_levels_the_coarsest_that_is_fine_enough_is_read(tmp_path: Path) -> None:
    file = tmp_path / "A.tif"
    levels = [np.full((96 >> k, 128 >> k), k + 1, np.uint8) for k in range(3)]
    with tifffile.TiffWriter(file) as tiff:
        tiff.write(levels[0], subifds=2, tile=(16, 16))
        for level in levels[1:]:
            tiff.write(level, subfiletype=1, tile=(16, 16))
    assert read_annotation(str(file), (33, 25)).annotation.classes == ("2",)
    assert read_annotation(str(file), (32, 24)).annotation.classes == ("3",)
    assert read_annotation(str(file)).annotation.classes == ("1",)


def test_holes_stay_empty_and_classes_are_taken_and_left_out(
    slide: Slide, grid: PatchGrid, tmp_path: Path
) -> None:
    hole = square(CENTRE[0] - 48, CENTRE[1] - 48, 96)
    file = write_json(
        tmp_path / "A.geojson",
        collection(
            feature([ellipse(), hole], "Tumor"),
            feature([square(CENTRE[0] - 200, CENTRE[1] - 20, 60)], "Necrosis"),
            feature([square(CENTRE[0] + 60, CENTRE[1] - 20, 40)], "Ignore*"),
            feature([square(0, 0, 500)], "Region*"),
            feature([square(0, 0, 500)], objectType="detection"),
        ),
    )

    def area(**classes: tuple[str, ...]) -> float:
        shares = find(slide, grid, file, **classes).tissue
        return float(shares.sum() / 255) * 32**2

    whole = np.pi * HALF_AXES[0] * HALF_AXES[1] - 96**2 - 40**2
    assert area() == pytest.approx(whole, rel=0.02)
    assert area(within=("Tumor",)) == pytest.approx(whole, rel=0.02)
    assert area(within=("Necrosis",)) == pytest.approx(60**2, rel=0.1)
    assert area(without=("Necrosis",)) == pytest.approx(whole - 60**2, rel=0.02)
    assert area(within=("Tumor",), without=("Necrosis",)) == pytest.approx(whole - 60**2, rel=0.02)


def test_other_methods_are_restricted_to_a_class(slide: Slide, grid: PatchGrid, tmp_path: Path) -> None:
    file = write_json(tmp_path / "A.geojson", collection(feature([square(0, 0, 320)], "Left")))
    inside = np.zeros(grid.shape, bool)
    inside[:10, :10] = True
    only = find(slide, grid, file, "none", within=("Left",))
    np.testing.assert_array_equal(is_tissue(only.tissue), inside)
    texture = is_tissue(find(slide, grid, file, "texture", within=("Left",)).tissue)
    np.testing.assert_array_equal(texture, inside & is_tissue(survey(slide, grid).tissue))
    assert 0 < texture.sum() < inside.sum()


def test_contours_of_trident_and_hest_are_tissue_without_classes(
    slide: Slide, grid: PatchGrid, tmp_path: Path
) -> None:
    # As geopandas writes them: a name, a reference system that means nothing here, and a number for each piece.
    piece = {
        "type": "Feature",
        "properties": {"tissue_id": 0},
        "geometry": {"type": "Polygon", "coordinates": [ellipse()]},
    }
    document = {
        "type": "FeatureCollection",
        "name": "A",
        "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}},
        "features": [piece],
    }
    file = write_json(tmp_path / "A.geojson", document)
    np.testing.assert_allclose(find(slide, grid, file).tissue / 255, truth(grid), atol=0.06)
    with pytest.raises(MaskError, match="has no classes, so --within Tumor cannot choose"):
        find(slide, grid, file, within=("Tumor",))


# ------------------------------------------------------------------ what is recorded


def test_attributes_name_the_file_by_its_content_and_the_classes(
    slide: Slide, grid: PatchGrid, tmp_path: Path
) -> None:
    file = write_json(tmp_path / "A.geojson", collection(feature([ellipse()], "Tumor")))
    found = find(slide, grid, file, within=("Tumor",), without=("Necrosis",))
    fingerprint = read_annotation(file).fingerprint
    assert found.method == {
        "name": "mask",
        "version": 1,
        "overview_mpp": 8.0,
        "region": {
            "fingerprint": fingerprint,
            "within": ["Tumor"],
            "without": ["Necrosis"],
            "kind": "geojson",
        },
    }
    assert found.remarks == (f"{file} has no class 'Necrosis' to leave out",)
    texture = find(slide, grid, file, "texture", within=("Tumor",)).method
    assert {**survey(slide, grid).method, "region": texture["region"]} == texture


def sheet(tmp_path: Path, *rows: str) -> Path:
    file = tmp_path / "sheet.csv"
    file.write_text("slide_id,slide,mask\n" + "\n".join(rows) + "\n")
    return file


def test_the_column_is_used_and_another_mask_on_the_same_grid_is_refused(
    slide_file: Path, tmp_path: Path
) -> None:
    mask = tmp_path / "outline.geojson"
    write_json(mask, collection(feature([ellipse()], "Tumor"), feature([square(9, 9, 300)], "Stroma")))
    table, store = sheet(tmp_path, f"A,{slide_file},outline.geojson"), str(tmp_path / "store")
    (first,) = embed(table, store, EmbedSettings(("colour",), SPEC, within=("Tumor",)))
    assert (first.state, first.computed) == ("done", first.planned)
    attrs = Store.open(store).grid_attrs("A", SPEC.key)
    assert (attrs["tissue"]["name"], attrs["tissue"]["region"]["within"]) == ("mask", ["Tumor"])
    (again,) = embed(table, store, EmbedSettings(("colour",), SPEC, tissue="mask", within=("Tumor",)))
    assert again.computed == 0
    with pytest.raises(
        IdentityMismatchError, match=r"--within Tumor, now it is .* --within Stroma; go on with"
    ):
        embed(table, store, EmbedSettings(("colour",), SPEC, within=("Stroma",)))
    with (
        pytest.warns(SlideWarning, match="column mask is not used"),
        pytest.raises(
            IdentityMismatchError, match="tissue by 'mask', now it is 'texture'; go on with --tissue mask"
        ),
    ):
        embed(table, store, EmbedSettings(("colour",), SPEC, tissue="texture"))
    write_json(mask, collection(feature([ellipse()], "Tumor")))
    with pytest.raises(IdentityMismatchError, match="stored with tissue within mask"):
        embed(table, store, EmbedSettings(("colour",), SPEC, within=("Tumor",)))


def test_slides_without_a_mask_follow_texture_or_fail_alone(slide_file: Path, tmp_path: Path) -> None:
    write_json(tmp_path / "outline.geojson", collection(feature([ellipse()])))
    table = sheet(tmp_path, f"A,{slide_file},outline.geojson", f"B,{slide_file},")
    with pytest.warns(
        SlideWarning, match="tissue of 1 slide is that of the sheet's column mask, of the other 1"
    ):
        results = embed(table, tmp_path / "mixed", EmbedSettings(("colour",), SPEC, allow_duplicates=True))
    assert [result.state for result in results] == ["done", "done"]
    store = Store.open(tmp_path / "mixed")
    assert [store.grid_attrs(name, SPEC.key)["tissue"]["name"] for name in "AB"] == ["mask", "texture"]
    results = embed(
        table, tmp_path / "only", EmbedSettings(("colour",), SPEC, tissue="mask", allow_duplicates=True)
    )
    assert [result.state for result in results] == ["done", "failed"]
    assert results[1].reason.startswith(
        "--tissue mask needs a mask for slide 'B', and there is none in the sheet's"
    )


@pytest.mark.parametrize("name", ["A.png", "A_contours.geojson", "A_mask.tif", "contours_geojson/A.geojson"])
def test_a_folder_of_masks_is_read_by_slide_id(slide_file: Path, tmp_path: Path, name: str) -> None:
    file = tmp_path / "masks" / name
    file.parent.mkdir(parents=True)
    (tmp_path / "masks" / "other.jpg").touch()
    if file.suffix == ".geojson":
        write_json(file, collection(feature([ellipse()])))
    else:
        y, x = np.mgrid[:HEIGHT, :WIDTH]
        inside = ((x - CENTRE[0]) / HALF_AXES[0]) ** 2 + ((y - CENTRE[1]) / HALF_AXES[1]) ** 2 < 1
        values = inside.astype(np.uint8)
        Image.fromarray(values).save(file)
    settings = EmbedSettings(("colour",), SPEC, masks=str(tmp_path / "masks"))
    (result,) = embed(slide_file, tmp_path / "store", settings)
    assert result.state == "done"
    assert Store.open(tmp_path / "store").grid_attrs("A", SPEC.key)["tissue"]["name"] == "mask"


# ------------------------------------------------------------------ bad input


def test_a_folder_of_masks_that_does_not_fit_is_refused(slide_file: Path, tmp_path: Path) -> None:
    masks = tmp_path / "masks"
    with pytest.raises(MaskError, match=r"--mask .* is no folder"):
        masks_by_slide(str(masks), ["A"])
    masks.mkdir()
    with pytest.raises(MaskError, match="holds no masks"):
        masks_by_slide(str(masks), ["A"])
    (masks / "B.png").touch()
    with pytest.raises(MaskError, match=r"no file for any of the 1 slides, such as A.png or A.geojson"):
        embed(slide_file, tmp_path / "s", EmbedSettings(("colour",), SPEC, masks=str(masks)))
    (masks / "A.png").touch()
    (masks / "A_contours.geojson").touch()
    with pytest.raises(MaskError, match=r"2 masks of slide 'A': A.png, A_contours.geojson; keep one"):
        masks_by_slide(str(masks), ["A"])
    with pytest.raises(TissueError, match="--mask is not used by --tissue texture"):
        EmbedSettings(tissue="texture", masks=str(masks))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((WIDTH, HEIGHT - 60), f"another aspect ratio.*{WIDTH} px wide needs {HEIGHT} px in height"),
        ((HEIGHT, WIDTH), "another aspect ratio.*turn it by 90 degrees"),
        ((100, 80), "100 px wide needs 76 px in height"),
    ],
)
def test_a_picture_of_another_aspect_ratio_is_refused(
    slide: Slide, grid: PatchGrid, tmp_path: Path, size: tuple[int, int], message: str
) -> None:
    Image.new("L", size, 1).save(tmp_path / "A.png")
    with pytest.raises(MaskError, match=message):
        find(slide, grid, str(tmp_path / "A.png"))


def test_a_picture_may_be_rounded_to_a_pixel() -> None:
    from featurestore.tissue.label_picture import check_aspect

    for down in (3, 7.3, 32, 61):
        for rounded in (np.floor, np.ceil, np.round):
            check_aspect((int(rounded(WIDTH / down)), int(rounded(HEIGHT / down))), (WIDTH, HEIGHT), "A")


BAD = {
    "no class": (
        collection(feature([ellipse()], "Tumor")),
        {"within": ("tumour",)},
        "no class 'tumour'; there is Tumor;",
    ),
    "nothing": (collection(), {}, "holds no area: it has no polygons"),
    "points": (
        collection({"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}}),
        {},
        "no polygons",
    ),
    "other json": ({"a": 1}, {}, "is no GeoJSON"),
    "text": ("text", {}, "is no mask that can be read"),
    "corners": (
        collection(feature([[[1, 2], [3, 4], [1, 2]]])),
        {},
        "an outline of 3 corners; an area needs four",
    ),
    "no numbers": (collection(feature([[["a", 2], [3, 4], [5, 4], [1, 2]]])), {}, "no pairs of numbers"),
    "infinite": (collection(feature([[[1e300, 2], [3, 4], [5, 4], [1, 2]]])), {}, "not finite, or beyond"),
    "beyond": (collection(feature([square(0, 0, 5000)])), {}, r"outlines from \(0, 0\) to \(5000, 5000\)"),
    "ignored": (collection(feature([ellipse()], "Region*")), {}, r"its classes are Region\*"),
    "left out": (collection(feature([ellipse()], "Tumor")), {"without": ("Tumor",)}, "has no area left"),
    "small": (collection(feature([square(300, 300, 5)])), {}, "leaves no patch|leaves nothing"),
}


@pytest.mark.parametrize("case", BAD)
def test_annotations_that_cannot_be_used_are_one_line_with_the_fix(
    slide: Slide, grid: PatchGrid, tmp_path: Path, case: str
) -> None:
    document, classes, message = BAD[case]
    with pytest.raises(MaskError, match=message) as refused:
        find(slide, grid, write_json(tmp_path / "A.geojson", document), **classes)
    assert "\n" not in str(refused.value)


def test_a_class_of_many_lines_is_a_part_of_one_line(slide: Slide, grid: PatchGrid, tmp_path: Path) -> None:
    document = collection(feature([ellipse()], "a\n\x1b[31mb" + 9999 * "c"))
    with pytest.raises(MaskError, match=r"there is a \[31mbccc") as refused:
        find(slide, grid, write_json(tmp_path / "A.geojson", document), within=("x",))
    assert str(refused.value).isprintable()
    assert len(str(refused.value)) < 400


def test_classes_may_have_any_whole_number(slide: Slide, grid: PatchGrid, tmp_path: Path) -> None:
    width, height = slide.size_px
    values = np.zeros((height // 2, width // 2), np.uint64)
    values[20:90, 30:110] = 2**64 - 1
    tifffile.imwrite(tmp_path / "A.tif", values)
    found = find(slide, grid, str(tmp_path / "A.tif"), "none", within=(str(2**64 - 1),))
    tifffile.imwrite(tmp_path / "A.tif", (values > 0).astype(np.uint8))
    expected = find(slide, grid, str(tmp_path / "A.tif"), "none", within=("1",))
    np.testing.assert_array_equal(found.tissue, expected.tissue)


def test_a_picture_of_a_few_pixels_fits_every_slide_and_is_refused(tmp_path: Path) -> None:
    label = LabelPicture(np.ones((2, 3), np.uint8), "A", (3, 2))
    with pytest.raises(MaskError, match="is 3 x 2 px, so 3333 microns each, and a mask's may have 500"):
        label.draw(["1"], Frame((20_000, 14_000), 0.5, (875, 1250), 8.0))
    # Of a small slide it is fine enough.
    assert label.draw(["1"], Frame((2000, 1400), 0.5, (87, 125), 8.0)).all()


def test_a_grey_photograph_is_said_to_be_one(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 200, (20, 30)).astype(np.uint8)
    Image.fromarray(values).save(tmp_path / "A.png")
    remark = read_annotation(str(tmp_path / "A.png")).annotation.remark
    assert "different values, and all but 0 are taken; is it a photograph" in remark
    Image.fromarray(values // 4).save(tmp_path / "A.png")
    assert not read_annotation(str(tmp_path / "A.png")).annotation.remark


def test_pictures_that_are_no_mask_are_refused(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def refuse(name: str, message: str) -> None:
        with pytest.raises(MaskError, match=message):
            read_annotation(str(tmp_path / name))

    Image.fromarray(rng.integers(0, 255, (20, 30, 3), np.uint8)).save(tmp_path / "colours.png")
    refuse("colours.png", "has colours; a mask has one value for each pixel")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "jpeg.png", format="JPEG")
    refuse("jpeg.png", "neither PNG nor TIFF inside; JPEG changes values")
    tifffile.imwrite(tmp_path / "float.tif", rng.random((20, 30), np.float32))
    refuse("float.tif", "holds float32; classes are whole numbers")
    tifffile.imwrite(tmp_path / "white.tif", np.zeros((20, 30), np.uint8), photometric="miniswhite")
    refuse("white.tif", "stores white as 0")
    tifffile.imwrite(tmp_path / "many.tif", np.arange(600, dtype=np.uint16).reshape(20, 30))
    refuse("many.tif", "holds 600 different values")
    (tmp_path / "cut.png").write_bytes((tmp_path / "colours.png").read_bytes()[:60])
    refuse("cut.png", "cannot be decoded")
    refuse("absent.png", "there is no mask at")


def test_pickles_of_clam_are_never_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "opened",)

    (tmp_path / "A.pkl").write_bytes(pickle.dumps(Trap()))
    with pytest.raises(MaskError, match="is a pickle, which can run code"):
        read_annotation(str(tmp_path / "A.pkl"))
    (tmp_path / "A.h5").touch()
    with pytest.raises(MaskError, match="holds patch coordinates"):
        read_annotation(str(tmp_path / "A.h5"))
    assert not (tmp_path / "opened").exists()


def test_outlines_that_cross_themselves_are_repaired_and_said(
    slide: Slide, grid: PatchGrid, tmp_path: Path
) -> None:
    # Two triangles that meet in a point, and an outline that winds round a square twice.
    bow = [[200, 200], [400, 400], [400, 200], [200, 400], [200, 200]]
    twice = [*square(200, 200, 100)[:4], *square(200, 200, 100)]
    found = read_outlines(json.dumps(collection(feature([bow]), feature([twice]))).encode(), "A")
    assert found.remark == "2 of 2 outlines in A cross themselves and were repaired"
    frame = Frame((600, 600), 1.0, (600, 600), 1.0)
    assert found.draw([""], frame).sum() == pytest.approx(20_000 + 10_000 - 5_000, rel=0.02)
    file = write_json(tmp_path / "A.geojson", collection(feature([bow])))
    assert "cross themselves" in find(slide, grid, file).remarks[0]


def tissue_alone(width: int, height: int) -> np.ndarray:
    """Return a piece of tissue without glass, at most 350 x 200 pixels."""
    return tissue_like(900, 700, MPP)[285 : 285 + height, 230 : 230 + width]


# A small circle of tissue towards one corner: mirrored, it lies on glass.
@pytest.fixture(scope="module")
def corner(tmp_path_factory: pytest.TempPathFactory) -> Slide:
    image = np.full((600, 900, 3), 240, np.uint8)
    image[60:260, 80:330] = tissue_alone(250, 200)
    path = tmp_path_factory.mktemp("corner") / "B.tif"
    return open_slide(str(write_pyramid(path, image, MPP, levels=1)))


def corner_mask(tmp_path: Path, *flips: int, inverted: bool = False) -> str:
    values = np.zeros((300, 450), np.uint8)
    values[30:130, 40:165] = 1
    values = np.flip(values, flips) if flips else values
    Image.fromarray(1 - values if inverted else values).save(tmp_path / "B.png")
    return str(tmp_path / "B.png")


def test_a_mask_that_lies_on_glass_is_refused_with_the_reading_that_lies_on_tissue(
    corner: Slide, tmp_path: Path
) -> None:
    grid = PatchGrid.for_slide(corner.size_px, corner.mpp, corner.level_mpps, SPEC)
    assert not find(corner, grid, corner_mask(tmp_path)).remarks
    for flips, name in (
        ((1,), "mirrored left to right"),
        ((0,), "mirrored top to bottom"),
        ((0, 1), "turned by 180"),
    ):
        with pytest.raises(MaskError, match=rf"lies on tissue by 0% of its area, and {name}.* by (9\d|100)%"):
            find(corner, grid, corner_mask(tmp_path, *flips))
    with pytest.raises(MaskError, match=r"by \d+% of its area, and inverted by"):
        find(corner, grid, corner_mask(tmp_path, inverted=True))
    # Named explicitly, it is taken as it is: the slide may show what no measure sees.
    forced = find(corner, grid, corner_mask(tmp_path, 1), "none", within=("1",))
    assert is_tissue(forced.tissue).any()


def test_a_mask_on_glass_is_said_with_the_reading_that_would_fit(corner: Slide, tmp_path: Path) -> None:
    grid = PatchGrid.for_slide(corner.size_px, corner.mpp, corner.level_mpps, SPEC)

    def remark(corners: list[list[float]]) -> str:
        file = write_json(tmp_path / "B.geojson", collection(feature([corners])))
        return " ".join(find(corner, grid, file).remarks)

    inside = np.array([[80, 100], [330, 100], [330, 260], [80, 260], [80, 100]])
    assert not remark(inside.tolist())
    assert "and multiplied by 4 by" in remark((inside / 4).tolist())
    elsewhere = [[700, 290], [860, 290], [860, 310], [700, 310], [700, 290]]
    assert remark(elsewhere).endswith("lies on tissue by 0% of its area; is it right?")


def test_x_and_y_that_are_swapped_are_refused(tmp_path: Path) -> None:
    image = np.full((600, 900, 3), 240, np.uint8)
    image[60:160, 480:830] = tissue_alone(350, 100)
    slide = open_slide(str(write_pyramid(tmp_path / "D.tif", image, MPP, levels=1)))
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, SPEC)
    corners = [[60, 500], [150, 500], [150, 600], [60, 600], [60, 500]]
    file = write_json(tmp_path / "D.geojson", collection(feature([corners])))
    with pytest.raises(MaskError, match=r"with x and y swapped by (9\d|100)%: write x before y"):
        find(slide, grid, file)


def test_annotations_in_microns_are_refused(corner: Slide, tmp_path: Path) -> None:
    grid = PatchGrid.for_slide(corner.size_px, corner.mpp, corner.level_mpps, SPEC)
    in_px = feature([[[80, 60], [330, 60], [330, 260], [80, 260], [80, 60]]])
    assert not find(corner, grid, write_json(tmp_path / "B.geojson", collection(in_px))).remarks
    # Seen by what they cover.
    in_um = feature([[[430, 390], [660, 390], [660, 520], [430, 520], [430, 390]]])
    image = np.full((600, 900, 3), 240, np.uint8)
    image[195:260, 215:330] = tissue_alone(115, 65)
    other = open_slide(str(write_pyramid(tmp_path / "C.tif", image, MPP, levels=1)))
    with pytest.raises(
        MaskError, match=r"and read in microns by (9\d|100)%: coordinates are level-0 pixels, so divide"
    ):
        find(other, grid, write_json(tmp_path / "C.geojson", collection(in_um)))
