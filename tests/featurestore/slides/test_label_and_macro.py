"""Label and macro pictures name patients: no pixel of them is in what is read, shown or written."""

import io
from pathlib import Path

import numpy as np
import pytest
import tifffile
from make_slides import tissue_like
from PIL import Image

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.preview.planned_preview import PlannedPreview
from featurestore.preview.store_preview import write_preview
from featurestore.slides.open_slide import open_slide
from featurestore.tissue.overview import read_overview

MPP = 0.5
GREEN, BLUE = (0, 255, 0), (0, 0, 255)
"""Of the label and of the macro picture: no stain has them."""
APERIO = "Aperio Image Library v1.0\n700x600 [0,0 700x600] (64x64) JPEG/RGB Q=95|AppMag = 20|MPP = 0.5"


def _flat(colour: tuple[int, int, int], width: int = 387, height: int = 463) -> np.ndarray:
    return np.full((height, width, 3), colour, np.uint8)


def _write_svs(path: Path) -> None:
    slide = tissue_like(700, 600, MPP)
    with tifffile.TiffWriter(path) as tiff:
        tiles = {"tile": (64, 64), "compression": "jpeg", "photometric": "rgb", "metadata": None}
        tiff.write(slide, description=APERIO, **tiles)
        # The second page of an SVS is its thumbnail, which is of the slide; then levels, label, macro.
        tiff.write(slide[::2, ::2], description=APERIO, photometric="rgb", metadata=None)
        tiff.write(slide[::2, ::2], description=APERIO, **tiles)
        strips = {"photometric": "rgb", "metadata": None, "compression": "lzw", "rowsperstrip": 100}
        tiff.write(_flat(GREEN), description="Aperio\nlabel 387x463", subfiletype=1, **strips)
        tiff.write(_flat(BLUE, 1280), description="Aperio\nmacro 1280x463", subfiletype=9, **strips)


def _write_ome(path: Path) -> None:
    with tifffile.TiffWriter(path, ome=True) as tiff:
        scale = {"PhysicalSizeX": MPP, "PhysicalSizeY": MPP}
        # The largest, so that none is left out for its size alone.
        for name, picture, more in (
            ("slide", tissue_like(700, 600, MPP), scale),
            ("label", _flat(GREEN, 900, 800), {}),
            ("macro", _flat(BLUE, 900, 800), {}),
        ):
            tiff.write(
                picture, photometric="rgb", tile=(64, 64), metadata={"axes": "YXS", "Name": name, **more}
            )


def _has_their_colours(pixels: np.ndarray) -> bool:
    values = pixels.reshape(-1, 3).astype(int)
    # Far from both in what was compressed as JPEG, too.
    near = [np.abs(values - colour).sum(axis=1).min() < 150 for colour in (GREEN, BLUE)]
    return any(near)


@pytest.fixture(params=["a.svs", "a.ome.tif"])
def slide(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    (_write_svs if path.suffix == ".svs" else _write_ome)(path)
    return path


def test_what_is_looked_for_would_be_found(slide: Path) -> None:
    with tifffile.TiffFile(slide) as tiff:
        assert _has_their_colours(tiff.pages[-1].asarray())


def test_neither_level_nor_overview_holds_them(slide: Path) -> None:
    opened = open_slide(slide)
    assert opened.size_px == (700, 600)
    assert not _has_their_colours(read_overview(opened).rgb)
    for mpp in opened.level_mpps:
        width, height = (int(side * MPP / mpp) for side in opened.size_px)
        assert not _has_their_colours(opened.read_region(0, 0, width, height, mpp))
    opened.close()


def test_neither_pages_nor_store_show_them(slide: Path, tmp_path: Path) -> None:
    settings = EmbedSettings(("colour",), GridSpec(1.0, 64, 64))
    planned = PlannedPreview.open(tmp_path / "planned", str(tmp_path / "store"), ("colour",))
    results = embed(slide, tmp_path / "store", settings, dry_run=True, on_survey=planned.add_survey)
    planned.finish(results)
    embed(slide, tmp_path / "store", settings)
    write_preview(tmp_path / "store", tmp_path / "page")
    pictures = [*(tmp_path / "planned").rglob("*.jpg"), *(tmp_path / "page").rglob("*.jpg")]
    assert len(pictures) >= 2
    for picture in pictures:
        with Image.open(io.BytesIO(picture.read_bytes())) as opened:
            assert not _has_their_colours(np.asarray(opened.convert("RGB"))), picture
