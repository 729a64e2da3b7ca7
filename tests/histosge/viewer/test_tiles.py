"""Which tiles a slide is shown in: arithmetic."""

import pytest

from histosge.viewer.tile_pyramid import MAX_REDUCTION, TILE_PX, TilePyramid

PYRAMID = TilePyramid.for_slide((8701, 5003), 0.25, (0.25, 1.0, 4.0))


@pytest.mark.parametrize("level", range(PYRAMID.min_level, PYRAMID.max_level + 1))
def test_tiles_cover_a_level_and_overlap_nowhere(level: int) -> None:
    width, height = PYRAMID.level_px(level)
    columns, rows = PYRAMID.count(level)
    tiles = [PYRAMID.region_px(level, col, row) for row in range(rows) for col in range(columns)]
    assert sum(w * h for _, _, w, h in tiles) == width * height
    assert len({(x, y) for x, y, _, _ in tiles}) == columns * rows
    assert max(x + w for x, _, w, _ in tiles) == width
    assert max(y + h for _, y, _, h in tiles) == height


def test_the_coarsest_level_is_one_tile_and_the_finest_the_slide() -> None:
    assert PYRAMID.count(0) == (1, 1)
    assert PYRAMID.level_px(PYRAMID.max_level) == (8701, 5003)
    assert PYRAMID.level_mpp(PYRAMID.max_level) == 0.25


def test_no_tile_is_averaged_from_more_than_a_set_number_of_pixels() -> None:
    flat = TilePyramid.for_slide((100_000, 80_000), 0.25, (0.25,))
    assert flat.level_mpp(flat.min_level) / 0.25 == MAX_REDUCTION
    assert TilePyramid.for_slide((TILE_PX, 100), 0.5, (0.5,)).count(0) == (1, 1)


def test_levels_finer_than_asked_are_left_out() -> None:
    coarse = TilePyramid.for_slide((8701, 5003), 0.25, (0.25, 1.0, 4.0), finest_mpp=2.0)
    assert coarse.mpp == 2.0
    assert coarse.size_px == (1088, 626)
    assert TilePyramid.for_slide((8701, 5003), 0.25, (0.25,), finest_mpp=0.1) == TilePyramid.for_slide(
        (8701, 5003), 0.25, (0.25,)
    )


@pytest.mark.parametrize("tile", [(99, 0, 0), (-1, 0, 0), (0, 1, 0), (0, 0, 7), (0, -1, 0)])
def test_a_tile_that_is_none_is_refused(tile: tuple[int, int, int]) -> None:
    with pytest.raises(LookupError):
        PYRAMID.region_px(*tile)
