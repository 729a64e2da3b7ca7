"""JPEG tiles read straight from the file, held against OpenSlide."""

import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
import simplejpeg
import tifffile
from make_slides import painted, write_pyramid

from featurestore.blocks import Block
from featurestore.errors import MppError, SlideError
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides import pyramid_slide as levels
from featurestore.slides.open_slide import open_slide
from featurestore.slides.patch_reader import read_batches
from featurestore.slides.readers.jpeg_tile_reader import JpegTileSlide
from featurestore.slides.readers.openslide_reader import OpenSlideSlide
from featurestore.slides.tiff_colours import on_white

MPP = 0.5
APERIO = f"Aperio Image Library v12.0.15\r\n499x419 (64x48) JPEG/RGB Q=90|MPP = {MPP}"
APP0, APP14, DQT, DHT, SOS = 0xE0, 0xEE, 0xDB, 0xC4, 0xDA


@dataclass(frozen=True)
class Form:
    """How the generated file stores its tiles."""

    photometric: str = "ycbcr"
    subsampling: str = "420"
    shared_tables: bool = False
    drop: tuple[int, ...] = ()
    tile: tuple[int, int] = (48, 64)
    levels: int = 3
    aperio: bool = False
    stored_as: str | None = None
    """Colours of the streams, where they are not what the tag says."""


