import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from make_slides import painted, write_pyramid

from featurestore.blocks import Block
from featurestore.errors import SlideAccessError, SlideError
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides import patch_reader
from featurestore.slides.open_slide import open_slide
from featurestore.slides.patch_reader import read_batches
from featurestore.slides.protocol import Slide
from featurestore.slides.read_ahead import read_ahead, read_in_turn


class PaintedSlide:
    """Pixels that say where they are; a rectangle of it cannot be read."""

    source, size_px, mpp, level_mpps = "painted", (311, 207), 0.5, (0.5,)

    def __init__(self, bad: tuple[int, int] | None = None) -> None:
        self.bad = bad
        self.reads = 0

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float, *, upsample: bool = False
    ) -> np.ndarray:
        self.reads += 1
        if self.bad and x <= self.bad[0] < x + width and y <= self.bad[1] < y + height:
            raise SlideError("a tile is damaged")
        ys, xs = np.mgrid[y : y + height, x : x + width]
        return np.stack([xs % 251, ys % 241, (xs + ys) % 239], axis=2).astype(np.uint8)

    def close(self) -> None:
        pass


SLIDE = PaintedSlide()
GRID = PatchGrid.for_slide(SLIDE.size_px, 0.5, (0.5,), GridSpec(0.5, 29, 13))
BLOCK = Block((0, 1), (1, 8), (2, 13))


def _wanted() -> np.ndarray:
    return np.random.default_rng(5).random(BLOCK.shape) < 0.4


def _collect(
    slide: PaintedSlide, batch: int
) -> tuple[dict[tuple[int, int], np.ndarray], list[tuple[int, int, str]]]:
    found, failures = {}, []
    for item in read_batches(slide, GRID, BLOCK, _wanted(), batch):
        failures += item.failures
        for row, col, pixels in zip(item.rows, item.cols, item.pixels, strict=True):
            found[int(row), int(col)] = pixels
    return found, failures


@pytest.mark.parametrize("strip", [1, 3000, 16_000_000])
@pytest.mark.parametrize("batch", [1, 7, 1000])
def test_every_wanted_patch_comes_once_with_its_own_pixels(
    strip: int, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_reader, "MAX_STRIP_PX", strip)
    found, failures = _collect(PaintedSlide(), batch)
    assert set(found) == {(int(r), int(c)) for r, c in np.argwhere(_wanted())}
    assert failures == []
    for (row, col), pixels in found.items():
        x, y, width, height = GRID.region_px((1 + row, 2 + row), (2 + col, 3 + col))
        np.testing.assert_array_equal(pixels, PaintedSlide().read_region(x, y, width, height, 0.5))


def test_overlapping_patches_are_read_as_one_region() -> None:
    slide = PaintedSlide()
    _collect(slide, 7)
    assert slide.reads == 1


def test_only_the_patches_that_touch_the_damage_are_lost() -> None:
    damage = (71, 59)
    found, failures = _collect(PaintedSlide(damage), 7)
    for row, col in np.argwhere(_wanted()):
        x, y, side, _ = GRID.region_px((1 + row, 2 + row), (2 + col, 3 + col))
        hit = x <= damage[0] < x + side and y <= damage[1] < y + side
        assert ((1 + row, 2 + col) in {(r, c) for r, c, _ in failures}) == hit
        assert ((row, col) in found) != hit
    assert len(failures) > 0


class SinglePatches:
    """A slide of which one patch can be read, but no strip: what a damaged tile leaves."""

    def __init__(self, slide: Slide, side: int) -> None:
        self.slide, self.side = slide, side

    def read_region(self, x: int, y: int, width: int, height: int, mpp: float) -> np.ndarray:
        if max(width, height) > self.side:
            raise SlideError("a tile is damaged")
        return self.slide.read_region(x, y, width, height, mpp)


