"""Where a slide's microns per pixel come from: its file, the sample sheet, or ``--slide-mpp`` for what states none."""

import warnings
from pathlib import Path

import imagecodecs
import pytest
import tifffile
from make_slides import painted, write_pyramid

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import MppError, SlideWarning
from featurestore.grid import GridSpec
from featurestore.slides.open_slide import open_slide
from featurestore.slides.units import microns

IMAGE = painted(131, 97)


def write_ome(path: Path, size: str, unit: str) -> Path:
    sizes = {f"PhysicalSize{axis}": 0.123 for axis in "XY"} | {
        f"PhysicalSize{axis}Unit": "@" for axis in "XY"
    }
    tifffile.imwrite(path, IMAGE, photometric="rgb", ome=True, metadata={"axes": "YXS", **sizes})
    with tifffile.TiffFile(path) as file:
        text = str(file.ome_metadata).replace("0.123", size).replace("@", unit)
    tifffile.tiffcomment(path, text.encode())
    return path


@pytest.mark.parametrize(
    ("size", "unit", "expected"),
    [
        ("0.5", "µm", 0.5),
        ("0.5", "μm", 0.5),
        ("0.5", "um", 0.5),
        ("0.5", "micron", 0.5),
        (" 0,5 ", "Micrometer", 0.5),
        ("500", "nm", 0.5),
        ("5e-7", "m", 0.5),
        ("5000", "Å", 0.5),
        ("0.5", "Mm", None),
        ("0.5", "pixel", None),
        ("0.0", "µm", None),
        ("-1", "µm", None),
        ("nan", "µm", None),
        ("half", "µm", None),
        ("", "µm", None),
        (None, "µm", None),
    ],
)
def test_lengths_are_read_in_the_units_that_files_write(
    size: str | None, unit: str, expected: float | None
) -> None:
    assert microns(size, unit) == (pytest.approx(expected) if expected else None)


@pytest.mark.parametrize(("size", "unit"), [("0,5", "µm"), ("5e-7", "m"), ("0.5", "μm"), ("0.5", "micron")])
def test_ome_scales_are_read_where_they_are_clear(tmp_path: Path, size: str, unit: str) -> None:
    assert open_slide(write_ome(tmp_path / "a.ome.tif", size, unit)).mpp == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("size", "unit"), [("0.0", "µm"), ("half", "µm"), ("0.5", "pixel"), ("50", "µm"), ("0.01", "µm")]
)
def test_absurd_scales_are_refused_and_the_option_fills_them_in(tmp_path: Path, size: str, unit: str) -> None:
    file = write_ome(tmp_path / "a.ome.tif", size, unit)
    with pytest.raises(MppError, match="--slide-mpp"):
        open_slide(file)
    assert open_slide(file, fallback_mpp=0.7).mpp == 0.7


@pytest.mark.data
def test_an_aperio_file_of_scale_0_is_refused(data_dir: Path, tmp_path: Path) -> None:
    data = (data_dir / "slides" / "cmu-1-small-region.svs").read_bytes()
    (tmp_path / "a.svs").write_bytes(data.replace(b"MPP = 0.4990", b"MPP = 0.0000"))
    with pytest.raises(MppError, match="claims 0 microns per pixel"):
        open_slide(tmp_path / "a.svs")
    assert open_slide(tmp_path / "a.svs", fallback_mpp=0.5).mpp == 0.5


def embedded(
    folder: Path, samples: Path, slide_mpp: float | None = None, workers: int | None = None
) -> dict[str, str]:
    settings = EmbedSettings(encoders=("colour",), spec=GridSpec(0.5, 16, 16), tissue="none")
    results = embed(samples, folder / "store.zarr", settings, slide_mpp=slide_mpp, workers=workers)
    return {result.slide_id: f"{result.state} {result.computed}" for result in results}


def test_the_option_fills_in_what_no_file_states_and_repeating_without_it_changes_nothing(
    tmp_path: Path,
) -> None:
    slides = tmp_path / "slides"
    slides.mkdir()
    write_pyramid(slides / "A.tif", IMAGE, 0.25)
    (slides / "B.png").write_bytes(imagecodecs.png_encode(IMAGE))
    first = embedded(tmp_path, slides)
    assert first["A"].startswith("done")
    assert first["B"].startswith("failed")
    second = embedded(tmp_path, slides, slide_mpp=0.5)
    assert second == {"A": "done 0", "B": "done 1"}


@pytest.mark.parametrize(
    ("mpp", "is_said", "workers"),
    [("0.3", True, None), ("0.26", False, None), ("", False, None), ("0.3", True, 1)],
)
def test_a_sheet_that_contradicts_its_file_is_said_and_used(
    tmp_path: Path, mpp: str, is_said: bool, workers: int | None
) -> None:
    write_pyramid(tmp_path / "A.tif", IMAGE, 0.25)
    (tmp_path / "s.csv").write_text(f"slide,mpp\nA.tif,{mpp}\n")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        embedded(tmp_path, tmp_path / "s.csv", workers=workers)
    messages = [str(w.message) for w in found if issubclass(w.category, SlideWarning)]
    assert len(messages) == is_said
    if is_said:
        assert "states 0.25 microns per pixel, the sample sheet 0.3" in messages[0]


def test_where_the_contradiction_makes_the_slide_too_coarse_the_reason_names_it(tmp_path: Path) -> None:
    write_pyramid(tmp_path / "A.tif", IMAGE, 0.25)
    (tmp_path / "s.csv").write_text("slide,mpp\nA.tif,2.5\n")
    (result,) = embed(
        tmp_path / "s.csv", tmp_path / "store.zarr", EmbedSettings(("colour",), GridSpec(0.5, 16, 16))
    )
    assert result.state == "failed"
    assert "give --mpp 2.5 or more" in result.reason
    assert "states 0.25 microns per pixel, the sample sheet 2.5" in result.reason