def segments(stream: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield a JPEG's segments up to its scan, which is the last."""
    at = 2
    while stream[at + 1] != SOS:
        stop = at + 2 + int.from_bytes(stream[at + 2 : at + 4], "big")
        yield stream[at + 1], stream[at:stop]
        at = stop
    yield SOS, stream[at:]


def encoded(image: np.ndarray, form: Form) -> Iterator[bytes]:
    height, width = form.tile
    padded = np.pad(image, ((0, -image.shape[0] % height), (0, -image.shape[1] % width), (0, 0)), mode="edge")
    for y in range(0, padded.shape[0], height):
        for x in range(0, padded.shape[1], width):
            tile = np.ascontiguousarray(padded[y : y + height, x : x + width])
            stored_as = form.stored_as or form.photometric
            subsampling = form.subsampling if stored_as == "ycbcr" else None
            yield bytes(
                imagecodecs.jpeg8_encode(
                    tile, level=90, colorspace="RGB", outcolorspace=stored_as.upper(), subsampling=subsampling
                )
            )


def written(path: Path, image: np.ndarray, form: Form) -> Path:
    """Write a pyramid of JPEG tiles, each level half the one above."""
    with tifffile.TiffWriter(path) as tiff:
        for level in range(form.levels):
            step = 2**level
            height, width = image.shape[0] // step * step, image.shape[1] // step * step
            means = (
                image[:height, :width].reshape(height // step, step, width // step, step, 3).mean(axis=(1, 3))
            )
            streams = list(encoded(means.round().astype(np.uint8), form))
            shared = (DQT, DHT) if form.shared_tables else ()
            tables = b"".join(part for kind, part in segments(streams[0]) if kind in shared)
            kept = [
                b"\xff\xd8"
                + b"".join(part for kind, part in segments(s) if kind not in (*shared, *form.drop))
                for s in streams
            ]
            tiff.write(
                iter(kept),
                shape=means.shape,
                dtype=np.uint8,
                tile=form.tile,
                photometric=form.photometric,
                subsampling=(
                    int(form.subsampling[0]) // int(form.subsampling[1]),
                    2 if form.subsampling[2] == "0" else 1,
                )
                if form.photometric == "ycbcr"
                else None,
                compression="jpeg",
                jpegtables=b"\xff\xd8" + tables + b"\xff\xd9" if form.shared_tables else None,
                resolution=(1e4 / MPP / step, 1e4 / MPP / step),
                resolutionunit="CENTIMETER",
                subfiletype=1 if level and not form.aperio else 0,
                description=APERIO if form.aperio else None,
                metadata=None,
            )
    return path


FORMS = {
    "4:2:0": Form(),
    "4:2:2": Form(subsampling="422"),
    "4:4:4": Form(subsampling="444"),
    "shared tables": Form(shared_tables=True),
    "shared tables, no JFIF": Form(shared_tables=True, drop=(APP0,)),
    "RGB with Adobe's marker": Form("rgb", "444"),
    "RGB without a marker": Form("rgb", "444", drop=(APP0, APP14)),
    "RGB without a marker, shared tables": Form("rgb", "444", shared_tables=True, drop=(APP0, APP14)),
    "YCbCr that says RGB": Form(subsampling="444", stored_as="rgb"),
    "RGB that says YCbCr": Form("rgb", "420", stored_as="ycbcr"),
    "one tile": Form(tile=(512, 512), levels=1),
    "Aperio": Form(shared_tables=True, aperio=True),
    "Aperio in RGB": Form("rgb", "444", shared_tables=True, drop=(APP0, APP14), aperio=True),
}
IMAGE = painted(499, 419)


@pytest.fixture
def pyramid_slide(tmp_path: Path) -> Path:
    return written(tmp_path / "a.tif", IMAGE, Form())


def oracle(handle: openslide.OpenSlide, level: int, x: int, y: int, width: int, height: int) -> np.ndarray:
    """Ask OpenSlide; at coarser levels only where it does not shift by fractions of a pixel."""
    scale = handle.level_downsamples[level]
    at = (round(x * scale), round(y * scale))
    assert at == (x * scale, y * scale)
    rgba = np.asarray(handle.read_region(at, level, (width, height)))
    return on_white(rgba[..., :3], rgba[..., 3:])


def assert_equals_openslide(path: Path, most_px: int = 4096) -> None:
    """Compare the first 4096 pixels of every level, the most that OpenSlide reads without a shift."""
    slide = JpegTileSlide(str(path), MPP)
    with openslide.OpenSlide(path) as handle:
        assert slide.size_px == handle.dimensions
        assert slide.level_mpps == OpenSlideSlide(str(path), MPP).level_mpps
        for level, size in enumerate(handle.level_dimensions):
            width, height = (min(side, most_px) for side in size)
            expected = oracle(handle, level, 0, 0, width, height)
            found = slide.read_region(0, 0, width, height, slide.level_mpps[level])
            np.testing.assert_array_equal(found, expected, err_msg=f"level {level}")


def overwrite(path: Path, tile: int, change: Callable[[bytes], bytes], level: int = 0) -> None:
    """Change a tile's stream in place; a shorter one gets its new length written."""
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[level]
        offset, count, tag = page.dataoffsets[tile], page.databytecounts[tile], page.tags["TileByteCounts"]
        form = tiff.byteorder + {3: "H", 4: "I", 16: "Q"}[int(tag.dtype)]
        at = tag.valueoffset + tile * struct.calcsize(form)
    data = bytearray(path.read_bytes())
    changed = change(bytes(data[offset : offset + count]))
    assert len(changed) <= count
    data[offset : offset + len(changed)] = changed
    data[at : at + struct.calcsize(form)] = struct.pack(form, len(changed))
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_native_pixels_equal_openslide_however_they_are_stored(tmp_path: Path, form: Form) -> None:
    assert_equals_openslide(written(tmp_path / ("a.svs" if form.aperio else "a.tif"), IMAGE, form))


def test_any_region_equals_openslide(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", painted(512, 384), Form())  # halves evenly: no shifts at any level
    slide, rng = JpegTileSlide(str(path), None), np.random.default_rng(3)
    with openslide.OpenSlide(path) as handle:
        for level, (width, height) in enumerate(handle.level_dimensions):
            for _ in range(40):
                x, y = int(rng.integers(width)), int(rng.integers(height))
                w, h = int(rng.integers(1, width - x + 1)), int(rng.integers(1, height - y + 1))
                found = slide.read_region(x, y, w, h, slide.level_mpps[level])
                np.testing.assert_array_equal(found, oracle(handle, level, x, y, w, h))


def test_open_slide_prefers_it(pyramid_slide: Path, tmp_path: Path) -> None:
    assert isinstance(open_slide(str(pyramid_slide)), JpegTileSlide)
    path = written(tmp_path / "a.svs", IMAGE, Form(aperio=True))
    slide = open_slide(str(path))
    assert isinstance(slide, JpegTileSlide)
    assert slide.mpp == OpenSlideSlide(str(path), None).mpp == MPP
    assert open_slide(str(path), 0.25).mpp == 0.25


def test_scale_is_asked_for_where_the_file_has_none(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, tile=(64, 64), photometric="ycbcr", compression="jpeg")
    with pytest.raises(MppError):
        JpegTileSlide(str(tmp_path / "a.tif"), None)
    assert JpegTileSlide(str(tmp_path / "a.tif"), 0.7).mpp == 0.7


def test_thumbnail_label_and_macro_are_no_levels(tmp_path: Path) -> None:
    path = written(tmp_path / "a.svs", IMAGE, Form(aperio=True, levels=2))
    for kind in (0, 1, 9):
        strip = painted(71, 53)
        tifffile.imwrite(path, strip, append=True, photometric="rgb", subfiletype=kind, metadata=None)
    assert len(JpegTileSlide(str(path), None).level_mpps) == 2
    assert_equals_openslide(path)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "lzw", "tile": (64, 64), "photometric": "rgb"},
        {"compression": "zlib", "tile": (64, 64), "photometric": "rgb"},
        {"compression": "jpeg2000", "tile": (64, 64), "photometric": "rgb"},
        {"tile": (64, 64), "photometric": "rgb"},
        {"compression": "jpeg", "rowsperstrip": 64, "photometric": "ycbcr"},
    ],
    ids=["lzw", "deflate", "jpeg 2000", "plain", "strips"],
)
def test_what_is_not_jpeg_tiles_is_left_to_the_other_readers(
    tmp_path: Path, options: dict[str, object]
) -> None:
    tifffile.imwrite(tmp_path / "a.tif", IMAGE, **options)
    with pytest.raises(SlideError):
        JpegTileSlide(str(tmp_path / "a.tif"), MPP)


