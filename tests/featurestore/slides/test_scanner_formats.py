"""CZI and iSyntax: pixels and scale as another reader finds them, and one line for what is missing or damaged.

A CZI can be written here; of a pyramid in one, and of iSyntax, nothing can be: a stand-in for the library shows what its
pixels become.
"""

import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from make_slides import tissue_like
from numpy.typing import NDArray

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import MppError, SlideError
from featurestore.grid import GridSpec
from featurestore.slides.open_slide import open_slide

MPP = 0.5
needs_formats = pytest.mark.formats
RGB = NDArray[np.uint8]
WriteCzi = Callable[..., tuple[Path, RGB]]


@pytest.fixture
def write_czi(tmp_path: Path) -> WriteCzi:
    def write(mpp: float | None = MPP, corner: tuple[int, int] = (0, 0)) -> tuple[Path, RGB]:
        """Write two tiles with a gap of 31 px between them; return the file and the picture."""
        from pylibCZIrw import czi

        path = tmp_path / "a.czi"
        picture = np.full((503, 701, 3), 255, np.uint8)
        tissue = tissue_like(701, 503, MPP)
        with czi.create_czi(str(path)) as document:
            for left, right in ((0, 400), (431, 701)):
                picture[:, left:right] = tissue[:, left:right]
                tile = np.ascontiguousarray(tissue[:, left:right, ::-1])
                document.write(tile, location=(corner[0] + left, corner[1]))
            scale = None if mpp is None else mpp * 1e-6
            document.write_metadata("a", **({} if scale is None else {"scale_x": scale, "scale_y": scale}))
        return path, picture

    return write


@needs_formats
@pytest.mark.parametrize("corner", [(0, 0), (1009, 37), (-211, -13)])
def test_a_czi_has_the_pixels_and_the_scale_that_were_written(
    write_czi: WriteCzi, corner: tuple[int, int]
) -> None:
    path, picture = write_czi(corner=corner)
    with closing(open_slide(path)) as slide:
        assert (slide.size_px, slide.level_mpps) == ((701, 503), (MPP,))
        np.testing.assert_array_equal(slide.read_region(0, 0, 701, 503, MPP), picture)
        np.testing.assert_array_equal(slide.read_region(383, 7, 101, 53, MPP), picture[7:60, 383:484])
        beyond = slide.read_region(690, 490, 20, 20, MPP)
        np.testing.assert_array_equal(beyond[:13, :11], picture[490:, 690:])
        assert (beyond[13:] == 255).all()
        halved = slide.read_region(0, 0, 100, 100, 2 * MPP)
    expected = picture[:200, :200].reshape(100, 2, 100, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - expected).max() <= 0.5


@needs_formats
@pytest.mark.filterwarnings("ignore")  # of a package of 2019
def test_a_second_reader_finds_the_same_pixels(write_czi: WriteCzi) -> None:
    import czifile

    path, _ = write_czi()
    with closing(open_slide(path)) as slide:
        ours = slide.read_region(0, 0, 701, 503, MPP)
    theirs = czifile.imread(path).reshape(503, 701, 3)
    is_recorded = np.r_[0:400, 431:701]  # it fills gaps with black
    np.testing.assert_array_equal(ours[:, is_recorded], theirs[:, is_recorded])


@needs_formats
def test_a_czi_is_embedded(write_czi: WriteCzi, tmp_path: Path) -> None:
    path, _ = write_czi()
    (result,) = embed(str(path), str(tmp_path / "store"), EmbedSettings(("colour",), GridSpec(MPP, 64, 64)))
    assert (result.state, result.unreadable) == ("done", 0)


@needs_formats
def test_a_czi_without_a_scale_says_how_to_give_it(write_czi: WriteCzi) -> None:
    path, _ = write_czi(mpp=None)
    with pytest.raises(MppError, match="--slide-mpp"):
        open_slide(path)
    with closing(open_slide(path, 0.25)) as slide:
        assert slide.mpp == 0.25


