"""A store from elsewhere names a slide: nothing of this machine is opened that is not that slide."""

import os
from pathlib import Path

import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.errors import SlideError, SlideNotFoundError
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.stored_source import open_stored_slide

MPP = 2.0


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    return write_pyramid(tmp_path / "mine.tif", tissue_like(300, 200, MPP), MPP)


def test_the_slide_that_was_embedded_is_opened(slide: Path) -> None:
    fingerprint = slide_fingerprint(str(slide))
    for source in (str(slide), f"file://{slide}"):
        opened = open_stored_slide(source, MPP, fingerprint)
        assert opened.size_px == (300, 200)
        opened.close()


def test_another_slide_of_this_machine_is_not(slide: Path, tmp_path: Path) -> None:
    foreign = write_pyramid(tmp_path / "theirs.tif", tissue_like(400, 200, MPP), MPP)
    with pytest.raises(SlideError, match="is not the slide that was embedded"):
        open_stored_slide(str(slide), MPP, slide_fingerprint(str(foreign)))


@pytest.mark.parametrize(
    "source", ["/etc/passwd", "file:///etc/passwd", "reference://a.zarr", "zip://a::/tmp/b"]
)
def test_no_other_file_and_no_other_scheme(source: str) -> None:
    with pytest.raises(SlideError) as refused:
        open_stored_slide(source, MPP, "17-abc")
    assert "\n" not in str(refused.value)


def test_a_fifo_is_no_slide(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tif")
    with pytest.raises(SlideNotFoundError):  # opening it would wait for ever
        open_stored_slide(str(tmp_path / "a.tif"), MPP, "17-abc")
