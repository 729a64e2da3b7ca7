"""What a GPU makes of it: from a slide file to a store, with the networks of UNI and UNI2-h.

    python benchmarks/gpu.py [--quick] [--json FILE] [--device auto|cpu|cuda]

It needs the packages and this checkout (``PYTHONPATH=.:cli``), no network, no git, no weights: the networks are drawn at
random, and the slide is made. On a machine without a GPU a small network stands in, and the record says ``cpu``: then the
figures show that it runs, no more.

For each network
- patches/s: bare (bytes are on the device, normalised there and encoded, nothing else) and end to end (`embed` from the
  slide file into a store on disk, the encoder loaded before, after a first run that sizes its batches)
- share_of_bare_encoder: end to end / bare
- share of the card's bf16 peak: floating-point operations of a pass, as torch counts them, beside matrix products of
  8,192 a side in the same process
- the largest difference of the device's vectors from those of the CPU in float32
- milliseconds of one thread, or of the device, per 1,000 patches: reading the file, decoding, cutting, copying to the
  device, encoding, writing

Then training and prediction where they have a GPU path
- the published network (`paper`), beside `dense` on the CPU
- `attention`: steps a second on blocks that are streamed from a store; their share of the steps on blocks read before is
  the share of the time in which the device does not wait
- `predict --device`: patches of a `dense` map a second, beside the CPU in turn
"""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
import torch
from _common import Result, report, timed, write
from _models import invent_model
from _stores import Made, write_store
from attention import STREAMED, streaming
from numpy.typing import NDArray
from reading import MPP, TILE_PX, aperio_like
from torch.utils.flop_counter import FlopCounterMode
from training import side_by_side

from featurestore.blocks import DEFAULT_BLOCK, plan_blocks
from featurestore.embedding import embed as embedding
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.device import DEVICES, pick_device
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.network_encoder import NetworkEncoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.patch_reader import read_batches
from featurestore.storage.float16 import to_float16
from featurestore.storage.store import Store
from histosge.models.block_training import AttentionSettings
from histosge.prediction.predict import PredictSettings, predict

GPU_KEYS = ("uni", "uni2-h")
CPU_KEYS = ("timm:test_vit",)
"""The stand-in on a machine without a GPU: a ViT-L/16 would take an hour there."""
SPEC = GridSpec(mpp=MPP, patch_px=224, stride_px=224)
SLIDE_PATCHES = 15_000
"""Tissue patches of a usual slide at 20x, for slides an hour."""
SMALL_TIMES, USUAL_TIMES = 4, 7
"""Sides of the slides in pictures of 4,096 px: 5,329 and 16,384 patches. What each slide costs before its first batch and
after its last weighs more in the small one."""
COMPARED = 16
"""Patches whose vectors are compared with the CPU's."""
PRODUCT_SIDE = {"cuda": 8192, "cpu": 1024}
Timed = dict[str, float]