@pytest.mark.parametrize("damaged", [False, True], ids=["in strips", "one by one"])
def test_patches_are_read_at_the_mpp_of_the_level_that_the_grid_took(tmp_path: Path, damaged: bool) -> None:
    image = painted(662, 514)
    slide = open_slide(str(write_pyramid(tmp_path / "a.tif", image, 0.25, levels=2)))
    level = image.reshape(257, 2, 331, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)  # at 0.5
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, GridSpec(0.4942, 31, 23))
    assert grid.effective_mpp == pytest.approx(0.5)
    assert grid.shape == ((257 - 31) // 23 + 1, (331 - 31) // 23 + 1)
    block = Block((0, 0), (0, grid.n_rows), (0, grid.n_cols))
    source = SinglePatches(slide, 31) if damaged else slide
    read = 0
    for item in read_batches(source, grid, block, np.ones(block.shape, bool), 7):  # type: ignore[arg-type]
        for row, col, pixels in zip(item.rows, item.cols, item.pixels, strict=True):
            y, x = 23 * row, 23 * col
            np.testing.assert_array_equal(pixels, level[y : y + 31, x : x + 31])
            read += 1
    assert read == grid.n_rows * grid.n_cols


def test_a_block_without_wanted_patches_still_ends() -> None:
    (item,) = read_batches(SLIDE, GRID, BLOCK, np.zeros(BLOCK.shape, bool), 7)
    assert item.last
    assert len(item.rows) == 0


def test_an_error_while_reading_ahead_reaches_the_consumer() -> None:
    def items() -> Iterator[int]:
        yield 3
        raise SlideError("gone")

    with pytest.raises(SlideError, match="gone"):
        list(read_ahead(items))


def test_a_consumer_that_stops_early_stops_the_thread() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for i in range(1000):
            made.append(i)
            yield i

    stream = read_ahead(items, depth=2)
    assert next(stream) == 0
    stream.close()
    assert len(made) < 10
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())


class RefusedSlide(PaintedSlide):
    """Its server refuses from some read on."""

    def read_region(
        self, x: int, y: int, width: int, height: int, mpp: float, *, upsample: bool = False
    ) -> np.ndarray:
        if self.reads >= 1:
            raise SlideAccessError("the server answers 403 ExpiredToken")
        return super().read_region(x, y, width, height, mpp, upsample=upsample)


@pytest.mark.parametrize("strip", [1, 3000])
def test_patches_that_a_server_refuses_are_not_recorded_as_unreadable(
    strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # They may be whole: once a block with NaN in their place exists, no run would read them again.
    monkeypatch.setattr(patch_reader, "MAX_STRIP_PX", strip)
    with pytest.raises(SlideAccessError, match="ExpiredToken"):
        _collect(RefusedSlide(), 7)


@pytest.mark.parametrize("threads", [1, 3, 9])
def test_several_streams_come_in_order_and_as_many_run_at_once_as_there_are_threads(threads: int) -> None:
    running, most, lock = 0, 0, threading.Lock()
    together = threading.Barrier(min(threads, 5)) if threads > 1 else None

    def stream(number: int) -> Iterator[tuple[int, int]]:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        if together is not None and number < together.parties:
            together.wait(timeout=120)  # or they do not run at once
        for i in range(7):
            yield number, i
        with lock:
            running -= 1

    streams = [lambda number=number: stream(number) for number in range(5)]
    assert list(read_in_turn(streams, threads)) == [(n, i) for n in range(5) for i in range(7)]
    assert most == min(threads, 5)


def test_several_streams_end_with_their_consumer_and_with_the_first_error() -> None:
    def endless() -> Iterator[int]:
        while True:
            yield 1

    def broken() -> Iterator[int]:
        yield 2
        raise SlideError("gone")

    stream = read_in_turn([endless, endless, broken], 3)
    assert next(stream) == 1
    stream.close()
    with pytest.raises(SlideError, match="gone"):
        list(read_in_turn([broken, endless], 2))
    assert not any(thread.name == "read-ahead" for thread in threading.enumerate())
