from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from make_slides import painted, write_pyramid

from featurestore.errors import MppError, SlideError, SlideNotFoundError, UpsamplingError
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide

WIDTH, HEIGHT = 331, 257


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return painted(WIDTH, HEIGHT)


@pytest.fixture(scope="module", params=["openslide", "flat tiff", "ome", "png"])
def slide(
    request: pytest.FixtureRequest, image: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Slide:
    folder = tmp_path_factory.mktemp("slides")
    if request.param == "openslide":
        return open_slide(str(write_pyramid(folder / "a.tif", image, 0.5)))
    if request.param == "flat tiff":
        tifffile.imwrite(folder / "b.tif", image, photometric="rgb", rowsperstrip=19, compression="zlib")
        return open_slide(str(folder / "b.tif"), 0.5)
    if request.param == "ome":
        metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
        with tifffile.TiffWriter(folder / "c.ome.tif", ome=True) as tiff:
            options = {"tile": (64, 48), "photometric": "rgb", "compression": "zlib"}
            tiff.write(image, subifds=1, metadata=metadata, **options)
            tiff.write(image[::2, ::2], subfiletype=1, **options)
        return open_slide(str(folder / "c.ome.tif"))
    (folder / "d.png").write_bytes(imagecodecs.png_encode(image))
    return open_slide(str(folder / "d.png"), 0.5)


def test_size_and_scale_are_those_of_the_file(slide: Slide) -> None:
    assert slide.size_px == (WIDTH, HEIGHT)
    assert slide.mpp == pytest.approx(0.5, rel=1e-3)
    assert slide.level_mpps[0] == pytest.approx(slide.mpp)


def test_native_pixels_are_returned_as_they_are(slide: Slide, image: np.ndarray) -> None:
    region = slide.read_region(29, 31, 211, 97, slide.mpp)
    np.testing.assert_array_equal(region, image[31 : 31 + 97, 29 : 29 + 211])


def test_beyond_the_border_is_white(slide: Slide, image: np.ndarray) -> None:
    region = slide.read_region(WIDTH - 7, -5, 23, 13, slide.mpp)
    np.testing.assert_array_equal(region[5:, :7], image[:8, -7:])
    assert (region[:5] == 255).all()
    assert (region[:, 7:] == 255).all()
    assert (slide.read_region(9999, 9999, 3, 5, slide.mpp) == 255).all()


def test_downsampling_is_the_mean_of_the_pixels_underneath(slide: Slide, image: np.ndarray) -> None:
    region = slide.read_region(3, 5, 29, 17, slide.mpp * 1.5)  # finer than the next level: from level 0
    for row, col in ((0, 0), (16, 28), (7, 11)):
        y, x = (5 + row) * 1.5, (3 + col) * 1.5
        wy = np.clip(np.minimum(np.arange(HEIGHT) + 1, y + 1.5) - np.maximum(np.arange(HEIGHT), y), 0, None)
        wx = np.clip(np.minimum(np.arange(WIDTH) + 1, x + 1.5) - np.maximum(np.arange(WIDTH), x), 0, None)
        mean = np.einsum("y,x,yxc->c", wy, wx, image.astype(float)) / (wy.sum() * wx.sum())
        np.testing.assert_allclose(region[row, col], mean, atol=0.51)


@pytest.mark.parametrize("factor", [1.37, 2.0, 3.3])
def test_a_pixel_does_not_depend_on_how_the_request_was_cut(slide: Slide, factor: float) -> None:
    mpp = slide.mpp * factor
    whole = slide.read_region(0, 0, 61, 53, mpp)
    for x, y, width, height in ((0, 0, 7, 53), (13, 17, 31, 29), (60, 52, 1, 1)):
        part = slide.read_region(x, y, width, height, mpp)
        np.testing.assert_array_equal(part, whole[y : y + height, x : x + width])


def test_upsampling_is_refused_unless_asked_for(slide: Slide) -> None:
    with pytest.raises(UpsamplingError, match="invent detail"):
        slide.read_region(0, 0, 7, 5, slide.mpp / 2)
    enlarged = slide.read_region(0, 0, 14, 10, slide.mpp / 2, upsample=True)
    np.testing.assert_array_equal(enlarged[::2, ::2], slide.read_region(0, 0, 7, 5, slide.mpp))


def test_threads_may_read_at_once(slide: Slide) -> None:
    boxes = [(i * 7 % 200, i * 11 % 150, 53, 37) for i in range(40)]
    expected = [slide.read_region(*box, slide.mpp) for box in boxes]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda box: slide.read_region(*box, slide.mpp), boxes))
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_next_coarser_level_is_read_where_it_is_fine_enough(tmp_path: Path, image: np.ndarray) -> None:
    slide = open_slide(str(write_pyramid(tmp_path / "a.tif", image[:256, :330], 0.5, levels=2)))
    level = slide.level_mpps[1]
    halves = image[:256, :330].reshape(128, 2, 165, 2, 3).mean(axis=(1, 3)).round()
    np.testing.assert_array_equal(slide.read_region(11, 13, 101, 97, level), halves[13:110, 11:112])