def test_grey_and_16_bit_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", IMAGE[..., 0], tile=(64, 64), compression="jpeg")
    with pytest.raises(SlideError, match="not the slide in plain RGB"):
        JpegTileSlide(str(tmp_path / "a.tif"), MPP)
    tifffile.imwrite(tmp_path / "b.tif", IMAGE.astype(np.uint16), tile=(64, 64), photometric="rgb")
    with pytest.raises(SlideError):
        JpegTileSlide(str(tmp_path / "b.tif"), MPP)


def test_one_level_of_another_codec_is_enough_to_be_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", IMAGE, Form(levels=1))
    options = {
        "tile": (64, 64),
        "photometric": "rgb",
        "compression": "zlib",
        "subfiletype": 1,
        "metadata": None,
    }
    tifffile.imwrite(path, IMAGE[::2, ::2], append=True, **options)
    with pytest.raises(SlideError, match="codec 8"):
        JpegTileSlide(str(path), MPP)
    assert isinstance(open_slide(str(path), MPP), OpenSlideSlide)


@pytest.mark.parametrize("level", [0, 1])
def test_a_missing_tile_looks_as_openslide_shows_it(pyramid_slide: Path, level: int) -> None:
    overwrite(pyramid_slide, 9, lambda _: b"", level)
    assert_equals_openslide(pyramid_slide)


