"""Ways of telling tissue from glass: ours, their recorded attributes, and another package's."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import zarr
from install_package import install
from make_slides import tissue_like, write_pyramid

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import IdentityMismatchError, SlideError, TissueError
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.storage.store import Store, StoredGrid
from featurestore.tissue.overview import read_overview
from featurestore.tissue.survey import patch_means, survey
from featurestore.tissue.threshold import is_tissue
from featurestore.tissue.tissue_method import TISSUE_METHODS

MPP = 2.0
SPEC = GridSpec(MPP, 32, 29)
THEIRS = """
import numpy as np

from featurestore.tissue.overview import Overview
from featurestore.tissue.tissue_method import TissueMethod


def left_half(overview: Overview):
    mask = np.zeros(overview.rgb.shape[:2], bool)
    mask[:, : mask.shape[1] // 2] = overview.slide.mpp == 2.0
    return mask


def transposed(overview):
    return left_half(overview).T


def numbers(overview):
    return left_half(overview).astype(int)


def failing(overview):
    raise KeyError("a bug\\nof theirs")


RECORD = TissueMethod("left", "the left half", left_half, version=3, parameters={"share": 0.5})
TRANSPOSED = TissueMethod("transposed", "wrong shape", transposed)
NUMBERS = TissueMethod("numbers", "wrong dtype", numbers)
FAILING = TissueMethod("failing", "raises", failing)
"""
POINTS = """[histosge.tissue_methods]
left = their_tissue:RECORD
transposed = their_tissue:TRANSPOSED
numbers = their_tissue:NUMBERS
failing = their_tissue:FAILING
"""


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(
        tmp_path_factory.mktemp("slides") / "A.tif", tissue_like(431, 357, MPP), MPP, levels=1
    )


@pytest.fixture(scope="module")
def slide(slide_file: Path) -> Slide:
    return open_slide(str(slide_file))


@pytest.fixture(scope="module")
def grid(slide: Slide) -> PatchGrid:
    return PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, SPEC)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    install(tmp_path, "their-tissue", POINTS, their_tissue=THEIRS)
    monkeypatch.syspath_prepend(tmp_path)
    TISSUE_METHODS.refresh()
    yield
    TISSUE_METHODS.refresh()


def test_patches_are_tissue_from_26_on() -> None:
    share = np.array([[0, 25, 26], [27, 254, 255]], np.uint8)
    expected = [[False, False, True], [True, True, True]]
    assert is_tissue(share).tolist() == expected
    grid = PatchGrid.for_slide((3 * 32, 2 * 32), MPP, (MPP,), GridSpec(MPP, 32, 32))
    stored = StoredGrid("A", grid, share, np.zeros((2, 3, 3), np.uint8))
    assert stored.is_tissue.tolist() == expected
    assert [block.index for block in stored.planned((1, 1))] == [(0, 2), (1, 0), (1, 1), (1, 2)]


def test_the_attributes_of_our_methods_are_those_that_stores_hold(slide: Slide, grid: PatchGrid) -> None:
    texture = (
        '{"name": "texture", "version": 2, "overview_mpp": 8.0, "texture_um": 40.0, "texture_od": 0.04, '
        '"dense_od": 0.35, "close_um": 40.0, "hole_um2": 60000.0, "speck_um2": 30000.0, "cut_ratio": 1.6, '
        '"haze_ratio": 1.5, "glass_ratio": 5.0, "least_od": 0.01}'
    )
    assert json.dumps(survey(slide, grid).method) == texture
    assert json.dumps(survey(slide, grid, "none").method) == '{"name": "none", "version": 1}'


def test_none_calls_every_patch_tissue(slide: Slide, grid: PatchGrid) -> None:
    assert (survey(slide, grid, "none").tissue == 255).all()
    assert not is_tissue(survey(slide, grid).tissue).all()


def test_patches_are_surveyed_where_they_are_read_when_the_grid_took_a_level(tmp_path: Path) -> None:
    x = np.arange(431)
    image = np.repeat((x * 255 // 430).astype(np.uint8)[None, :, None], 357, axis=0).repeat(3, axis=2)
    slide = open_slide(str(write_pyramid(tmp_path / "A.tif", image, MPP, levels=1)))
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, GridSpec(1.92, 32, 32))
    assert grid.effective_mpp == pytest.approx(MPP)
    means = [image[0, 32 * col : 32 * col + 32, 0].mean() for col in range(grid.n_cols)]
    np.testing.assert_allclose(survey(slide, grid).rgb[3, :, 0], means, atol=1.01)


@pytest.mark.usefixtures("package")
def test_a_method_of_another_package_decides_and_is_recorded(slide: Slide, grid: PatchGrid) -> None:
    found = survey(slide, grid, "left")
    mask = np.zeros(read_overview(slide).rgb.shape[:2])
    mask[:, : mask.shape[1] // 2] = 1
    share = patch_means(mask, grid, MPP / 8.0)
    np.testing.assert_array_equal(found.tissue, np.floor(share * 255 + 0.5))
    assert found.method == {"name": "left", "version": 3, "overview_mpp": 8.0, "share": 0.5}
    assert 0.3 < is_tissue(found.tissue).mean() < 0.7


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transposed", "returned bool of shape"),
        ("numbers", "returned int64"),
        ("failing", "KeyError: 'a bug"),
    ],
)
def test_one_that_fails_costs_the_slide_and_says_why(
    slide: Slide, grid: PatchGrid, slide_file: Path, tmp_path: Path, name: str, reason: str
) -> None:
    with pytest.raises(SlideError, match=reason) as refused:
        survey(slide, grid, name)
    assert "\n" not in str(refused.value)
    settings = EmbedSettings(("colour",), SPEC, tissue=name)
    (result,) = embed(str(slide_file), str(tmp_path / "store"), settings)
    assert result.state == "failed"
    assert reason in result.reason


@pytest.mark.usefixtures("package")
def test_a_run_goes_on_with_the_method_that_it_began_with(slide_file: Path, tmp_path: Path) -> None:
    store = str(tmp_path / "store")
    (first,) = embed(str(slide_file), store, EmbedSettings(("colour",), SPEC, tissue="left"))
    assert (first.state, first.computed) == ("done", first.planned)
    (again,) = embed(str(slide_file), store, EmbedSettings(("colour",), SPEC, tissue="left"))
    assert again.computed == 0
    for other in ("texture", "none"):
        with pytest.raises(IdentityMismatchError, match=f"tissue by 'left', now it is '{other}'; go on with"):
            embed(str(slide_file), store, EmbedSettings(("colour",), SPEC, tissue=other))


def test_an_imported_grid_keeps_its_tissue(slide_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    embed(str(slide_file), str(root), EmbedSettings(("colour",), SPEC))
    attrs_file = root / "A" / SPEC.key / "zarr.json"
    document = json.loads(attrs_file.read_text())
    document["attributes"]["tissue"] = {"name": "imported", "from": "somewhere"}
    attrs_file.write_text(json.dumps(document))
    before = Store.open(str(root)).grid("A", SPEC.key).tissue
    (result,) = embed(str(slide_file), str(root), EmbedSettings(("colour",), SPEC))
    assert result.state == "done"
    np.testing.assert_array_equal(Store.open(str(root)).grid("A", SPEC.key).tissue, before)
    with pytest.raises(IdentityMismatchError, match="'imported', now it is 'none'; clear it with"):
        embed(str(slide_file), str(root), EmbedSettings(("colour",), SPEC, tissue="none"))


def test_an_unknown_method_is_refused_before_any_slide(tmp_path: Path) -> None:
    with pytest.raises(TissueError, match="'textur' among tissue methods: did you mean texture"):
        EmbedSettings(tissue="textur")


def test_parameters_cannot_hide_the_name_of_a_method() -> None:
    from featurestore.tissue.tissue_method import TissueMethod

    with pytest.raises(ValueError, match="parameters named name, version"):
        TissueMethod("a", "b", None, parameters={"version": 2, "name": "c", "other": 1})


def test_a_run_goes_on_with_the_tissue_of_an_earlier_version(slide_file: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    embed(str(slide_file), str(root), EmbedSettings(("colour",), SPEC, block_shape=(5, 7)))
    folder = root / "A" / SPEC.key
    document = json.loads((folder / "zarr.json").read_text())
    earlier = document["attributes"]["tissue"] | {"version": 1}
    for name in ("cut_ratio", "haze_ratio", "glass_ratio", "least_od"):
        del earlier[name]
    document["attributes"]["tissue"] = earlier
    (folder / "zarr.json").write_text(json.dumps(document))
    # As if the earlier version had lost a part of the tissue.
    stored = zarr.open_array(folder / "tissue", mode="r+")
    stored[:7] = 0
    tissue = np.asarray(stored[:])
    assert is_tissue(tissue).any()
    for file in folder.rglob("embedding/c/*/*/0"):
        file.unlink()
    (result,) = embed(str(slide_file), str(root), EmbedSettings(("colour",), SPEC, block_shape=(5, 7)))
    grid = Store.open(str(root)).grid("A", SPEC.key)
    assert (result.state, result.computed) == ("done", len(grid.planned((5, 7))))
    assert result.patches == is_tissue(tissue).sum()
    np.testing.assert_array_equal(grid.tissue, tissue)
    assert json.loads((folder / "zarr.json").read_text())["attributes"]["tissue"] == earlier
