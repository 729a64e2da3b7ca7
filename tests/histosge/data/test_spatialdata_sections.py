"""SpatialData with several regions, spots off tissue, and coordinates of a stated or provable unit."""

import warnings
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest

from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.errors import ExpressionError

pytestmark = pytest.mark.spatialdata
MPP, SIZE = 0.5, (97, 89)
N = {"A": 7, "B": 5}
"""Spots of each region."""


@pytest.fixture(scope="module", autouse=True)
def _spatialdata() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import spatialdata  # noqa: F401


def points(name: str) -> np.ndarray:
    rng = np.random.default_rng(ord(name[0]))
    return rng.uniform(5, 80, (N[name[0]], 2))


def make(
    path: Path,
    regions: tuple[str, ...] = ("A", "B"),
    *,
    systems: dict[str, str] | None = None,
    pictures: dict[str, tuple[str, tuple[int, int]]] | None = None,
    obs: dict[str, Any] | None = None,
) -> Path:
    """Write circles of 11 units in `systems` (of each region), and pictures: name -> system, (width, height)."""
    import geopandas
    from shapely import Point
    from spatialdata import SpatialData
    from spatialdata.models import Image2DModel, ShapesModel, TableModel
    from spatialdata.transformations import Identity

    systems = systems or {name: name for name in regions}
    pictures = {f"{name}_he": (name, SIZE) for name in regions} if pictures is None else pictures
    n = [len(points(name)) for name in regions]
    counts = np.random.default_rng(3).poisson(9, (sum(n), 4)).astype(np.float32)
    table = pd.DataFrame(
        {
            "region": pd.Categorical(np.repeat(regions, n)),
            "spot": np.concatenate([np.arange(k)[::-1] for k in n]),
            **(obs or {}),
        },
        index=[f"{name}{i}" for name, k in zip(regions, n, strict=True) for i in range(k)],
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        SpatialData(
            images={
                name: Image2DModel.parse(
                    np.zeros((3, size[1], size[0]), np.uint8),
                    dims=("c", "y", "x"),
                    transformations={system: Identity()},
                )
                for name, (system, size) in pictures.items()
            },
            shapes={
                name: ShapesModel.parse(
                    geopandas.GeoDataFrame(
                        {"radius": np.full(len(points(name)), 5.5)},
                        geometry=[Point(*xy) for xy in points(name)],
                    ),
                    transformations={systems[name]: Identity()},
                )
                for name in regions
            },
            tables={
                "table": TableModel.parse(
                    anndata.AnnData(counts, obs=table),
                    region=list(regions),
                    region_key="region",
                    instance_key="spot",
                )
            },
        ).write(path)
    return path


def find(
    path: Path | str, slide_id: str = "A", mpp: float = MPP, size: tuple[int, int] | None = SIZE
) -> LoadedExpression:
    return find_expression(path, SlideFrame(slide_id, "D", mpp, size))


def test_each_slide_gets_the_shapes_of_its_region(tmp_path: Path) -> None:
    path = make(tmp_path / "c.zarr")
    for name in N:
        for found in (find(path, name), find(f"{path}#{name}", "other")):
            assert len(found.spots) == N[name]
            # The table names its shapes in reverse.
            np.testing.assert_allclose(found.spots.xy_um, points(name)[::-1] * MPP)
            assert f"picture '{name}_he' taken as the slide" in found.describe(MPP)
            assert found.spots.diameter_um == 11 * MPP
    with pytest.raises(ExpressionError, match=r"2 sections .regions: A, B., and none is 'other'.*c\.zarr#A"):
        find(path, "other")


def test_a_region_is_found_by_the_coordinate_system_that_is_called_like_the_slide(tmp_path: Path) -> None:
    path = make(
        tmp_path / "c.zarr", systems={"A": "s1", "B": "s2"}, pictures={"p": ("s1", SIZE), "q": ("s2", SIZE)}
    )
    assert len(find(path, "s2").spots) == N["B"]


def test_a_region_of_several_libraries_is_cut_by_the_table_s_column(tmp_path: Path) -> None:
    library = {"library_id": ["L1", "L1", "L1", "L2", "L2", "L2", "L2"]}
    path = make(tmp_path / "c.zarr", ("A",), obs=library)
    assert list(find(path, "L1").spots.barcodes) == ["A0", "A1", "A2"]
    assert len(find(f"{path}#L2", "other").spots) == 4
    with pytest.raises(ExpressionError, match="obs 'library_id': L1, L2"):
        find(path, "other")


def test_spots_off_tissue_are_dropped_and_counted(tmp_path: Path) -> None:
    found = find(make(tmp_path / "c.zarr", ("A",), obs={"in_tissue": [1, 1, 0, 1, 0, 1, 1]}))
    assert list(found.spots.barcodes) == ["A0", "A1", "A3", "A5", "A6"]
    np.testing.assert_allclose(found.spots.xy_um[2], points("A")[3] * MPP)
    assert "2 spots marked as off tissue left out" in found.describe(MPP)


def test_of_several_sizes_of_bins_8_microns_is_taken_and_said(tmp_path: Path) -> None:
    regions = ("A_square_016um", "A_square_008um")
    path = make(
        tmp_path / "c.zarr",
        regions,
        systems=dict.fromkeys(regions, "A"),
        pictures={"A_full": ("A", SIZE)},
    )
    found = find(path)
    assert "A_square_008um taken, of others there: A_square_016um" in found.describe(MPP)
    assert "shapes 'A_square_016um'" in find(f"{path}#A_square_016um").describe(MPP)


def test_among_pictures_the_one_of_the_slide_s_size_is_the_slide(tmp_path: Path) -> None:
    pictures = {"dapi": ("g", (291, 267)), "he": ("g", SIZE)}
    found = find(make(tmp_path / "c.zarr", ("A",), systems={"A": "g"}, pictures=pictures))
    assert "picture 'he' taken as the slide" in found.describe(MPP)
    np.testing.assert_allclose(found.spots.xy_um, points("A")[::-1] * MPP)


def test_pictures_that_put_the_spots_at_two_places_are_refused(tmp_path: Path) -> None:
    from spatialdata import read_zarr
    from spatialdata.transformations import Translation, set_transformation

    pictures = {"p": ("g", SIZE), "q": ("g", SIZE)}
    data = read_zarr(make(tmp_path / "c.zarr", ("A",), systems={"A": "g"}, pictures=pictures))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_transformation(data.images["q"], Translation([40, 0], axes=("x", "y")), "g", write_to_sdata=data)
    with pytest.raises(ExpressionError, match="pictures 'p' and 'q' may both be the slide"):
        find(tmp_path / "c.zarr")


@pytest.mark.parametrize(("system", "scale"), [("microns", 1.0), ("pixels", MPP), ("px", MPP), ("um", 1.0)])
def test_without_a_picture_the_system_s_name_is_the_unit(tmp_path: Path, system: str, scale: float) -> None:
    found = find(make(tmp_path / "c.zarr", ("A",), systems={"A": system}, pictures={}))
    np.testing.assert_allclose(found.spots.xy_um, points("A")[::-1] * scale)
    np.testing.assert_allclose(found.spots.diameter_um, 11 * scale)


def test_without_any_unit_shapes_are_refused_unless_only_one_fits_on_the_slide(tmp_path: Path) -> None:
    path = make(tmp_path / "c.zarr", ("A",), systems={"A": "global"}, pictures={})
    with pytest.raises(ExpressionError, match="whether the shapes 'A' are in pixels or microns"):
        find(path, size=(970, 890))
    # As microns they would lie at up to 160 pixels.
    assert "taken as pixels" in find(path, size=(84, 84)).describe(MPP)
    assert "taken as microns" in find(path, size=(30, 30), mpp=4).describe(4)


def test_without_a_unit_the_pitch_of_a_chip_tells_it(tmp_path: Path) -> None:
    import geopandas
    from shapely import Point
    from spatialdata import SpatialData
    from spatialdata.models import ShapesModel, TableModel
    from spatialdata.transformations import Identity

    rows, cols = (a.ravel() for a in np.mgrid[0:4, 0:6])
    even = (rows + cols) % 2 == 0
    rows, cols = rows[even], cols[even]
    xy_um = np.stack([300 + cols * 50.0, 500 + rows * 100 * np.sqrt(3) / 2], axis=1)
    for name, unit_um in (("um", 1.0), ("px", MPP)):
        obs = pd.DataFrame(
            {"array_row": rows, "array_col": cols, "region": pd.Categorical(["A"] * len(rows))}
        )
        obs["spot"] = np.arange(len(rows))
        obs.index = [f"s{i}" for i in range(len(rows))]
        circles = geopandas.GeoDataFrame(
            {"radius": np.full(len(rows), 27.5 / unit_um)}, geometry=[Point(*xy) for xy in xy_um / unit_um]
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = anndata.AnnData(np.ones((len(rows), 2), np.float32), obs=obs)
            SpatialData(
                shapes={"A": ShapesModel.parse(circles, transformations={"global": Identity()})},
                tables={"t": TableModel.parse(table, region="A", region_key="region", instance_key="spot")},
            ).write(tmp_path / f"{name}.zarr")
        found = find(tmp_path / f"{name}.zarr", size=(9000, 9000))
        np.testing.assert_allclose(found.spots.xy_um, xy_um)
        assert found.spots.diameter_um == pytest.approx(55)


def test_a_picture_of_spatialdata_is_a_slide_and_the_whole_is_refused_with_the_list(tmp_path: Path) -> None:
    from featurestore.errors import SlideError
    from featurestore.slides.open_slide import open_slide
    from featurestore.slides.sample_sheet import read_samples

    path = make(tmp_path / "c.zarr")
    with pytest.raises(
        SlideError, match=r"c\.zarr is a SpatialData.*c\.zarr/images/A_he, .*c\.zarr/images/B_he"
    ):
        open_slide(path, MPP)
    slide = open_slide(path / "images" / "A_he", MPP)
    assert slide.size_px == SIZE
    slide.close()
    (sample,) = read_samples(path / "images" / "B_he")
    assert (sample.slide_id, sample.slide) == ("B_he", str(path / "images" / "B_he"))
    (tmp_path / "s.csv").write_text("slide_id,slide,expression\nB,c.zarr/images/B_he,c.zarr\n")
    (row,) = read_samples(tmp_path / "s.csv")
    assert len(find(str(row.expression), row.slide_id).spots) == N["B"]
    with pytest.raises(SlideError, match="holds no OME-Zarr image"):
        open_slide(path / "shapes" / "A", MPP)
