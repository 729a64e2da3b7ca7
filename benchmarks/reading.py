"""How fast patches are read from an Aperio-like slide, beside OpenSlide asked for one patch at a time.

    python benchmarks/reading.py [--quick] [--json FILE]

Both sides read every patch of the same slide in one process, in turn, three times, up to RGB arrays; the least
CPU time of each counts. Stride = patch = tile: the layout that suits OpenSlide best, as it decodes no tile twice.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import openslide
import tifffile
from _common import Result, options, report

from featurestore.blocks import plan_blocks
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.patch_reader import read_batches
from histosge.synthetic import SyntheticSpec, make_section

MPP = 0.25
PICTURE_PX = 4096
TILE_PX = PATCH_PX = 256
LEVELS = (1, 4, 16)
BLOCK = (32, 32)
BATCH = 64
REPEATS = 3
TARGET = ">= 5"


def main() -> None:
    """Measure both sides at the native level and at half its resolution."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        slide = aperio_like(Path(folder), times=1 if asked.quick else 4)
        results = [_measure(slide, factor) for factor in (1, 2)]
    lesser = min(part[-1].value or 0.0 for part in results)
    rows = [row for part in results for row in part]
    report("reading", [*rows, Result("speedup_vs_openslide", lesser, "x, the lesser of both", TARGET)], asked)


def aperio_like(folder: Path, times: int) -> Path:
    """Write a slide with levels 1, 4 and 16 by laying a synthetic section's JPEG tiles out several times."""
    section = make_section(folder, SyntheticSpec(size_px=(PICTURE_PX, PICTURE_PX), mpp=MPP))
    side = PICTURE_PX * times
    path = folder / "aperio_like.svs"
    with tifffile.TiffFile(section.slide) as source, tifffile.TiffWriter(path, bigtiff=False) as tiff:
        for factor in LEVELS:
            page = source.pages[factor.bit_length() - 1]
            tiff.write(
                _repeated(source, page, times),
                shape=(side // factor, side // factor, 3),
                dtype=np.uint8,
                tile=(TILE_PX, TILE_PX),
                photometric="ycbcr",
                subsampling=(2, 2),
                compression="jpeg",
                metadata=None,
                description=f"Aperio Image Library v12.0.15\r\n{side}x{side} (256x256) JPEG/RGB Q=85|MPP = {MPP}",
            )
    return path


def _repeated(source: "tifffile.TiffFile", page: "tifffile.TiffPage", times: int) -> Iterator[bytes]:
    tiles = []
    for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
        source.filehandle.seek(offset)
        tiles.append(source.filehandle.read(count))
    across = page.imagewidth // TILE_PX
    for row in range(times * across):
        yield from times * tiles[row % across * across : (row % across + 1) * across]


def _measure(slide: Path, factor: int) -> list[Result]:
    sides: dict[str, Callable[[Path, int], Iterator[np.ndarray]]] = {"ours": _ours, "openslide": _openslide}
    _warm_up_and_compare(slide, factor)
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(REPEATS):
        for name, read in sides.items():
            begun = time.process_time()
            patches = sum(map(len, read(slide, factor)))
            seconds[name].append(time.process_time() - begun)
    where = "native level" if factor == 1 else "half resolution"
    rates = {name: patches / min(spent) for name, spent in seconds.items()}
    rows = [Result(f"{where}: {name}", rate, "patches per CPU-second") for name, rate in rates.items()]
    speedup = rates["ours"] / rates["openslide"]
    return [*rows, Result(f"{where}: speedup_vs_openslide", speedup, "x", TARGET)]


def _ours(path: Path, factor: int) -> Iterator[np.ndarray]:
    """Read as `embed` does, block by block."""
    slide = open_slide(str(path))
    spec = GridSpec(MPP * factor, PATCH_PX, PATCH_PX)
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, spec)
    for block in plan_blocks(grid.shape, BLOCK):
        for batch in read_batches(slide, grid, block, np.ones(block.shape, bool), BATCH):
            yield batch.pixels
    slide.close()


def _openslide(path: Path, factor: int) -> Iterator[np.ndarray]:
    """Ask OpenSlide for one patch after the other; Pillow halves."""
    side = PATCH_PX * factor
    with openslide.OpenSlide(path) as handle:
        width, height = handle.dimensions
        for y in range(0, height - side + 1, side):
            for x in range(0, width - side + 1, side):
                image = handle.read_region((x, y), 0, (side, side)).convert("RGB")
                yield np.asarray(image if factor == 1 else image.reduce(factor))[None]


def _warm_up_and_compare(path: Path, factor: int) -> None:
    """Hold the first row of the first block against OpenSlide's patches: both sides do the same work."""
    theirs = np.concatenate(list(islice(_openslide(path, factor), BLOCK[1])))
    ours = next(_ours(path, factor))[: len(theirs)]
    assert (theirs == ours).all(), "the two sides read other pixels"


if __name__ == "__main__":
    main()
