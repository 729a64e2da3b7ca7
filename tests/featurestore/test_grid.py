import json

import numpy as np
import pytest

from featurestore.grid import GridSpec, OffsetGridSpec, PatchGrid

SIZE = (1009, 701)  # width, height


def test_only_whole_patches_are_kept() -> None:
    grid = PatchGrid.for_slide(SIZE, 0.5, (0.5,), GridSpec(0.5, 97, 53))
    assert grid.shape == ((701 - 97) // 53 + 1, (1009 - 97) // 53 + 1) == (12, 18)
    x, y, width, height = grid.region_px((0, grid.n_rows), (0, grid.n_cols))
    assert (x, y) == (0, 0)
    assert width <= SIZE[0]
    assert height <= SIZE[1]


def test_a_slide_smaller_than_a_patch_has_one_padded_patch() -> None:
    grid = PatchGrid.for_slide((31, 17), 0.5, (0.5,), GridSpec(0.5, 97, 53))
    assert grid.shape == (1, 1)


def test_a_level_within_five_percent_is_used_as_it_is() -> None:
    near = PatchGrid.for_slide(SIZE, 0.69, (0.69, 1.38), GridSpec(0.7, 32, 32))
    far = PatchGrid.for_slide(SIZE, 0.499, (0.499, 1.996), GridSpec(1.0, 32, 32))
    assert near.effective_mpp == 0.69
    assert far.effective_mpp == 1.0
    assert near.spec.key == "mpp0.7000_px32_stride32"


def test_rounding_in_the_mpp_loses_no_row() -> None:
    # 4000 px at 0.25 are 2000 px at 0.5, though 4000 * 0.25 / 0.5 may come out below
    grid = PatchGrid.for_slide((4000, 3000), 0.1 + 0.2, (0.1 + 0.2,), GridSpec(0.6, 100, 100))
    assert grid.shape == (15, 20)


def test_centres_are_in_microns_from_the_top_left() -> None:
    grid = PatchGrid.for_slide(SIZE, 0.5, (0.5,), GridSpec(0.5, 96, 53))
    assert grid.y_um[0] == grid.x_um[0] == 24.0
    np.testing.assert_allclose(np.diff(grid.x_um), 26.5)
    assert len(grid.y_um) == grid.n_rows
    assert len(grid.x_um) == grid.n_cols


def test_a_region_covers_its_patches_and_nothing_more() -> None:
    grid = PatchGrid.for_slide(SIZE, 0.5, (0.5,), GridSpec(0.5, 97, 53))
    assert grid.region_px((2, 5), (3, 4)) == (159, 106, 97, 2 * 53 + 97)


def test_attributes_rebuild_the_grid_exactly() -> None:
    grid = PatchGrid.for_slide(SIZE, 0.4991, (0.4991,), GridSpec(0.5, 97, 53))
    assert PatchGrid.from_attrs(json.loads(json.dumps(grid.to_attrs()))) == grid


@pytest.mark.parametrize("values", [(0.0, 32, 32), (0.5, 0, 32), (0.5, 32, -1)])
def test_a_grid_without_size_is_refused(values: tuple[float, int, int]) -> None:
    with pytest.raises(ValueError, match="positive"):
        GridSpec(*values)


def test_a_grid_with_an_origin_has_its_patches_there() -> None:
    spec, origin = OffsetGridSpec(1.0, 96, 48), (37.0, 53.0)
    plain = PatchGrid.for_slide(SIZE, 0.5, (0.5, 1.0), GridSpec(1.0, 96, 48))
    grid = PatchGrid.for_slide(SIZE, 0.5, (0.5, 1.0), spec, origin)
    assert grid.shape == ((350 - 27 - 96) // 48 + 1, (504 - 19 - 96) // 48 + 1)
    assert grid.spec.key == "mpp1.0000_px96_stride48_offset"
    np.testing.assert_allclose(grid.x_um, plain.x_um[: grid.n_cols] + 18.5)
    np.testing.assert_allclose(grid.y_um, plain.y_um[: grid.n_rows] + 26.5)
    assert grid.region_px((1, 2), (2, 3)) == (18 + 96, 26 + 48, 96, 96)
    attrs = json.loads(json.dumps(grid.to_attrs()))
    assert attrs["origin_px"] == [37, 53]
    assert PatchGrid.from_attrs(attrs) == grid


def test_a_grid_from_the_corner_is_described_as_ever() -> None:
    attrs = PatchGrid.for_slide((500, 400), 0.5, (0.5,), GridSpec(0.5, 97, 53)).to_attrs()
    assert attrs == {
        "mpp": 0.5,
        "patch_px": 97,
        "stride_px": 53,
        "slide_mpp": 0.5,
        "effective_mpp": 0.5,
        "shape": [6, 8],
        "origin": "corner of patch (0, 0) is pixel (0, 0) of the slide",
    }


def test_a_key_and_an_origin_belong_together() -> None:
    for spec, origin in (
        (GridSpec(), (1.0, 0.0)),
        (OffsetGridSpec(), (0.0, 0.0)),
        (OffsetGridSpec(), (1.0, float("nan"))),
    ):
        with pytest.raises(ValueError, match="cannot begin at pixel"):
            PatchGrid(spec, 0.5, 0.5, 1, 1, origin)