def test_a_slide_reads_on_after_a_damaged_tile(tmp_path: Path, image: np.ndarray) -> None:
    path = tmp_path / "a.tif"
    per_cm = 1e4 / 0.5
    tifffile.imwrite(
        path,
        image,
        tile=(64, 64),
        photometric="rgb",
        compression="zlib",
        resolution=(per_cm, per_cm),
        resolutionunit="CENTIMETER",
    )
    with tifffile.TiffFile(path) as tiff:
        offset = tiff.pages[0].dataoffsets[0]
    data = bytearray(path.read_bytes())
    data[offset : offset + 40] = b"\0" * 40
    path.write_bytes(bytes(data))
    slide = open_slide(str(path))
    assert type(slide).__name__ == "OpenSlideSlide"
    with pytest.raises(SlideError, match="cannot be read"):
        slide.read_region(0, 0, 70, 70, slide.mpp)
    np.testing.assert_array_equal(slide.read_region(128, 64, 64, 64, slide.mpp), image[64:128, 128:192])


def test_a_file_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(SlideNotFoundError, match="no slide at"):
        open_slide(str(tmp_path / "nowhere.svs"))


def test_mpp_of_two_axes_that_disagree_is_refused(tmp_path: Path, image: np.ndarray) -> None:
    tifffile.imwrite(
        tmp_path / "a.tif", image, photometric="rgb", resolution=(20000, 10000), resolutionunit="CENTIMETER"
    )
    with pytest.raises(MppError, match=r"0\.5 x 1"):
        open_slide(str(tmp_path / "a.tif"))


@pytest.mark.data
class TestRealSlides:
    @pytest.mark.parametrize(
        ("name", "size", "mpp"),
        [("cmu-1-small-region.svs", (2220, 2967), 0.499), ("openslide_boxes_0.dcm", (16, 16), 0.499)],
    )
    def test_known_slides_open(self, data_dir: Path, name: str, size: tuple[int, int], mpp: float) -> None:
        slide = open_slide(str(data_dir / "slides" / name))
        assert slide.size_px == size
        assert slide.mpp == pytest.approx(mpp, rel=1e-3)

    @pytest.mark.parametrize("name", ["slides/kidney-48-5.tif", "mob/MOB1.jpg"])
    def test_a_slide_without_mpp_says_both_ways_to_give_it(self, data_dir: Path, name: str) -> None:
        with pytest.raises(MppError, match=r"--slide-mpp.*mpp column"):
            open_slide(str(data_dir / name))
        assert open_slide(str(data_dir / name), 4.63).mpp == 4.63

    def test_an_absurd_mpp_is_refused_with_its_value(self, data_dir: Path) -> None:
        with pytest.raises(MppError, match=r"352\.8"):
            open_slide(str(data_dir / "slides" / "openslide_boxes.tiff"))

    @pytest.mark.parametrize(
        ("name", "reason"),
        [("broken.svs", "OpenSlide"), ("openslide_unopenable.tiff", "52479 is not a known")],
    )
    def test_what_cannot_be_opened_says_why_in_one_line(self, data_dir: Path, name: str, reason: str) -> None:
        with pytest.raises(SlideError) as caught:
            open_slide(str(data_dir / "slides" / name), 0.5)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)
