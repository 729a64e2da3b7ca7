"""How fast slides are embedded, and what it costs in requests.

    python benchmarks/embedding.py [--quick] [--json FILE]

- share_of_bare_encoder: the whole of `embed` beside the encoder alone on patches that are already in memory,
  in turn, best of three (ViT-S/16 with random weights; morphology beside it)
- puts_per_block, gets_while_writing: counted by a proxy in front of a real S3 server
- two_workers_speedup: one worker process against two, one thread each, with an encoder so light that reading
  dominates; beside it what two processes gain that only decode
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from _common import Result, options, report, section, timed
from _s3 import Proxy, environment, serving

from featurestore.embedding.dask_cluster import embed_on_cluster, local_client
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.slides.patch_reader import read_batches
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
VIT = "timm:vit_small_patch16_224"
BATCH = 64


def main() -> None:
    """Measure all of it."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slide = section(folder, quick=asked.quick).slide
        results = [
            *share_of_bare(VIT, "share_of_bare_encoder", slide, folder, 1, quick=asked.quick),
            *share_of_bare("morphology", "share_of_bare_morphology", slide, folder, 3, quick=asked.quick),
            *requests(slide, folder),
            *two_workers(slide, folder, 1 if asked.quick else 3),
        ]
    report("embedding", results, asked.json)


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


def two_workers(slide: Path, folder: Path, repeats: int) -> list[Result]:
    """Compare one worker with two where reading dominates."""
    best = {}
    settings = EmbedSettings(("colour",), GridSpec(0.5, 224, 224), block_shape=(4, 4))
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