def main() -> None:
    """Measure all of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer runs of each network")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    parser.add_argument("--device", choices=DEVICES, default="auto")
    asked = parser.parse_args()
    device = pick_device(asked.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    benchmark = f"gpu ({name})"
    results = [
        Result(f"device: {name}", float(torch.cuda.device_count() if device.type == "cuda" else 0), "GPUs")
    ]
    if device.type == "cpu":
        print(
            f"no GPU: {', '.join(CPU_KEYS)} stand in for {', '.join(GPU_KEYS)} on this CPU", file=sys.stderr
        )
    with tempfile.TemporaryDirectory(dir=os.environ.get("HISTOSGE_BENCH_CACHE")) as folder:
        slides = [
            aperio_like(_new_folder(folder, f"{times}"), times)
            for times in ((1,) if device.type == "cpu" else (SMALL_TIMES, USUAL_TIMES))
        ]
        peak = bf16_peak(device)
        results.append(Result("bf16 matrix products", peak / 1e12, "TFLOP/s"))
        for key in GPU_KEYS if device.type == "cuda" else CPU_KEYS:
            results += network(key, slides, Path(folder), device, peak, runs=2 if asked.quick else 5)
            if asked.json is not None:  # what was measured stays, whatever becomes of the rest
                write(benchmark, results, asked)
        for part in (attention, prediction):
            results += part(Path(folder) / part.__name__, device)
            if asked.json is not None:
                write(benchmark, results, asked)
        results += side_by_side(Path(folder) / "training", 100)
    report(benchmark, results, asked)


def bf16_peak(device: torch.device) -> float:
    """Return the floating-point operations a second of bf16 matrix products."""
    side = PRODUCT_SIDE[device.type]
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))

    def products(n: int = 10) -> None:
        for _ in range(n):
            torch.mm(a, b)
        _wait(device)

    products(3)
    return max(10 * 2 * side**3 / timed(products)[0] for _ in range(3))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _new_folder(parent: str, name: str) -> Path:
    folder = Path(parent) / name
    folder.mkdir()
    return folder


def network(
    key: str, slides: list[Path], folder: Path, device: torch.device, peak: float, *, runs: int
) -> list[Result]:
    """Measure one network on slides; the last one's figures count."""
    options = EncoderOptions(random_weights=True, device=device.type)
    loading, encoder = timed(load_encoder, key, options)
    assert isinstance(encoder, NetworkEncoder)
    label = key.removeprefix("timm:")
    slide, store = slides[-1], str(folder / f"{label}-warm")
    first, result = timed(_embed, slide, store, encoder)
    batches = _in_memory(slide, encoder.batch)
    bare = max(_bare_rate(encoder, batches, device) for _ in range(3))
    rates = {
        one: max(_rate(one, folder / f"{label}-{one.parent.name}-{i}", encoder) for i in range(runs))
        for one in slides
    }
    whole, small = rates[slide], rates[slides[0]]
    flops = _flops(encoder, batches[0])
    hour = 3600 / (SLIDE_PATCHES / whole)
    dtype = encoder.identity.facts["dtype"]
    target = ">= 0.9" if device.type == "cuda" else ""
    return [
        Result(f"{label}: loading, random weights", loading, "s"),
        Result(f"{label}: first run, {result.patches} patches", first, "s"),
        Result(f"{label}: bare encoder, {dtype}, {_pass_size(encoder)} a pass", bare, "patches/s"),
        Result(f"{label}: end to end", whole, "patches/s"),
        Result(f"{label}: end to end, small slide", small, "patches/s"),
        Result(f"share_of_bare_encoder {label}", whole / bare, "", target),
        Result(f"{label}: operations of a patch", flops / 1e9, "GFLOP"),
        Result(f"share_of_bf16_peak {label}", whole * flops / peak),
        Result(f"slides_per_hour {label}", hour, f"of {SLIDE_PATCHES} patches"),
        *_agreement(key, label, encoder, batches[0][:COMPARED], device),
        *(
            Result(f"{label}: {what}", 1e6 * seconds, "ms per 1,000 patches")
            for what, seconds in _split(slide, store, encoder, batches, device, 1 / bare).items()
        ),
    ]


def _rate(slide: Path, store: Path, encoder: NetworkEncoder) -> float:
    seconds, result = timed(_embed, slide, str(store), encoder)
    return result.patches / seconds


def _embed(slide: Path, store: str, encoder: NetworkEncoder) -> embedding.SlideResult:
    """Embed with an encoder that is loaded already."""
    key = encoder.identity.key
    loading, embedding.load_encoders = embedding.load_encoders, lambda settings: {key: encoder}
    try:
        (result,) = embed(slide, store, EmbedSettings((key,), SPEC, tissue="none"))
    finally:
        embedding.load_encoders = loading
    assert result.state == "done", result.reason
    return result


def _in_memory(path: Path, size: int, limit: int = 8) -> list[NDArray[np.uint8]]:
    """Read some batches of the slide's patches."""
    slide = open_slide(str(path))
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, SPEC)
    found: list[NDArray[np.uint8]] = []
    for block in plan_blocks(grid.shape, DEFAULT_BLOCK):
        for batch in read_batches(slide, grid, block, np.ones(block.shape, bool), size):
            found.append(batch.pixels)
            if len(found) == limit:
                return found
    return found


def _pass_size(encoder: NetworkEncoder) -> int:
    """Return the patches of a forward pass: memory may have room for more than a batch."""
    return min(encoder.chunk, encoder.batch)


def _bare_rate(encoder: NetworkEncoder, batches: list[NDArray[np.uint8]], device: torch.device) -> float:
    """Encode batches whose bytes are on the device already: no copies, no slide, no store."""
    chunk = _pass_size(encoder)
    on_device = [
        part
        for batch in batches
        for part in torch.from_numpy(batch).to(device).split(chunk)
        if len(part) == chunk
    ]

    @torch.inference_mode()
    def run(parts: list[torch.Tensor]) -> None:
        for part in parts:
            encoder.forward(part)
        _wait(device)

    assert on_device, f"the slide has no whole batch of {chunk} patches"
    run(on_device[:1])
    return sum(map(len, on_device)) / timed(run, on_device)[0]


def _flops(encoder: NetworkEncoder, batch: NDArray[np.uint8]) -> float:
    """Return the floating-point operations of one patch."""
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), counter:
        encoder.forward(torch.from_numpy(batch[:1]).to(encoder.device))
    return float(counter.get_total_flops())


