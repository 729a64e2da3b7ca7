"""How fast slides are embedded, and what it costs in requests.

    python benchmarks/embedding.py [--quick] [--json FILE]

- share_of_bare_encoder: the whole of `embed` beside the encoder alone on patches that are already in memory,
  in turn, best of three (ViT-S/16 with random weights; morphology beside it)
- puts_per_block, gets_while_writing: counted by a proxy in front of a real S3 server
- share_of_decoding: the pipeline without a network (read, decode, cut, batch, write), beside bare decoding of the JPEG
  tiles that it needs, in CPU-seconds, in turn; the same with an encoder's preprocessing to floats, with `colour` and
  with `morphology`; and where the time goes. Start-up is left out: a first run loads what is loaded once
- startup_over_bare: CPU-seconds of `histosge embed` from its start to its end on a slide of one batch, less those of the
  shortest script that does the same: import torch and timm, build a ViT-S/16, load its weights, encode the batch
- two_workers_speedup: one worker process against two, one thread each, with an encoder so light that reading
  dominates; beside it what two processes gain that only decode
"""

import cProfile
import os
import pstats
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import simplejpeg
import tifffile
import torch
from _common import Result, options, report, section, timed
from _s3 import Proxy, environment, serving
from reading import MPP, aperio_like

from featurestore.embedding import embed as embedding
from featurestore.embedding.dask_clients import local_client
from featurestore.embedding.dask_cluster import embed_on_cluster
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.architecture import build
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.network_encoder import NetworkEncoder
from featurestore.encoders.preprocessing import Preprocess
from featurestore.encoders.protocol import Encoder, EncoderIdentity, EncoderOptions
from featurestore.encoders.records import Preprocessing
from featurestore.encoders.vision import timm_record
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.patch_reader import read_batches
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
VIT = "timm:vit_small_patch16_224"
BATCH = 64
TILE_SPEC = GridSpec(mpp=MPP, patch_px=256, stride_px=256)
"""Of `share_of_decoding`: patches as large as the slide's tiles (256 px, quality 85), at its own level, edge to edge."""
NULL_DIM = 384
"""Numbers in a vector of the encoder without a network: those of a ViT-S."""
PARTS = {
    "decoding": ("decode_stream",),
    "cutting patches": ("read_patches",),
    "reading the file": ("pread", "_compressed"),
    "arithmetic of torch": ("torch",),
    "writing and metadata": ("open", "fsync", "rename", "posix", "zarr", "json"),
}
"""Of the profile: a part's name, and what the names of its functions or files hold."""


def main() -> None:
    """Measure all of it."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = section(folder, quick=asked.quick).slide
        results = [
            *share_of_bare(VIT, "share_of_bare_encoder", slide, folder, 1, quick=asked.quick),
            *share_of_bare("morphology", "share_of_bare_morphology", slide, folder, 3, quick=asked.quick),
            *share_of_decoding(folder, times=2 if asked.quick else 4, repeats=3),
            *requests(slide, folder),
            *startup(folder, 2 if asked.quick else 5),
            *two_workers(slide, folder, 1 if asked.quick else 3),
        ]
    report("embedding", results, asked)


def share_of_bare(
    key: str, what: str, slide: Path, folder: Path, repeats: int, *, quick: bool
) -> list[Result]:
    """Compare `embed` with the encoder alone."""
    # A ViT on a CPU takes a while: patches side by side are enough for it.
    spec = GridSpec(0.5, 224, 224) if key == VIT else SPEC
    settings = EmbedSettings((key,), spec, EncoderOptions(random_weights=key == VIT))
    encoder = load_encoder(key, settings.options)
    whole, bare, patches = [], [], 0
    for i in range(1 if quick else repeats):
        store = str(folder / f"{what}{i}.zarr")
        seconds, (result,) = timed(embed, str(slide), store, settings)
        patches = result.patches
        whole.append(patches / seconds)
        batches = in_memory(slide, store, spec)
        encoder.encode(batches[0][:2])
        seconds, _ = timed(list, map(encoder.encode, batches))
        bare.append(sum(map(len, batches)) / seconds)
    target = ">= 0.95" if key == VIT else ""
    return [
        Result(f"{key}: bare encoder", max(bare), "patches/s"),
        Result(f"{key}: whole embed, {patches} patches", max(whole), "patches/s"),
        Result(what, max(whole) / max(bare), "", target),
    ]


def in_memory(slide: Path, store: str, spec: GridSpec, limit: int = 8) -> list[np.ndarray]:
    """Read some batches of the slide's tissue patches."""
    stored = Store.open(store).grid(slide.stem, spec.key)
    grid: PatchGrid = stored.grid
    opened, batches = open_slide(str(slide)), []
    for block in stored.planned((32, 32)):
        for batch in read_batches(opened, grid, block, stored.is_tissue[block.slices], BATCH):
            batches.append(batch.pixels)
            if len(batches) == limit:
                return batches
    return batches


class NullEncoder:
    """An encoder without a network: it takes bytes, as a device does, and gives zeros."""

    identity = EncoderIdentity("null", NULL_DIM, {})

    def encode(self, patches: np.ndarray) -> np.ndarray:
        """Return zeros."""
        return np.zeros((len(patches), NULL_DIM), np.float32)


