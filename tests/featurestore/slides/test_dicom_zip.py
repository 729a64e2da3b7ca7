"""A DICOM series in a zip file, and zips that do harm."""

import os
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from featurestore.errors import SlideError
from featurestore.slides.download_cache import cache_folder, keep_folder
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.slides.readers import dicom_zip_reader
from featurestore.slides.sample_sheet import read_samples
from featurestore.slides.slide_tree import list_tree

DATA = Path(os.environ.get("HISTOSGE_DATA", Path(__file__).parents[4] / "shared" / "data")) / "slides"
BOXES = DATA / "openslide_boxes_0.dcm"


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _dicom(uid: bytes, size: int) -> bytes:
    """The beginning of a DICOM file of a series."""
    return bytes(128) + b"DICM" + b"\x20\x00\x0e\x00UI" + len(uid).to_bytes(2, "little") + uid + bytes(size)


def _zip(path: Path, entries: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return path


@pytest.mark.data
def test_a_series_in_a_zip_has_the_pixels_of_its_file_and_is_unpacked_once(
    tmp_path: Path, cache: Path
) -> None:
    path = _zip(
        tmp_path / "slide.zip",
        {"study/series/a b.dcm": BOXES.read_bytes(), "LICENSE.txt": b"text", "__MACOSX/._x.dcm": b"no"},
    )
    direct, zipped = open_slide(BOXES), open_slide(path)
    assert (zipped.size_px, zipped.mpp) == (direct.size_px, direct.mpp)
    whole = (0, 0, *direct.size_px, direct.mpp)
    assert np.array_equal(zipped.read_region(*whole), direct.read_region(*whole))
    zipped.close()
    (folder,) = cache.iterdir()
    assert [file.name for file in folder.iterdir()] == ["00000.dcm"]
    before = (folder / "00000.dcm").stat()
    open_slide(path).close()
    assert [file.stat().st_ino for file in folder.iterdir()] == [before.st_ino]
    direct.close()


@pytest.mark.data
def test_a_zip_that_was_replaced_is_unpacked_again(tmp_path: Path, cache: Path) -> None:
    path = _zip(tmp_path / "slide.zip", {"a.dcm": BOXES.read_bytes()})
    open_slide(path).close()
    first = slide_fingerprint(str(path))
    path.unlink()
    _zip(path, {"b.dcm": BOXES.read_bytes(), "text": b"other"})
    open_slide(path).close()
    assert len(list(cache.iterdir())) == 2
    assert slide_fingerprint(str(path)) != first


@pytest.mark.data
def test_in_a_folder_only_zips_with_dicom_files_are_slides(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    _zip(folder / "slide.zip", {"a.dcm": BOXES.read_bytes()})
    _zip(folder / "counts.zip", {"matrix.mtx": b"1"})
    (folder / "cut.zip").write_bytes(b"PK\3\4")
    assert [sample.slide_id for sample in read_samples(folder)] == ["slide"]
    (row,) = list_tree(folder).rows
    assert row["slide_id"] == "slide"


def _hostile(write: Callable[[zipfile.ZipFile], None], path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.dcm", _dicom(b"1.2", 9))
        write(archive)
    return path


def _link(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("link.dcm")
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(entry, "/etc/passwd")


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda archive: archive.writestr("../../up.dcm", b"x"), "names a file outside of itself"),
        (lambda archive: archive.writestr("/etc/up.dcm", b"x"), "names a file outside of itself"),
        (lambda archive: archive.writestr("a\\..\\..\\up.dcm", b"x"), "names a file outside of itself"),
        (lambda archive: archive.writestr("C:/up.dcm", b"x"), "names a file outside of itself"),
        (_link, "holds a link"),
        (lambda archive: archive.writestr("b.dcm", _dicom(b"1.3", 9)), "holds 2 DICOM series"),
    ],
    ids=["above", "absolute", "backslashes", "drive", "link", "two series"],
)
def test_zips_that_lead_elsewhere_are_refused_and_write_nothing_there(
    tmp_path: Path, cache: Path, write: Callable[[zipfile.ZipFile], None], reason: str
) -> None:
    (tmp_path / "in").mkdir()
    path = _hostile(write, tmp_path / "in" / "x.zip")
    with pytest.raises(SlideError, match=reason):
        open_slide(path)
    assert {file.name for file in tmp_path.iterdir()} <= {"in", "cache"}
    assert not [file for file in cache.rglob("*") if "up" in file.name]


def test_a_zip_bomb_is_refused_before_it_is_unpacked(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HISTOSGE_CACHE_GB", "0.001")
    path = _zip(tmp_path / "x.zip", {f"{number}.dcm": bytes(400_000) for number in range(3)})
    assert path.stat().st_size < 10_000
    with pytest.raises(SlideError, match=r"unpacks to 0\.0012 GB, and there is room for 0\.001 in"):
        open_slide(path)
    assert list(cache.rglob("*.dcm")) == []


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dicom_zip_reader, "MAX_ENTRIES", 5)
    path = _zip(tmp_path / "x.zip", {f"{number}.dcm": b"" for number in range(6)})
    with pytest.raises(SlideError, match="holds 6 files"):
        open_slide(path)


def test_damaged_zips_are_one_line(tmp_path: Path, cache: Path) -> None:
    path = _zip(tmp_path / "x.zip", {"a.dcm": os.urandom(5000)})
    data = bytearray(path.read_bytes())
    data[200:1200] = bytes(1000)
    path.write_bytes(data)
    with pytest.raises(SlideError, match="is no zip that can be unpacked") as caught:
        open_slide(path)
    assert "\n" not in str(caught.value)
    assert list(cache.rglob("*.dcm")) == []


@pytest.mark.data
def test_messages_name_the_zip_and_not_its_copy(tmp_path: Path, cache: Path) -> None:
    path = _zip(tmp_path / "x.zip", {"a.dcm": BOXES.read_bytes()[:400]})
    with pytest.raises(SlideError) as caught:
        open_slide(path)
    assert str(path) in str(caught.value)
    assert str(cache) not in str(caught.value)


def test_folders_of_the_cache_give_way_as_files_do_and_those_in_use_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(folder: Path) -> None:
        (folder / "a").write_bytes(bytes(600_000))

    monkeypatch.setenv("HISTOSGE_CACHE_GB", "0.001")
    used = keep_folder("used.series", fill)
    old = cache_folder() / "old.series"
    old.mkdir()
    fill(old)
    os.utime(old, (1, 1))
    other = cache_folder() / "other"
    other.mkdir()
    fill(other)
    keep_folder("new.series", fill)
    assert {entry.name for entry in cache_folder().iterdir()} == {"used.series", "new.series", "other"}
    assert (used / "a").stat().st_size == 600_000
