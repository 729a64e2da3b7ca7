"""Every way in which a file stores colours gives the same picture, or is refused with a command that converts it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import pytest
import tifffile
from make_slides import painted
from PIL import Image

from featurestore.errors import SlideError
from featurestore.slides.open_slide import open_slide

IMAGE = painted(131, 97)
PLANES = np.moveaxis(IMAGE, -1, 0)
COVERED = np.zeros(IMAGE.shape[:2], bool)
COVERED[20:70, 30:90] = True
ON_WHITE = np.where(COVERED[..., None], IMAGE, 255).astype(np.uint8)
RGBA = np.dstack([np.where(COVERED[..., None], IMAGE, 0), COVERED * np.uint8(255)]).astype(np.uint8)
GREY = np.repeat(IMAGE[..., :1], 3, axis=2)

Write = Callable[[Path], None]


def pixels(path: Path, mpp: float | None = 0.5) -> np.ndarray:
    slide = open_slide(path, mpp)
    return slide.read_region(0, 0, *slide.size_px, slide.mpp)


def refused(path: Path, mpp: float | None = 0.5) -> str:
    with pytest.raises(SlideError) as caught:
        open_slide(path, mpp)
    message = str(caught.value)
    assert "\n" not in message
    return message


def tiff(array: np.ndarray, **options: Any) -> Write:
    return lambda path: tifffile.imwrite(path, array, **options)


def ome(array: np.ndarray, axes: str, metadata: dict[str, Any] | None = None, **options: Any) -> Write:
    described = {"axes": axes, **(metadata or {})}
    return lambda path: tifffile.imwrite(path, array, ome=True, metadata=described, **options)


def pillow(array: np.ndarray, mode: str) -> Write:
    return lambda path: Image.fromarray(array).convert(mode).save(path, "TIFF")


def palette(levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return indices and 16-bit colours of a picture of few colours."""
    index = (IMAGE[..., 0] // (256 // levels)).astype(np.uint8)
    colours = np.zeros((3, 256), np.uint16)
    colours[:, :levels] = np.arange(3 * levels).reshape(3, levels) * 5 * 257
    return index, colours


INDEX, COLOURS = palette(16)
PAINTED_BY_INDEX = (COLOURS // 257).astype(np.uint8).T[INDEX]
INKS = np.dstack([255 - IMAGE // 2, IMAGE[..., 1] // 3 + 60]).astype(np.uint8)
HALF = np.uint8(128) * np.ones(IMAGE.shape[:2], np.uint8)

SAME: dict[str, tuple[Write, np.ndarray]] = {
    "planes of an OME-TIFF": (ome(PLANES, "CYX", photometric="minisblack"), IMAGE),
    "tiled planes of an OME-TIFF": (ome(PLANES, "CYX", photometric="minisblack", tile=(32, 48)), IMAGE),
    "planes named in another order": (
        ome(PLANES[::-1], "CYX", {"Channel": {"Name": ["Blue", "Green", "Red"]}}, photometric="minisblack"),
        IMAGE,
    ),
    "samples in planes": (tiff(PLANES, photometric="rgb", planarconfig="separate", rowsperstrip=11), IMAGE),
    "samples in tiled planes": (
        tiff(PLANES, photometric="rgb", planarconfig="separate", tile=(32, 48), compression="zlib"),
        IMAGE,
    ),
    "16 bits": (tiff(IMAGE.astype(np.uint16) * 257, photometric="rgb", tile=(32, 48)), IMAGE),
    "12 bits that OME states": (
        ome(
            np.round(IMAGE * (4095 / 255)).astype(np.uint16),
            "YXS",
            {"SignificantBits": 12},
            photometric="rgb",
        ),
        IMAGE,
    ),
    "12 bits that a tag states": (
        tiff(
            np.round(IMAGE * (4095 / 255)).astype(np.uint16),
            photometric="rgb",
            extratags=[(281, "H", 3, (4095, 4095, 4095), True)],
        ),
        IMAGE,
    ),
    "grey": (tiff(IMAGE[..., 0], photometric="minisblack"), GREY),
    "white is zero": (tiff(255 - IMAGE[..., 0], photometric="miniswhite"), GREY),
    "tiled, white is zero": (tiff(255 - IMAGE[..., 0], photometric="miniswhite", tile=(32, 48)), GREY),
    "palette": (tiff(INDEX, photometric="palette", colormap=COLOURS), PAINTED_BY_INDEX),
    "tiled palette": (tiff(INDEX, photometric="palette", colormap=COLOURS, tile=(32, 48)), PAINTED_BY_INDEX),
    "transparency": (tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"]), ON_WHITE),
    "tiled transparency": (
        tiff(RGBA, photometric="rgb", extrasamples=["unassalpha"], tile=(32, 48)),
        ON_WHITE,
    ),
    "transparency of an OME-TIFF": (
        ome(RGBA, "YXS", photometric="rgb", extrasamples=["unassalpha"]),
        ON_WHITE,
    ),
    "half transparent, multiplied": (
        tiff(np.dstack([IMAGE // 2, HALF]), photometric="rgb", extrasamples=["assocalpha"]),
        IMAGE // 2 + 127,
    ),
    "JPEG strips": (
        tiff(IMAGE, photometric="rgb", compression="jpeg", compressionargs={"level": 98}, rowsperstrip=16),
        IMAGE,
    ),
}
SAME["grey with transparency"] = (
    tiff(
        np.dstack([RGBA[..., 0], RGBA[..., 3]]),
        photometric="minisblack",
        planarconfig="contig",
        extrasamples=["unassalpha"],
    ),
    np.repeat(ON_WHITE[..., :1], 3, axis=2),
)


@pytest.mark.parametrize("name", SAME)
def test_a_tiff_has_the_colours_of_its_photometric_interpretation(tmp_path: Path, name: str) -> None:
    write, expected = SAME[name]
    write(tmp_path / "a.tif")
    difference = np.abs(pixels(tmp_path / "a.tif").astype(int) - expected)
    # JPEG halves the resolution of colours, which noise shows.
    assert difference.mean() < 8 if "JPEG" in name else not difference.any()


def test_cmyk_is_converted_as_pillow_does(tmp_path: Path) -> None:
    picture = Image.fromarray(INKS, "CMYK")
    picture.save(tmp_path / "a.tif")
    np.testing.assert_array_equal(pixels(tmp_path / "a.tif"), np.asarray(picture.convert("RGB")))
    picture.save(tmp_path / "a.jpg", quality=95)
    expected = np.asarray(Image.open(tmp_path / "a.jpg").convert("RGB")).astype(int)
    np.testing.assert_allclose(pixels(tmp_path / "a.jpg").astype(int), expected, atol=3)
    assert (
        expected.mean() < np.asarray(Image.fromarray(255 - INKS[..., :3])).mean() - 20
    )  # the black channel counts


FLUORESCENCE = {"Channel": {"Name": ["DAPI", "FITC", "Cy5"]}}
COLOURED = {"Channel": {"Name": ["DAPI", "FITC", "Cy5"], "Color": [65535, 16711935, -16776961]}}
REFUSED: dict[str, tuple[Write, str]] = {
    "12 bits or 16": (
        tiff(IMAGE.astype(np.uint16) * 16, photometric="rgb"),
        "how many are in use; convert it: vips linear",
    ),
    "more bits than stated": (
        ome(IMAGE.astype(np.uint16) * 257, "YXS", {"SignificantBits": 12}, photometric="rgb"),
        "how many are in use",
    ),
    "floats": (tiff(IMAGE / np.float32(255), photometric="rgb"), "pixels are float32"),
    "a fourth sample": (tiff(RGBA, photometric="rgb", extrasamples=["unspecified"]), "vips extract_band"),
    "CIELAB": (tiff(IMAGE, photometric="cielab"), "photometric interpretation CIELAB"),
    "raw YCbCr": (pillow(IMAGE, "YCbCr"), "YCbCr in codec 1"),
    "turned": (tiff(IMAGE, photometric="rgb", extratags=[(274, "H", 1, 6, True)]), "Orientation 6"),
    "turned, tiled": (
        tiff(IMAGE, photometric="rgb", tile=(32, 48), extratags=[(274, "H", 1, 6, True)]),
        "vips autorot",
    ),
    "depths": (ome(np.stack([IMAGE] * 3), "ZYXS", photometric="rgb"), "3 planes (Z=3"),
    "fluorescence": (ome(PLANES, "CYX", FLUORESCENCE, photometric="minisblack"), "DAPI, FITC, Cy5"),
    "fluorescence in primary colours": (
        ome(PLANES, "CYX", COLOURED, photometric="minisblack"),
        "DAPI, FITC, Cy5",
    ),
    "one channel under fluorescence": (
        ome(IMAGE[..., 0], "YX", {"Channel": {"EmissionWavelength": 461.0}}, photometric="minisblack"),
        "one channel under fluorescence",
    ),
    "four channels": (ome(np.stack([IMAGE[..., 0]] * 4), "CYX", photometric="minisblack"), "4 planes (C=4"),
    "ImageJ's channels": (tiff(PLANES, imagej=True, metadata={"axes": "CYX"}), "vips bandjoin"),
    "three grey pages": (tiff(PLANES, photometric="minisblack", metadata=None), "3 planes"),
    "three tiled grey pages": (
        tiff(PLANES, photometric="minisblack", metadata=None, tile=(32, 48)),
        "3 planes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_tiff_that_leaves_its_colours_open_is_refused(tmp_path: Path, name: str) -> None:
    write, reason = REFUSED[name]
    write(tmp_path / "a.tif")
    message = refused(tmp_path / "a.tif")
    assert reason in message
    assert "OpenSlide" not in message


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1"])
def test_pngs_of_every_kind_are_pictures_on_white(tmp_path: Path, mode: str) -> None:
    picture = Image.fromarray(RGBA)
    if mode in ("P", "L", "1"):
        picture = Image.fromarray(ON_WHITE)
    picture = picture.convert(mode)
    picture.save(tmp_path / "a.png")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture.convert("RGBA"))
    np.testing.assert_array_equal(pixels(tmp_path / "a.png"), np.asarray(flat)[..., :3])


def test_a_png_of_16_bits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(IMAGE.astype(np.uint16)))
    assert "pixels are uint16; a slide is 8-bit RGB; convert it: vips" in refused(tmp_path / "a.png")


def write_images(
    path: Path, *images: tuple[str, np.ndarray, float | None], is_ome: bool = True, **options: Any
) -> Path:
    with tifffile.TiffWriter(path, ome=is_ome) as file:
        for name, image, mpp in images:
            scale = {"PhysicalSizeX": mpp, "PhysicalSizeY": mpp} if mpp else {}
            metadata = {"axes": "YXS", "Name": name, **scale} if is_ome else None
            file.write(image, photometric="rgb", metadata=metadata, **options)
    return path


SMALL = painted(60, 40, seed=1)


@pytest.mark.parametrize("options", [{}, {"tile": (32, 48)}])
@pytest.mark.parametrize("is_ome", [True, False])
def test_the_slide_is_not_the_overview_before_it(
    tmp_path: Path, is_ome: bool, options: dict[str, Any]
) -> None:
    file = write_images(tmp_path / "a.tif", ("", SMALL, 9.0), ("", IMAGE, 0.5), is_ome=is_ome, **options)
    np.testing.assert_array_equal(pixels(file, None if is_ome else 0.5), IMAGE)


def test_an_image_named_as_label_is_not_the_slide_however_large(tmp_path: Path) -> None:
    file = write_images(tmp_path / "a.ome.tif", ("Label Image", IMAGE, None), ("scan", SMALL, 0.5))
    np.testing.assert_array_equal(pixels(file, None), SMALL)


@pytest.mark.parametrize("options", [{}, {"tile": (32, 48)}])
@pytest.mark.parametrize("is_ome", [True, False])
def test_two_scans_in_one_file_are_refused(tmp_path: Path, is_ome: bool, options: dict[str, Any]) -> None:
    other = painted(120, 90, seed=2)
    file = write_images(tmp_path / "a.tif", ("A", IMAGE, 0.5), ("B", other, 0.5), is_ome=is_ome, **options)
    message = refused(file)
    assert "several images, of 131 x 97 px and 120 x 90 px" in message
    assert "vips tiffsave" in message


def test_levels_in_pages_of_a_flat_tiff_are_used_where_they_are_marked(tmp_path: Path) -> None:
    half = IMAGE[:96:2, :130:2]
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        file.write(IMAGE, photometric="rgb", metadata=None)
        file.write(half, photometric="rgb", metadata=None, subfiletype=1)
        file.write(
            painted(33, 24, seed=3), photometric="rgb", metadata=None
        )  # the glass, in the same proportions
    slide = open_slide(tmp_path / "a.tif", 0.5)
    assert len(slide.level_mpps) == 2
    np.testing.assert_array_equal(slide.read_region(0, 0, 65, 48, slide.level_mpps[1]), half)


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_picture_that_exif_turns_is_refused(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"A.{suffix}"
    Image.fromarray(IMAGE).save(path, exif=exif)
    if orientation == 1:
        assert open_slide(path, 0.5).size_px == (IMAGE.shape[1], IMAGE.shape[0])
        return
    with pytest.raises(SlideError, match=r"EXIF orientation 6.*vips autorot"):
        open_slide(path, 0.5)
