"""One store written in several codings: bytes, speed, and what held-out Pearson loses."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from _common import Result
from _public import SPEC, public_sheet

from featurestore.blocks import Block
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.storage.block_array import BlockArray
from featurestore.storage.coding import parse_coding
from featurestore.storage.selection import open_slides
from featurestore.storage.store import Store
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.synthetic import SyntheticSpec, make_cohort

CODINGS = (
    "float16",
    "bitround:10+zstd",
    "bitround:7",
    "bitround:8+zstd",
    "bitround:7+zstd",
    "bitround:5+zstd",
    "bitround:3+zstd",
)
GENES = 250
REPEATS = 3


def codings(folder: Path, *, quick: bool) -> list[Result]:
    """Embed sections once, write the store in each coding, and score `dense` with sections held out."""
    sheet = None if quick else public_sheet()
    if sheet is None:
        sheet = make_cohort(folder, SyntheticSpec(size_px=(2400, 2400)), 3).sheet
    kept = os.environ.get("HISTOSGE_BENCH_CACHE")
    base = f"{kept if kept and not quick else folder}/codings"
    embed(str(sheet), base, EmbedSettings(("morphology",), SPEC))
    results = []
    for name in CODINGS:
        copy = folder / "coded"
        shutil.copytree(base, copy)
        results += [
            Result(f"{name}: {what}", value, unit) for what, value, unit in _written(Path(base), copy, name)
        ]
        settings = EvaluateSettings(split="section", presets=("dense",), genes=GENES)
        scores = evaluate(sheet, str(copy), folder / "report", settings)
        results.append(Result(f"{name}: held-out Pearson of dense", scores.mean("dense", "pearson_mean")))
        for done in (copy, folder / "report"):
            shutil.rmtree(done)
    return results


def _written(base: Path, copy: Path, name: str) -> Iterator[tuple[str, float, str]]:
    """Write the embeddings of a copy anew, and yield what that gives."""
    stored = raw = 0
    writing = reading = 0.0
    cosines = []
    for path, blocks in _arrays(base):
        before = BlockArray.open(Store.open(str(base)).location, path)
        values = {block: before.read_block(block) for block in blocks}
        location = Store.open(str(copy)).location
        location.remove(path)
        attrs = {key: value for key, value in before.attrs.items() if key != "coding"}
        after = BlockArray.create(
            location,
            path,
            shape=before.shape,
            chunks=before.object_shape,
            dtype="float16",
            dims=("y", "x", "feature"),
            attrs=attrs,
            coding=parse_coding(name),
        )
        # Of each block the fastest, since another process may have had the core.
        for block, block_values in values.items():
            writing += _least(partial(after.write, block, block_values))
            reading += _least(partial(after.read_block, block))
            cosines.append(_cosine(block_values, after.read_block(block)))
        stored += sum(after.objects().values())
        raw += sum(before.objects().values())
        Store(location).consolidate(path.split("/")[0])
    cosine = np.concatenate(cosines)
    yield "size", stored / raw, ""
    yield "write", raw / writing / 1e6, "MB/s of float16"
    yield "read", raw / reading / 1e6, "MB/s of float16"
    yield "1 - cosine, mean", float(1 - cosine.mean()), ""
    yield "1 - cosine, largest", float(1 - cosine.min()), ""


def _arrays(store: Path) -> list[tuple[str, list[Block]]]:
    slides, _ = open_slides(Store.open(str(store)), None, None, "morphology")
    return [(slide.array.path, slide.planned(slide.read_tissue())) for slide in slides]


def _least(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def _cosine(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    rows = np.isfinite(one[..., 0])
    a, b = one[rows].astype(float), other[rows].astype(float)
    return (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
