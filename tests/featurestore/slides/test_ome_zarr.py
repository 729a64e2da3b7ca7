"""OME-Zarr as slides, written by plain zarr in both versions of the format."""

from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import zarr
from make_slides import tissue_like

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import MppError, SlideError
from featurestore.grid import GridSpec
from featurestore.slides.download_cache import ENV_FOLDER
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store

MPP = 1.5
IMAGE = tissue_like(620, 540, MPP)
HALF = IMAGE.reshape(270, 2, 310, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)


def _write(
    path: Path,
    version: str,
    axes: str = "cyx",
    unit: str | None = "micrometer",
    scale: float = MPP,
    **change: Any,
) -> Path:
    root = zarr.create_group(path, zarr_format=2 if version == "0.4" else 3)
    for level, image in enumerate((IMAGE, HALF)):
        expanded = image.reshape(*(1 for name in axes if name in "tz"), *image.shape)
        order = [name for name in axes if name in "tz"] + ["y", "x", "c"]
        data = expanded.transpose([order.index(name) for name in axes]).astype(change.get("dtype", np.uint8))
        root.create_array(str(level), data=data, chunks=tuple(min(n, 128) for n in data.shape))
    named = [{"name": n, "type": "channel" if n == "c" else "time" if n == "t" else "space"} for n in axes]
    for axis in named:
        if axis["type"] == "space" and unit:
            axis["unit"] = unit
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [scale * 2**level if n in "yx" else 1.0 for n in axes]}
            ],
        }
        for level in range(2)
    ]
    image = {"axes": named, "datasets": datasets}
    root.attrs.update(
        {"multiscales": [{"version": "0.4", **image}]}
        if version == "0.4"
        else {"ome": {"version": "0.5", "multiscales": [image]}}
    )
    return path


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("axes", ["cyx", "yxc", "tczyx"])
def test_both_versions_and_any_order_of_axes_are_the_same_slide(
    tmp_path: Path, version: str, axes: str
) -> None:
    slide = open_slide(str(_write(tmp_path / "a.zarr", version, axes)))
    assert slide.size_px == (620, 540)
    assert slide.mpp == MPP
    assert slide.level_mpps == (MPP, 2 * MPP)
    np.testing.assert_array_equal(slide.read_region(100, 50, 200, 150, MPP), IMAGE[50:200, 100:300])
    np.testing.assert_array_equal(slide.read_region(10, 20, 50, 40, 2 * MPP), HALF[20:60, 10:60])
    assert (slide.read_region(-5, -5, 5, 5, MPP) == 255).all()
    slide.close()


@pytest.mark.parametrize(("unit", "scale"), [("nanometer", 1500.0), ("millimeter", 0.0015)])
def test_units_of_length_are_turned_into_microns(tmp_path: Path, unit: str, scale: float) -> None:
    path = _write(tmp_path / "a.zarr", "0.5", unit=unit, scale=scale)
    assert open_slide(str(path)).mpp == pytest.approx(MPP)


def test_a_remote_one_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "cache"))
    path = _write(tmp_path / "a.zarr", "0.5")
    fsspec.filesystem("memory").put(str(path), "/remote/a.zarr", recursive=True)
    for url in ("memory://remote/a.zarr", "memory://remote/a.zarr/"):
        slide = open_slide(url)
        np.testing.assert_array_equal(slide.read_region(100, 50, 200, 150, MPP), IMAGE[50:200, 100:300])
        assert slide.source == url
        assert slide_fingerprint(url) == slide_fingerprint(str(path))
    assert not (tmp_path / "cache").exists()


def test_without_a_unit_the_scale_must_be_given(tmp_path: Path) -> None:
    path = str(_write(tmp_path / "a.zarr", "0.4", unit=None))
    with pytest.raises(MppError, match="--slide-mpp"):
        open_slide(path)
    assert open_slide(path, 0.5).mpp == 0.5


def test_what_is_no_rgb_picture_is_refused_in_one_line(tmp_path: Path) -> None:
    zarr.create_group(tmp_path / "empty.zarr")
    deep = _write(tmp_path / "deep.zarr", "0.5", dtype=np.uint16)
    for path in (tmp_path / "empty.zarr", deep, tmp_path / "none.zarr"):
        with pytest.raises(SlideError) as refused:
            open_slide(str(path))
        assert "\n" not in str(refused.value)


def test_it_is_embedded_like_any_slide_and_known_again(tmp_path: Path) -> None:
    path = _write(tmp_path / "slides" / "a.zarr", "0.5")
    settings = EmbedSettings(("colour",), GridSpec(MPP, 32, 32))
    for samples in (str(path), str(path.parent)):
        (result,) = embed(samples, str(tmp_path / "store"), settings)
        assert (result.slide_id, result.state) == ("a", "done")
    assert result.computed == 0
    known = Store.open(str(tmp_path / "store")).slide("a").fingerprint
    assert known == slide_fingerprint(str(path))
    zarr.open_group(path)["0"][0, :200, :200] = 0
    assert slide_fingerprint(str(path)) != known


def _channels(*channels: tuple[str, str]) -> dict[str, Any]:
    return {"channels": [{"label": label, "color": colour} for label, colour in channels]}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize(
    ("channels", "order"),
    [
        ((("", "FF0000"), ("", "00FF00"), ("", "0000FF")), (0, 1, 2)),
        ((("Channel 0", "FFFFFF"), ("Channel 1", "FFFFFF"), ("Channel 2", "FFFFFF")), (0, 1, 2)),
        ((("Blue", "0000FF"), ("Green", "00FF00"), ("Red", "FF0000")), (2, 1, 0)),
        ((("0", "0000FF"), ("1", "00FF00"), ("2", "FF0000")), (2, 1, 0)),
        ((("DAPI", "0000FF"), ("FITC", "00FF00"), ("Cy5", "FF0000")), None),
        ((("0", "0000FF"), ("1", "00FF00"), ("2", "FF00FF")), None),
    ],
)
def test_three_channels_are_colours_only_if_they_can_be(
    tmp_path: Path, version: str, channels: tuple[tuple[str, str], ...], order: tuple[int, ...] | None
) -> None:
    path = _write(tmp_path / "A.zarr", version)
    root = zarr.open_group(path, mode="r+")
    about = {"omero": _channels(*channels)}
    root.attrs.update(about if version == "0.4" else {"ome": {**root.attrs["ome"], **about}})
    if order is None:
        with pytest.raises(SlideError, match="not red, green and blue"):
            open_slide(path)
        return
    pixels = open_slide(path).read_region(0, 0, 620, 540, MPP)
    np.testing.assert_array_equal(pixels, IMAGE[..., order])


def test_stains_in_16_bits_and_other_numbers_of_channels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SlideError, match="8-bit RGB"):
        open_slide(_write(tmp_path / "A.zarr", "0.5", dtype=np.uint16))
    root = zarr.create_group(tmp_path / "B.zarr")
    root.create_array("0", data=np.zeros((5, 64, 64), np.uint8))
    axes = [{"name": name, "unit": "micrometer"} for name in "cyx"]
    datasets = [{"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, 0.5, 0.5]}]}]
    root.attrs["ome"] = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": datasets}]}
    with pytest.raises(SlideError, match="8-bit RGB, three channels"):
        open_slide(tmp_path / "B.zarr")
