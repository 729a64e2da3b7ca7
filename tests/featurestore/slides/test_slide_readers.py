"""Which reader gets a slide, and readers of other packages."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from install_package import install
from make_slides import painted, write_pyramid

from featurestore.errors import (
    ExtensionWarning,
    SampleSheetError,
    SlideError,
    SlideNotFoundError,
    SlideWarning,
)
from featurestore.slides.download_cache import ENV_FOLDER
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.slides.sample_sheet import read_samples
from featurestore.slides.slide_reader import READERS, Recognition, SlideReader, readers_in_order

IMAGE = painted(131, 97)
THEIRS = """
from pathlib import Path

import numpy as np

from featurestore.errors import SlideError
from featurestore.slides.pyramid_slide import PyramidSlide, check_mpp
from featurestore.slides.slide_reader import Recognition, SlideReader


class ArraySlide(PyramidSlide):
    def __init__(self, path, mpp):
        file = Path(path)
        self._array = np.load(file / "pixels.npy" if file.is_dir() else file)
        height, width, _ = self._array.shape
        super().__init__(path, ((width, height),), check_mpp(mpp or 0.5, path))

    def read_level(self, level, x, y, width, height):
        return self._array[y : y + height, x : x + width]

    def close(self):
        pass


def fail(path, mpp):
    raise KeyError("a bug\\nof theirs")


def claim(path):
    return Recognition.LIKELY if path.endswith(".tif") else Recognition.NO


def stumble(path):
    raise OSError("cannot look")


RECORD = SlideReader("xyz", "a numpy array", (".xyz",), ArraySlide)
FOLDER = SlideReader("folders", "a numpy array in a folder", (".slide.d",), ArraySlide, is_folder=True)
FAILING = SlideReader("failing", "raises", (".bad",), fail)
CLAIMING = SlideReader("claiming", "wants TIFFs", (".tif",), fail, recognises=claim)
STUMBLING = SlideReader("stumbling", "cannot tell", (".nope",), ArraySlide, recognises=stumble)
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    yield folder
    READERS.refresh()


def offer(site: Path, *names: str) -> None:
    points = "".join(f"{name.lower()} = their_reader:{name}\n" for name in names)
    points = points.replace("record =", "xyz =").replace("folder =", "folders =")
    install(site, "their-reader", f"[histosge.slide_readers]\n{points}", their_reader=THEIRS)
    READERS.refresh()


def write_array(path: Path) -> Path:
    with path.open("wb") as file:
        np.save(file, IMAGE)
    return path


def write_ome(path: Path) -> Path:
    metadata = {"axes": "YXS", "PhysicalSizeX": 0.5, "PhysicalSizeY": 0.5}
    tifffile.imwrite(path, IMAGE, photometric="rgb", ome=True, metadata=metadata)
    return path


def candidates(path: Path) -> list[tuple[str, Recognition]]:
    """Return the readers that do not refuse a path, in order."""
    found = [(reader.name, reader.recognition(str(path))) for reader in readers_in_order()]
    return [(name, recognition) for name, recognition in found if recognition]


def test_which_readers_may_have_a_slide_and_how_sure_they_are(tmp_path: Path) -> None:
    maybe, mine = Recognition.MAYBE, Recognition.MINE
    anything = [("openslide", maybe), ("tiff", maybe)]
    plain = [("jpeg-tiles", maybe), ("openslide", maybe)]
    for name in ("a.svs", "a.tif", "A.TIFF"):
        assert candidates(write_pyramid(tmp_path / name, IMAGE, 0.5)) == plain
    assert candidates(write_ome(tmp_path / "a.ome.tif")) == [("tiff", mine)]
    shutil.copy(tmp_path / "a.ome.tif", tmp_path / "ome.svs")
    assert candidates(tmp_path / "ome.svs") == [("tiff", mine)]
    assert candidates(tmp_path / "a.ndpi") == candidates(tmp_path / "a.xyz") == anything
    for name in ("a.png", "a.JPG", "a.jpeg"):
        assert candidates(tmp_path / name) == [*anything, ("raster", mine)]
    assert candidates(tmp_path / "a.zarr") == [*anything, ("ome-zarr", mine)]


def test_the_reasons_of_all_that_were_tried_are_given_in_order_and_no_others(tmp_path: Path) -> None:
    expected = {
        "a.svs": ["OpenSlide does not know", "tifffile: not a TIFF"],
        "a.ndpi": ["OpenSlide does not know", "tifffile: not a TIFF"],
        "a.png": ["a.png cannot be opened: not a PNG or JPEG"],
    }
    for name, reasons in expected.items():
        (tmp_path / name).write_bytes(b"not a slide" * 99)
        with pytest.raises(SlideError) as refused:
            open_slide(str(tmp_path / name), 0.5)
        message = str(refused.value)
        places = [message.find(reason) for reason in reasons]
        assert -1 not in places, message
        assert places == sorted(places)
        assert message.count(";") == len(reasons) - 1
        assert "\n" not in message


def test_an_ome_tiff_that_is_refused_for_its_content_is_tried_with_no_other_reader(tmp_path: Path) -> None:
    planes = np.stack([IMAGE, IMAGE])
    tifffile.imwrite(tmp_path / "a.ome.tif", planes, photometric="rgb", ome=True, metadata={"axes": "ZYXS"})
    with pytest.raises(SlideError) as refused:
        open_slide(str(tmp_path / "a.ome.tif"), 0.5)
    message = str(refused.value)
    assert "2 planes (Z=2" in message
    assert "OpenSlide" not in message
    assert "JPEG tiles" not in message