@needs_formats
def test_fluorescence_and_damaged_czi_are_refused_in_one_line(tmp_path: Path, write_czi: WriteCzi) -> None:
    from pylibCZIrw import czi

    path = tmp_path / "fluorescence.czi"
    with czi.create_czi(str(path)) as document:
        for channel in range(2):
            document.write(np.ones((70, 90, 1), np.uint16), plane={"C": channel})
    with pytest.raises(SlideError, match=r"is Gray16 with \{'C': 2\}; a slide is 8-bit RGB"):
        open_slide(path)
    whole, _ = write_czi()
    for length in (100, 2000, whole.stat().st_size // 2):
        cut = tmp_path / "cut.czi"
        cut.write_bytes(whole.read_bytes()[:length])
        with pytest.raises(SlideError) as refused, closing(open_slide(cut)) as slide:
            slide.read_region(0, 0, 701, 503, MPP)
        assert "\n" not in str(refused.value)
        assert str(cut) in str(refused.value)


@pytest.mark.parametrize(("module", "suffix", "extra"), [("pylibCZIrw", "czi", "czi"), ("isyntax",) * 3])
def test_a_missing_package_is_one_line_that_names_the_extra(
    module: str, suffix: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(b"x")
    with pytest.raises(SlideError) as refused:
        open_slide(path)
    assert str(refused.value).startswith(f"{path} needs an extra package")
    assert str(refused.value).endswith(f"pip install 'histosge[{extra}]'")
    (result,) = embed(str(path), str(tmp_path / "store"), EmbedSettings(("colour",)))
    assert (result.state, result.reason) == ("failed", str(refused.value))


# ---------------------------------------------------------------- iSyntax


@needs_formats
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "does not begin with a DataObject"),
        (b"no xml" * 999, "does not begin with a DataObject"),
        (
            b'<?xml version="1.0"?>\n<DataObject ObjectType="DPUfsImport">',
            "is no iSyntax file that can be read",
        ),
    ],
)
def test_a_damaged_isyntax_is_refused_in_one_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "a.isyntax"
    path.write_bytes(content)
    with pytest.raises(SlideError, match=says) as refused:
        open_slide(path)
    assert "\n" not in str(refused.value)


class _LibraryError(Exception):
    pass


class _Handle:
    """What pyisyntax gives of a file: a pyramid of two levels, RGBA, transparent where nothing was scanned."""

    level_dimensions = ((301, 203), (150, 101))
    mpp_x = mpp_y = 0.25

    @staticmethod
    def level(level: int) -> RGB:
        width, height = _Handle.level_dimensions[level]
        picture = np.dstack([tissue_like(width, height, MPP), np.full((height, width), 255, np.uint8)])
        picture[:17, :13] = 0
        return picture

    def read_region(self, x: int, y: int, width: int, height: int, level: int) -> RGB:
        if level == 1 and x > 100:
            raise _LibraryError("damaged block")
        return self.level(level)[y : y + height, x : x + width]

    def close(self) -> None:
        pass


def test_pixels_of_the_isyntax_library_are_laid_on_white(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(
        ISyntax=SimpleNamespace(open=lambda path: _Handle()),
        lowlevel=SimpleNamespace(libisyntax=SimpleNamespace(LibISyntaxError=_LibraryError)),
    )
    monkeypatch.setitem(sys.modules, "isyntax", library)
    path = tmp_path / "a.isyntax"
    path.write_bytes(b'<?xml version="1.0"?><DataObject ObjectType="DPUfsImport">')
    with closing(open_slide(path)) as slide:
        assert (slide.size_px, slide.mpp) == ((301, 203), 0.25)
        region = slide.read_region(5, 3, 60, 40, 0.25)
        expected = _Handle.level(0)[3:43, 5:65, :3].copy()
        expected[:14, :8] = 255
        np.testing.assert_array_equal(region, expected)
        with pytest.raises(SlideError, match=r"cannot be read at level 1, .*: damaged block"):
            slide.read_region(110, 0, 8, 8, slide.level_mpps[1])