def _preprocessing_only() -> NetworkEncoder:
    """Return an encoder that makes floats of a patch on the CPU and takes its first pixel for a vector."""
    how = Preprocessing(TILE_SPEC.patch_px, None, "bilinear", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    cpu = torch.device("cpu")
    return NetworkEncoder(
        EncoderIdentity("null", NULL_DIM, {"floats": True}),
        lambda images: images[:, 0, 0, :1].repeat(1, NULL_DIM),
        Preprocess(how, cpu),
        cpu,
        "fp32",
    )


def share_of_decoding(folder: Path, times: int, repeats: int) -> list[Result]:
    """Compare `embed` with bare decoding of the slide's tiles; every patch counts as tissue, so both decode all tiles."""
    slide = aperio_like(folder, times)
    encoders: dict[str, Encoder] = {
        "no network": NullEncoder(),
        "preprocessing": _preprocessing_only(),
        "colour": load_encoder("colour"),
        "morphology": load_encoder("morphology"),
    }
    runs = {name: [_cpu_seconds(slide, folder, encoder)] for name, encoder in encoders.items()}  # warm
    bare = [_decode_tiles(slide)]
    for _ in range(repeats):
        bare.append(_decode_tiles(slide))
        for name, encoder in encoders.items():
            if name != "morphology":  # it takes twenty times as long as the others
                runs[name].append(_cpu_seconds(slide, folder, encoder))
    patches = (times * 4096 // TILE_SPEC.patch_px) ** 2
    rate = {name: patches / min(seconds) for name, seconds in runs.items()}
    decoding = patches / min(bare)
    return [
        Result("bare decoding of JPEG tiles", decoding, "tiles per CPU-second"),
        *(Result(f"embed, {name}", found, "patches per CPU-second") for name, found in rate.items()),
        Result("share_of_decoding", rate["no network"] / decoding, "", ">= 0.35"),
        Result("share_of_decoding_with_floats", rate["preprocessing"] / decoding),
        Result("colour_share_of_null", rate["colour"] / rate["no network"], "", ">= 0.8"),
        *_where_time_goes(slide, folder),
    ]


def _cpu_seconds(slide: Path, folder: Path, encoder: Encoder) -> float:
    """Embed the slide with an encoder that is loaded already; return the CPU-seconds of this process."""
    loading, embedding.load_encoders = (
        embedding.load_encoders,
        lambda settings: {encoder.identity.key: encoder},
    )
    try:
        with tempfile.TemporaryDirectory(dir=folder) as store:
            begun = time.process_time()
            settings = EmbedSettings(("colour",), TILE_SPEC, tissue="none")
            (result,) = embed(slide, f"{store}/store", settings)
            seconds = time.process_time() - begun
    finally:
        embedding.load_encoders = loading
    assert result.state == "done", result.reason
    return seconds


def _decode_tiles(path: Path) -> float:
    """Decode every tile of the finest level into one buffer; return the CPU-seconds. The streams are in memory."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[0]
        tables = page.jpegtables
        streams = []
        for offset, count in zip(page.dataoffsets, page.databytecounts, strict=True):
            file.filehandle.seek(offset)
            data = file.filehandle.read(count)
            streams.append(data if tables is None else tables[:-2] + data[2:])
        buffer = np.empty((page.tilelength, page.tilewidth, 3), np.uint8)
    begun = time.process_time()
    for stream in streams:
        simplejpeg.decode_jpeg(stream, buffer=buffer)
    return time.process_time() - begun


def _where_time_goes(slide: Path, folder: Path) -> list[Result]:
    """Profile a run without a network, its reading thread included; return the parts as shares of the whole."""
    profiles: list[cProfile.Profile] = []

    def profiled(work: Callable[[], None]) -> None:
        profile = cProfile.Profile(time.thread_time)
        profiles.append(profile)
        profile.runcall(work)

    start = threading.Thread.run
    threading.Thread.run = lambda thread: profiled(lambda: start(thread))  # type: ignore[method-assign]
    try:
        profiled(lambda: _cpu_seconds(slide, folder, _preprocessing_only()))
    finally:
        threading.Thread.run = start  # type: ignore[method-assign]
    stats = pstats.Stats(*profiles).stats  # type: ignore[attr-defined]
    seconds = dict.fromkeys([*PARTS, "everything else"], 0.0)
    for (file, _, function), (_, _, own, _, _) in stats.items():
        place = f"{file}:{function}"
        part = next((name for name, words in PARTS.items() if any(w in place for w in words)), None)
        seconds[part or "everything else"] += own
    whole = sum(seconds.values())
    return [
        Result(f"profile: {name}", 100 * own / whole, "% of the CPU time") for name, own in seconds.items()
    ]


def requests(slide: Path, folder: Path) -> list[Result]:
    """Count what one slide costs an S3 server."""
    with serving(folder / "objects") as server:
        proxy = Proxy(server.port)
        command = [sys.executable, "-m", "histosge_cli", "embed", str(slide), "s3://test/store"]
        grid = ["--mpp", "0.5", "--patch", "224", "--stride", "56", "--encoder", "colour"]
        subprocess.run(
            [*command, *grid], env={**os.environ, **environment(proxy.port)}, check=True, capture_output=True
        )
        log = list(proxy.log)
        proxy.close()
    blocks = [path for method, path in log if method == "PUT" and "/embedding/c/" in path]
    read_back = [path for method, path in log if method != "PUT" and "/embedding/c/" in path]
    return [
        Result("puts_per_block", len(blocks) / len(set(blocks)), f"({len(blocks)} blocks)", "= 1"),
        Result("gets_while_writing", len(read_back), "", "= 0"),
        Result("other requests, once per slide", len(log) - len(blocks) - len(read_back)),
    ]


BARE_SCRIPT = """
import sys
import numpy as np
import torch
from featurestore.encoders.timm_import import import_timm  # beside a CPU build of torch `import timm` fails
model = import_timm().create_model({name!r}, num_classes=0)
model.load_state_dict(torch.load(sys.argv[1], weights_only=True))
patches = np.load(sys.argv[2])
with torch.inference_mode():
    images = torch.from_numpy(patches).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
    np.save(sys.argv[3], model.eval()(images).numpy())
"""


def startup(folder: Path, repeats: int) -> list[Result]:
    """Compare a whole command with a bare script, in turn, both with one thread and with compiled Python files."""
    record = timm_record(VIT)
    side = 4 * SPEC.patch_px  # 16 patches: what a CPU computes in one pass
    pixels = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
    slide, weights, batch = folder / "batch.tif", folder / "weights.pt", folder / "batch.npy"
    tifffile.imwrite(slide, pixels, tile=(256, 256), photometric="rgb")
    torch.save(build(record).state_dict(), weights)
    np.save(batch, pixels.reshape(4, 224, 4, 224, 3).swapaxes(1, 2).reshape(16, 224, 224, 3))
    script = BARE_SCRIPT.format(name=record.architecture)
    store = folder / "startup.zarr"
    bare = [sys.executable, "-c", script, str(weights), str(batch), str(folder / "vectors.npy")]
    whole = [sys.executable, "-m", "histosge_cli", "embed", str(slide), str(store), "--encoder", VIT]
    whole += ["--weights", str(weights), "--slide-mpp", "0.5", "--tissue", "none"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    # A checkout that is used without being installed may have no folder that compiled files can be written to.
    environ |= {"PYTHONPYCACHEPREFIX": str(folder / "compiled"), "OMP_NUM_THREADS": "1"}
    seconds: dict[str, list[float]] = {"bare": [], "whole": []}
    for turn in range(repeats + 1):
        for name, command in (("bare", bare), ("whole", whole)):
            shutil.rmtree(store, ignore_errors=True)
            spent = _child_seconds(command, environ)
            if turn:  # the first run compiles
                seconds[name].append(spent)
    return [
        Result("a bare script: ViT-S/16, one batch", min(seconds["bare"]), "CPU-seconds"),
        Result("histosge embed: the same", min(seconds["whole"]), "CPU-seconds"),
        Result("startup_over_bare", min(seconds["whole"]) - min(seconds["bare"]), "CPU-seconds", "<= 1"),
    ]


def _child_seconds(command: list[str], environ: dict[str, str]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, env=environ, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def two_workers(slide: Path, folder: Path, repeats: int) -> list[Result]:
    """Compare one worker with two where reading dominates."""
    best = {}
    settings = EmbedSettings(("colour",), GridSpec(0.5, 224, 224), block_shape=(4, 4), allow_duplicates=True)
    copies = [folder / f"copy{i}.tif" for i in range(8)]
    for copy in copies:
        copy.hardlink_to(slide)
    samples = [Sample(copy.stem, str(copy), None, None, "") for copy in copies]
    for n in (1, 2):
        seconds = []
        with local_client(n, threads=1) as client:
            client.wait_for_workers(n)
            embed_on_cluster(client, samples[:n], str(folder / f"warm{n}"), settings, lambda *_: None)
            for i in range(repeats):
                store = str(folder / f"workers{n}-{i}")
                seconds.append(timed(embed_on_cluster, client, samples, store, settings, lambda *_: None)[0])
        best[n] = min(seconds)
    raw = {n: _raw_decoding(copies, n) for n in (1, 2)}
    return [
        Result("one worker", best[1], "s"),
        Result("two workers", best[2], "s"),
        Result("two_workers_speedup", best[1] / best[2], "x", ">= 1.6"),
        Result("two processes that only decode", raw[1] / raw[2], "x"),
    ]


def _raw_decoding(copies: list[Path], processes: int) -> float:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        list(pool.map(_decode, copies[:processes]))
        begun = time.perf_counter()
        list(pool.map(_decode, copies))
        return time.perf_counter() - begun


def _decode(path: Path) -> int:
    slide = open_slide(str(path))
    width, height = slide.size_px
    total = sum(
        int(slide.read_region(0, y, width, min(512, height - y), slide.mpp)[0, 0, 0])
        for y in range(0, height, 512)
    )
    slide.close()
    return total


if __name__ == "__main__":
    main()