def test_a_path_object_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(imagecodecs.png_encode(IMAGE))
    assert open_slide(tmp_path / "a.png", 0.5).size_px == (131, 97)
    with pytest.raises(SlideNotFoundError):
        open_slide(tmp_path / "b.png")


def test_a_reader_of_another_package_reads_its_suffix(site: Path, tmp_path: Path) -> None:
    file = write_array(tmp_path / "slides.xyz")
    with pytest.raises(SlideError, match="OpenSlide does not know the format; tifffile"):
        open_slide(str(file))
    offer(site, "RECORD")
    slide = open_slide(str(file))
    np.testing.assert_array_equal(slide.read_region(3, 5, 29, 17, 0.5), IMAGE[5:22, 3:32])
    assert open_slide(str(file), 0.7).mpp == 0.7


def test_a_folder_scan_sees_the_suffix_of_another_package(site: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slides"
    folder.mkdir()
    write_array(folder / "B.XYZ")
    (folder / "notes.txt").touch()
    with (
        pytest.raises(SampleSheetError, match=r"known suffixes: \.bif .*\.zarr \.zip$"),
        pytest.warns(SlideWarning, match=r"no reader knows .*: B\.XYZ$"),
    ):
        read_samples(str(folder))
    offer(site, "RECORD", "FOLDER")
    (folder / "C.slide.d").mkdir()
    write_array(folder / "C.slide.d" / "pixels.npy")
    (folder / "A.png").write_bytes(imagecodecs.png_encode(IMAGE))
    samples = read_samples(folder, slide_mpp=0.5)
    assert [Path(sample.slide).name for sample in samples] == ["A.png", "B.XYZ", "C.slide.d"]
    assert [open_slide(sample.slide, fallback_mpp=sample.fallback_mpp).size_px for sample in samples] == [
        (131, 97)
    ] * 3


def test_a_folder_of_another_package_is_one_slide_and_is_known_again(site: Path, tmp_path: Path) -> None:
    offer(site, "FOLDER")
    folder = tmp_path / "C.slide.d"
    folder.mkdir()
    write_array(folder / "pixels.npy")
    (sample,) = read_samples(str(folder))
    assert sample.slide == str(folder)
    known = slide_fingerprint(str(folder))
    (folder / "more").write_bytes(b"1")
    assert slide_fingerprint(str(folder)) != known


def test_a_remote_slide_of_another_package_is_fetched_for_it(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec

    offer(site, "RECORD")
    monkeypatch.setenv(ENV_FOLDER, str(tmp_path / "cache"))
    write_array(tmp_path / "a.xyz")
    fsspec.filesystem("memory").pipe_file("/slides/a.xyz", (tmp_path / "a.xyz").read_bytes())
    slide = open_slide("memory://slides/a.xyz")
    np.testing.assert_array_equal(slide.read_region(0, 0, 131, 97, 0.5), IMAGE)


def test_a_reader_of_another_package_that_fails_is_a_reason_and_others_are_tried(
    site: Path, tmp_path: Path
) -> None:
    offer(site, "FAILING", "CLAIMING")
    (tmp_path / "a.bad").write_bytes(b"anything")
    with pytest.raises(SlideError) as refused:
        open_slide(str(tmp_path / "a.bad"))
    assert str(refused.value).endswith("a.bad cannot be opened: failing: KeyError: 'a bug\\nof theirs'")
    tiff = write_pyramid(tmp_path / "a.tif", IMAGE, 0.5)
    assert type(open_slide(str(tiff))).__name__ == "OpenSlideSlide"
    tiff.write_bytes(b"no longer a TIFF")
    with pytest.raises(SlideError, match=r"cannot be opened: claiming: KeyError.*OpenSlide.*tifffile"):
        open_slide(str(tiff))


def test_a_reader_of_another_package_that_cannot_tell_is_not_tried(site: Path, tmp_path: Path) -> None:
    offer(site, "STUMBLING")
    tiff = write_pyramid(tmp_path / "a.tif", IMAGE, 0.5)
    with pytest.warns(ExtensionWarning, match=r"'stumbling' is not tried on .*a\.tif: OSError: cannot look"):
        assert open_slide(str(tiff)).size_px == (131, 97)


def test_a_package_that_cannot_be_imported_takes_no_slide_from_us(site: Path, tmp_path: Path) -> None:
    install(site, "broken-reader", "[histosge.slide_readers]\nbroken = no_such_module:RECORD\n")
    READERS.refresh()
    tiff = write_pyramid(tmp_path / "a.tif", IMAGE, 0.5)
    with pytest.warns(ExtensionWarning, match="'broken' of broken-reader"):
        open_slide(str(tiff))
    open_slide(str(tiff))  # a second warning would be an error


def test_a_suffix_is_written_in_lower_case_with_its_dot() -> None:
    with pytest.raises(ValueError, match=r"write suffixes like '\.svs', not xyz, \.ABC"):
        SlideReader("a", "b", (".ok", "xyz", ".ABC"), lambda path, mpp: open_slide(path, mpp))