def attention(folder: Path, device: torch.device) -> list[Result]:
    """Train the network of `attention` on blocks from a store, in its default size."""
    found = streaming(folder, device, AttentionSettings())
    return [
        replace(
            one, what=f"attention, {STREAMED.dim} dims: {one.what}" if one.unit else f"{one.what} {device}"
        )
        for one in found
    ]


PREDICTED = {"cuda": (320, 320), "cpu": (64, 64)}
"""Patches of the slide that is predicted: 100,000, and as many as a CPU does at once."""


def prediction(folder: Path, device: torch.device, dim: int = 1536, genes: int = 1000) -> list[Result]:
    """Predict one slide by `dense` on the device and on the CPU, in turn."""
    shape = PREDICTED[device.type]
    store = write_store(folder / "store", 1, Made(shape, dim))
    invent_model(store, "S00", folder / "model", genes)
    seconds: dict[str, list[float]] = {"cpu": [], device.type: []}
    for _ in range(3):
        for name, each in seconds.items():
            shutil.rmtree(folder / "maps", ignore_errors=True)
            settings = PredictSettings(device=name)
            each.append(timed(predict, store.location.url, folder / "model", folder / "maps", settings)[0])
    n = shape[0] * shape[1]
    return [
        Result(f"predict, {dim} dims, {genes} genes, {name}: {n} patches", n / min(each), "patches/s")
        for name, each in seconds.items()
    ]


def _agreement(
    key: str, label: str, encoder: NetworkEncoder, patches: NDArray[np.uint8], device: torch.device
) -> list[Result]:
    """Compare vectors of the device with those of the CPU in float32: in its own arithmetic, and in float32."""
    options = {"random_weights": True}
    exact = load_encoder(key, EncoderOptions(device="cpu", precision="fp32", **options)).encode(patches)
    found = [
        Result(f"{label}: cosine to the CPU in fp32", _cosine(encoder.encode(patches), exact), "", ">= 0.99")
    ]
    if device.type == "cuda":
        same = load_encoder(key, EncoderOptions(device="cuda", precision="fp32", **options))
        cosine = _cosine(same.encode(patches), exact)
        found.append(Result(f"{label}: cosine to the CPU, both in fp32", cosine, "", ">= 0.99999"))
    return found


def _cosine(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    a, b = (torch.from_numpy(vectors).double() for vectors in (one, other))
    return float(torch.cosine_similarity(a, b).min())


def _split(
    path: Path,
    store: str,
    encoder: NetworkEncoder,
    batches: list[NDArray[np.uint8]],
    device: torch.device,
    encoding: float,
) -> Timed:
    """Return the seconds a patch of each step alone: one thread, or the device."""
    n = sum(map(len, batches))
    cutting, _ = timed(_in_memory, path, encoder.batch)
    # As many tiles as have the area of these patches.
    reading, streams = timed(_compressed_tiles, path, round(n * (SPEC.patch_px / TILE_PX) ** 2))
    buffer = np.empty((TILE_PX, TILE_PX, 3), np.uint8)
    decoding, _ = timed(lambda: [simplejpeg.decode_jpeg(stream, buffer=buffer) for stream in streams])
    found = {
        "reading the file": reading,
        "decoding": decoding,
        "cutting": max(0.0, cutting - reading - decoding),
    }
    if device.type == "cuda":
        found["copying to the device"] = _best(lambda: _copy(batches, device))
    found["encoding"] = encoding * n
    opened = Store.open(store)
    slide_id, grid_key = path.stem, SPEC.key
    array = opened.embedding(slide_id, grid_key, encoder.identity.key, read_only=False)
    block = opened.grid(slide_id, grid_key).planned(array.block_shape)[0]
    vectors = array.read_block(block).astype(np.float32).reshape(-1, encoder.identity.dim)

    def write() -> None:
        values, _ = to_float16(vectors)
        array.write(block, values.reshape(*block.shape, -1))

    found["writing"] = _best(write) * n / len(vectors)
    return {what: seconds / n for what, seconds in found.items()}


def _compressed_tiles(path: Path, n: int) -> list[bytes]:
    """Read the JPEG streams of the first tiles."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        offsets, counts = page.dataoffsets[:n], page.databytecounts[:n]
        tables = page.jpegtables
    found = []
    with path.open("rb", buffering=0) as stream:
        for offset, count in zip(offsets, counts, strict=True):
            data = os.pread(stream.fileno(), count, offset)
            found.append(data if tables is None else tables[:-2] + data[2:])
    return found


def _best(work: Callable[[], None]) -> float:
    return min(timed(work)[0] for _ in range(3))


def _copy(batches: list[NDArray[np.uint8]], device: torch.device) -> None:
    for batch in batches:
        torch.from_numpy(batch).pin_memory().to(device, non_blocking=True)
    _wait(device)


if __name__ == "__main__":
    begun = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - begun:.0f} s in all")
