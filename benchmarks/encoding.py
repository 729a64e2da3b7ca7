"""How much of a network's own speed an encoder keeps, what half the bits gain, and what they change.

    python benchmarks/encoding.py [--quick] [--json FILE]

Both sides run the same timm network with the same random weights in the same arithmetic on the same patches, in turn,
and the best of three counts. The bare loop has its batches normalised and on the device before the clock starts; the
encoder starts from bytes. Sizes of a pass are compared, too. On a machine with a GPU the architectures of UNI and UNI2-h
are measured as well; `gpu.py` has them from a slide file.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import Result, options, report, section, timed

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.architecture import build
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.network_encoder import CPU_CHUNK, NetworkEncoder
from featurestore.encoders.precision import autocast, device_dtypes
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.records import EncoderRecord, find
from featurestore.encoders.vision import ENGINES, RANDOM_SEED, timm_record
from featurestore.grid import GridSpec

SMALL, TINY = "timm:vit_small_patch16_224", "timm:vit_tiny_patch16_224"
GPU_KEYS = ("uni", "uni2-h")
GPU_BATCHES = (64, 128, 256)
CPU_BATCHES = (4, 8, 16, 32, 64)
TIMES = 3


def main() -> None:
    """Measure all of it."""
    asked = options(__doc__)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keys = [TINY] if asked.quick else [SMALL, *(GPU_KEYS if device.type == "cuda" else ())]
    results = []
    for key in keys:
        results += share_of_bare(key, device, quick=asked.quick)
    results += batch_sizes(TINY if asked.quick else SMALL, device)
    results += differences(TINY if asked.quick else SMALL, device)
    if device.type == "cpu":
        results += engines(TINY if asked.quick else SMALL, quick=asked.quick)
    with tempfile.TemporaryDirectory() as name:
        results += one_pass(Path(name), device, quick=asked.quick)
    report("encoding", results, asked)


def patches(n: int, side: int = 224) -> np.ndarray:
    """Return patches with some structure, bytes."""
    coarse = np.random.default_rng(n).integers(0, 256, (n, 28, 28, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((1, side // 28, side // 28, 1), np.uint8))


def _record(key: str) -> EncoderRecord:
    return find(key) or timm_record(key)


def share_of_bare(key: str, device: torch.device, *, quick: bool) -> list[Result]:
    """Compare the encoder with its own network in a bare loop, in every arithmetic of the device."""
    found = []
    n = 2048 if device.type == "cuda" else 128 if quick or key == TINY else 192
    pixels = patches(n)
    for precision in device_dtypes(device):
        encoder = load_encoder(
            key, EncoderOptions(random_weights=True, device=device.type, precision=precision)
        )
        assert isinstance(encoder, NetworkEncoder)
        sizes = GPU_BATCHES if device.type == "cuda" else (CPU_CHUNK, 64)
        loops = [_bare_loop(key, pixels, size, device, precision) for size in sizes]
        encoder.encode(pixels)
        for loop in loops:
            loop()
        ours, bare = [], []
        for _ in range(TIMES):
            ours.append(n / timed(encoder.encode, pixels)[0])
            bare += [n / timed(loop)[0] for loop in loops]
        found += [
            Result(f"{key}, {precision}: bare loop, best batch", max(bare), "patches/s"),
            Result(f"{key}, {precision}: encoder", max(ours), "patches/s"),
            Result(f"share_of_bare_loop {key} {precision}", max(ours) / max(bare), "", ">= 0.95"),
        ]
    return found


def _bare_loop(
    key: str, pixels: np.ndarray, size: int, device: torch.device, precision: str
) -> Callable[[], None]:
    record = _record(key)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_SEED)
        model = build(record).eval().to(device)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div(255).to(device)
    batches = list(images.split(size))

    @torch.inference_mode()
    def run() -> None:
        with autocast(device, precision):
            vectors = [model(batch) for batch in batches]
        torch.cat(vectors).float().cpu()

    return run


def differences(key: str, device: torch.device) -> list[Result]:
    """Compare the vectors of one encoder across arithmetics and batches."""
    pixels = patches(48)

    def load(precision: str) -> NetworkEncoder:
        loaded = load_encoder(
            key, EncoderOptions(random_weights=True, device=device.type, precision=precision)
        )
        assert isinstance(loaded, NetworkEncoder)
        return loaded

    full = load("fp32")
    exact = full.encode(pixels)
    alone = np.concatenate([full.encode(pixels[i : i + 7]) for i in range(0, len(pixels), 7)])
    target = "= 0" if device.type == "cpu" else ""
    found = [
        Result("largest difference between batchings", float(np.abs(exact - alone).max()), "", target),
        Result("cosine between batchings", _cosine(exact, alone), "", ">= 0.99999"),
    ]
    return found + [
        Result(f"cosine of {precision} to fp32", _cosine(load(precision).encode(pixels), exact))
        for precision in device_dtypes(device)[1:]
    ]


def engines(key: str, *, quick: bool) -> list[Result]:
    """Compare OpenVINO with torch on a CPU, in turn."""
    found = []
    n = 64 if quick or key == TINY else 128
    pixels = patches(n)
    for precision in device_dtypes(torch.device("cpu")):
        loaded = {
            engine: load_encoder(
                key, EncoderOptions(random_weights=True, device="cpu", precision=precision, engine=engine)
            )
            for engine in ENGINES
        }
        vectors = {engine: encoder.encode(pixels) for engine, encoder in loaded.items()}
        best = dict.fromkeys(loaded, 0.0)
        for _ in range(TIMES):
            for engine, encoder in loaded.items():
                best[engine] = max(best[engine], n / timed(encoder.encode, pixels)[0])
        found += [
            Result(f"{key}, {precision}: torch", best["torch"], "patches/s"),
            Result(f"{key}, {precision}: openvino", best["openvino"], "patches/s"),
            Result(f"openvino_speedup {precision}", best["openvino"] / best["torch"], "x", ">= 1.3"),
            Result(f"openvino_cosine {precision}", _cosine(*vectors.values()), "", ">= 0.9999"),
        ]
    return found


def _cosine(one: np.ndarray, other: np.ndarray) -> float:
    a, b = (torch.from_numpy(vectors).double() for vectors in (one, other))
    return float(torch.cosine_similarity(a, b).min())


def one_pass(folder: Path, device: torch.device, *, quick: bool) -> list[Result]:
    """Compare two encoders in one pass over a slide with two passes of one."""
    slide = section(folder, quick=True).slide
    spec = GridSpec(0.5, 224, 224)
    keys = ("morphology", TINY if quick or device.type == "cpu" else SMALL)
    options_ = EncoderOptions(random_weights=True, device=device.type)

    def run(name: str, *which: str) -> float:
        settings = EmbedSettings(which, spec, options_)
        return min(timed(embed, str(slide), str(folder / f"{name}{i}"), settings)[0] for i in range(2))

    together, apart = run("both", *keys), sum(run(key.replace(":", "-"), key) for key in keys)
    return [
        Result("two encoders, one after the other", apart, "s"),
        Result("two encoders, one pass", together, "s"),
        Result("one_pass_speedup", apart / together, "x"),
    ]


def batch_sizes(key: str, device: torch.device) -> list[Result]:
    """Compare sizes of one pass, in turn: what the default is chosen by."""
    sizes = GPU_BATCHES if device.type == "cuda" else CPU_BATCHES
    pixels = patches(8 * max(sizes) if device.type == "cuda" else 2 * max(sizes))
    encoders = {
        size: load_encoder(key, EncoderOptions(random_weights=True, device=device.type, batch=size))
        for size in sizes
    }
    best = dict.fromkeys(sizes, 0.0)
    for size, encoder in encoders.items():
        encoder.encode(pixels[:size])
    for _ in range(TIMES):
        for size, encoder in encoders.items():
            best[size] = max(best[size], len(pixels) / timed(encoder.encode, pixels)[0])
    return [Result(f"{key}: {size} patches a pass", rate, "patches/s") for size, rate in best.items()]


if __name__ == "__main__":
    main()
