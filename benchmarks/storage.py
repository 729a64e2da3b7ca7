"""How embeddings should lie in a store: block size, chunk against shard, codec, concurrency, coding.

    python benchmarks/storage.py [--quick] [--json FILE] [--part layouts|codings]

The codings are those of `embed --store-as`, on the public sections with `morphology`.

Embeddings of `morphology` and of a ViT-S/16 (random weights; 384 dims) of one slide, mixed in pairs until the grid is
as large as a real one. Writes are one object at a time, as the embedding writes them; reads come from the page cache.
"""

import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from _codings import codings
from _common import Result, parser_of, report, section
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.protocol import EncoderOptions
from featurestore.grid import GridSpec
from featurestore.storage.store import Store

WINDOW = 40
"""Patches along a side of a window with its halo, as prediction and training read them."""


@dataclass(frozen=True)
class Layout:
    """One way to store an array."""

    name: str
    block: int
    codecs: tuple[Any, ...] = (Crc32cCodec(),)
    inner: int | None = None
    concurrency: int = 10


LAYOUTS = (
    Layout("16 x 16", 16),
    Layout("32 x 32 (ours)", 32),
    Layout("64 x 64", 64),
    Layout("32 x 32, zstd 3", 32, (ZstdCodec(level=3), Crc32cCodec())),
    Layout("32 x 32, lz4 + bitshuffle", 32, (BloscCodec(cname="lz4", shuffle="bitshuffle"), Crc32cCodec())),
    Layout("shard 128 x 128 of 32 x 32", 128, inner=32),
    Layout("32 x 32, 1 request at once", 32, concurrency=1),
    Layout("32 x 32, 32 requests at once", 32, concurrency=32),
)


def main() -> None:
    """Measure."""
    parser = parser_of(__doc__)
    parser.add_argument("--part", choices=("layouts", "codings"), help="only this part")
    asked = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as name:
        if asked.part != "codings":
            results += _layouts(Path(name), quick=asked.quick)
        if asked.part != "layouts":
            results += codings(Path(name), quick=asked.quick)
    report("storage", results, asked)


def _layouts(folder: Path, *, quick: bool) -> list[Result]:
    side = 128 if quick else 384
    results = []
    slide = section(folder, quick=True).slide
    for key, dim in (("morphology", 164), ("timm:vit_small_patch16_224", 384)):
        values = _embeddings(key, slide, folder, side)
        assert values.shape == (side, side, dim)
        for layout in LAYOUTS:
            results += _measure(f"{key.split('_')[0]}, {layout.name}", layout, values, folder / "array")
    return results


def _embeddings(key: str, slide: Path, folder: Path, side: int) -> np.ndarray:
    stride = 112 if key == "morphology" else 448
    spec = GridSpec(0.5, 224, stride)
    settings = EmbedSettings((key,), spec, EncoderOptions(random_weights=key != "morphology"))
    store = str(folder / "store")
    embed(str(slide), store, settings)
    array = Store.open(store).embedding(slide.stem, spec.key, key)
    values = array.read((0, array.shape[0]), (0, array.shape[1]))
    rows = values[np.isfinite(values).all(axis=2)]
    rng = np.random.default_rng(0)
    first, second = (rows[rng.integers(0, len(rows), (side, side))].astype(np.float32) for _ in range(2))
    # Between two patches, so that no vector comes twice: a codec would find it.
    share = rng.random((side, side, 1), dtype=np.float32)
    return (share * first + (1 - share) * second).astype(np.float16)


def _measure(what: str, layout: Layout, values: np.ndarray, path: Path) -> list[Result]:
    shutil.rmtree(path, ignore_errors=True)
    side, inner = layout.block, layout.inner
    chunks = (inner or side, inner or side, values.shape[2])
    shards = (side, side, values.shape[2]) if inner else None
    with zarr.config.set({"async.concurrency": layout.concurrency}):
        array = zarr.create_array(
            path,
            shape=values.shape,
            dtype="float16",
            chunks=chunks,
            shards=shards,
            compressors=list(layout.codecs),
        )
        begun = time.perf_counter()
        for row in range(0, values.shape[0], side):
            for col in range(0, values.shape[1], side):
                array[row : row + side, col : col + side] = values[row : row + side, col : col + side]
        write = time.perf_counter() - begun
        read = min(_seconds(array, slice(None), slice(None)) for _ in range(3))
        windows = np.random.default_rng(1).integers(0, values.shape[0] - WINDOW, (20, 2))
        window = min(
            sum(_seconds(array, slice(r, r + WINDOW), slice(c, c + WINDOW)) for r, c in windows)
            for _ in range(2)
        )
    files = [p for p in path.rglob("*") if p.is_file() and p.name != "zarr.json"]
    stored, raw = sum(p.stat().st_size for p in files), values.nbytes
    return [
        Result(f"{what}: size", stored / raw, f"{len(files)} objects"),
        Result(f"{what}: write", raw / write / 1e6, "MB/s"),
        Result(f"{what}: read all", raw / read / 1e6, "MB/s"),
        Result(f"{what}: read a window", 1e3 * window / len(windows), "ms"),
    ]


def _seconds(array: Any, rows: slice, cols: slice) -> float:
    begun = time.perf_counter()
    array[rows, cols]
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