@pytest.mark.parametrize("level", [0, 1])
def test_missing_tiles_that_openslide_redraws_from_finer_levels_are_left_to_it(
    tmp_path: Path, level: int
) -> None:
    path = written(tmp_path / "a.svs", IMAGE, Form(aperio=True))
    overwrite(path, 3, lambda _: b"", level)
    with pytest.raises(SlideError, match="missing"):
        JpegTileSlide(str(path), None)
    assert isinstance(open_slide(str(path)), OpenSlideSlide)


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "zeros": lambda stream: bytes(len(stream)),
    "cut off": lambda stream: stream[: len(stream) * 2 // 3],
    "ends too early": lambda stream: (
        stream[: len(stream) // 2] + b"\xff\xd9" + stream[len(stream) // 2 + 2 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_slide_reads_on_after_a_damaged_tile(pyramid_slide: Path, damage: Callable[[bytes], bytes]) -> None:
    before = JpegTileSlide(str(pyramid_slide), None).read_region(0, 0, 499, 419, MPP)
    overwrite(pyramid_slide, 10, damage)  # across 128:192, down 48:96
    slide = JpegTileSlide(str(pyramid_slide), None)
    with openslide.OpenSlide(pyramid_slide) as handle, pytest.raises(openslide.OpenSlideError):
        handle.read_region((130, 50), 0, (11, 13))
    for _ in range(2):
        with pytest.raises(SlideError, match="level 0, tile 10"):
            slide.read_region(0, 0, 499, 419, MPP)
        np.testing.assert_array_equal(slide.read_region(192, 29, 211, 97, MPP), before[29:126, 192:403])


def test_only_the_patches_on_a_damaged_tile_are_lost(pyramid_slide: Path) -> None:
    overwrite(pyramid_slide, 10, DAMAGES["zeros"])
    slide = JpegTileSlide(str(pyramid_slide), None)
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, GridSpec(MPP, 31, 23))
    block = Block((0, 0), (0, grid.n_rows), (0, grid.n_cols))
    lost = set()
    for batch in read_batches(slide, grid, block, np.ones(block.shape, bool), 7):
        lost |= {(row, col) for row, col, _ in batch.failures}
    touched = {
        (r, c)
        for r in range(grid.n_rows)
        for c in range(grid.n_cols)
        if 48 - 31 < r * 23 < 96 and 128 - 31 < c * 23 < 192
    }
    assert lost == touched


def test_bytes_left_over_after_the_picture_do_no_harm(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", IMAGE, Form(subsampling="444", levels=1))
    whole = JpegTileSlide(str(path), None).read_region(0, 0, 499, 419, MPP)
    short = next(encoded(painted(64, 48, 7) // 16 * 16, Form(subsampling="420")))
    overwrite(path, 10, lambda _: short[:-2] + bytes(range(1, 14)) + short[-2:])
    assert_equals_openslide(path)
    assert (JpegTileSlide(str(path), None).read_region(0, 0, 499, 419, MPP) != whole).any()


def test_a_file_that_was_cut_off_fails_where_it_ends(tmp_path: Path) -> None:
    path = written(tmp_path / "a.tif", IMAGE, Form(levels=1))
    with tifffile.TiffFile(path) as tiff:
        last = tiff.pages[0].dataoffsets[-1]
    slide = JpegTileSlide(str(path), None)  # OpenSlide would not open what is cut off already
    path.write_bytes(path.read_bytes()[: last + 31])
    with pytest.raises(SlideError, match="ends within it"):
        slide.read_region(480, 400, 7, 5, MPP)
    assert slide.read_region(0, 0, 7, 5, MPP).shape == (5, 7, 3)


def test_threads_may_read_at_once(pyramid_slide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("featurestore.slides.readers.jpeg_tile_reader.CACHED_PX", 5 * 64 * 48)
    monkeypatch.setattr(
        "featurestore.slides.readers.jpeg_tile_reader.OVERLAP_PX", 3
    )  # most tiles through the threads' buffers
    slide = JpegTileSlide(str(pyramid_slide), None)
    whole = slide.read_region(0, 0, 499, 419, MPP)
    boxes = [(i * 29 % 290, i * 31 % 210, 199, 197) for i in range(120)]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda box: slide.read_region(*box, MPP), boxes))
    for (x, y, width, height), pixels in zip(boxes, found, strict=True):
        np.testing.assert_array_equal(pixels, whole[y : y + height, x : x + width])


@pytest.mark.parametrize("scale", [1, 2])
def test_overlapping_strips_and_blocks_decode_each_tile_once(
    pyramid_slide: Path, scale: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    decode = simplejpeg.decode_jpeg

    def counting(stream: bytes, **options: object) -> np.ndarray:
        decoded.append(stream)
        return decode(stream, **options)

    slide = JpegTileSlide(str(pyramid_slide), None)
    monkeypatch.setattr(simplejpeg, "decode_jpeg", counting)
    for y in range(0, 419 // scale - 40, 40):
        for x in (0, 90):
            slide.read_region(x, y, 130, 79, MPP * (1 if scale == 1 else 1.5))
    assert len(set(decoded)) == len(decoded) > 9


@pytest.mark.parametrize("factor", [2, 4, 8, 16])
def test_whole_scales_give_the_very_bits_of_the_weighted_mean(
    tmp_path: Path, factor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = JpegTileSlide(str(written(tmp_path / "a.tif", IMAGE, Form(levels=1))), None)
    inside, beyond = (1, 2, 17, 13), (-3, 499 // factor - 7, 41, 37)
    found = [slide.read_region(*box, MPP * factor) for box in (inside, beyond)]
    monkeypatch.setattr(levels, "BINARY_FACTORS", ())
    for box, pixels in zip((inside, beyond), found, strict=True):
        np.testing.assert_array_equal(pixels, slide.read_region(*box, MPP * factor))


@pytest.mark.parametrize("factor", [1, 1.37, 2, 4])
def test_a_pixel_does_not_depend_on_how_the_request_was_cut(tmp_path: Path, factor: float) -> None:
    slide = JpegTileSlide(str(written(tmp_path / "a.tif", IMAGE, Form(levels=1))), None)
    whole = slide.read_region(0, 0, 124, 104, MPP * factor)
    for x, y, width, height in ((0, 0, 7, 53), (13, 17, 97, 71), (60, 52, 1, 1), (31, 47, 93, 57)):
        part = slide.read_region(x, y, width, height, MPP * factor)
        np.testing.assert_array_equal(part, whole[y : y + height, x : x + width])


def test_a_slide_of_other_readers_halves_to_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slide = open_slide(str(write_pyramid(tmp_path / "a.tif", IMAGE, MPP, levels=1)))
    assert isinstance(slide, OpenSlideSlide)
    monkeypatch.setattr(levels, "MAX_SOURCE_PX", 9000)
    found = slide.read_region(-3, 5, 271, 197, MPP * 2)
    monkeypatch.setattr(levels, "BINARY_FACTORS", ())
    np.testing.assert_array_equal(found, slide.read_region(-3, 5, 271, 197, MPP * 2))


def test_a_closed_slide_says_so_and_closing_twice_is_allowed(pyramid_slide: Path) -> None:
    slide = JpegTileSlide(str(pyramid_slide), None)
    slide.close()
    slide.close()
    with pytest.raises(SlideError, match="closed file"):
        slide.read_region(0, 0, 3, 5, MPP)


@pytest.mark.data
class TestRealSlides:
    @pytest.mark.parametrize(
        "name",
        [
            "slides/cmu-1-small-region.svs",
            "slides/openslide_small.svs",
            "her2st/C2.tif",
            # From the same scanner.
            *(pytest.param(f"her2st/{name}.tif", marks=pytest.mark.slow) for name in ("C3", "C4")),
        ],
    )
    def test_every_level_equals_openslide(self, data_dir: Path, name: str) -> None:
        assert isinstance(open_slide(str(data_dir / name)), JpegTileSlide)
        assert_equals_openslide(data_dir / name)

    @pytest.mark.parametrize("name", ["her2st/C2.tif", "her2st/C3.tif", "her2st/C4.tif"])
    def test_regions_and_borders_equal_openslide(self, data_dir: Path, name: str) -> None:
        slide, rng = JpegTileSlide(str(data_dir / name), None), np.random.default_rng(5)
        (width, height), side = slide.size_px, 311
        corners = [(0, 0), (width - side, 0), (0, height - side), (width - side, height - side)]
        edges = [(width - side, int(y)) for y in rng.integers(0, height - side, 8)]
        edges += [(int(x), height - side) for x in rng.integers(0, width - side, 8)]
        anywhere = [(int(rng.integers(width - side)), int(rng.integers(height - side))) for _ in range(40)]
        with openslide.OpenSlide(data_dir / name) as handle:
            for x, y in (*corners, *edges, *anywhere):
                found = slide.read_region(x, y, side, side, slide.mpp)
                np.testing.assert_array_equal(found, oracle(handle, 0, x, y, side, side))

    @pytest.mark.parametrize(
        "name", ["slides/kidney-48-5.tif", "slides/openslide_boxes.tiff", "slides/broken.svs"]
    )
    def test_other_files_are_left_to_the_other_readers(self, data_dir: Path, name: str) -> None:
        with pytest.raises(SlideError):
            JpegTileSlide(str(data_dir / name), MPP)
