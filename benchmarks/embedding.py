"""How fast a slide is embedded, beside the bare encoder on the same patches already in memory.

    python benchmarks/embedding.py [--quick] [--json FILE]

Both sides run in one process, in turn, three times; the best of each counts.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from _common import options, report, section, timed

from featurestore.embedding import EmbedSettings, embed
from featurestore.encoder import load_encoder
from featurestore.grid import GridSpec, PatchGrid
from featurestore.patches import read_batches
from featurestore.slide import open_slide
from featurestore.store import Store

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
BATCH = 64


def main() -> None:
    """Measure each encoder."""
    asked = options(__doc__)
    repeats = 1 if asked.quick else 3
    with tempfile.TemporaryDirectory() as folder:
        slide = section(Path(folder), quick=asked.quick).slide
        rows = [_measure(key, slide, Path(folder), repeats) for key in ("morphology", "colour")]
    report(f"embedding a slide, {torch.get_num_threads()} threads", rows, asked.json)


def _measure(key: str, slide: Path, folder: Path, repeats: int) -> dict[str, object]:
    encoder = load_encoder(key)
    whole, bare = [], []
    for i in range(repeats):
        store = str(folder / f"{key}{i}.zarr")
        seconds, (result,) = timed(embed, str(slide), store, EmbedSettings((key,), SPEC))
        whole.append(result.patches / seconds)
        batches = _in_memory(slide, store)
        encoder.encode(batches[0])
        seconds, _ = timed(list, map(encoder.encode, batches))
        bare.append(sum(map(len, batches)) / seconds)
    return {
        "encoder": key,
        "patches": result.patches,
        "bare encoder, patches/s": max(bare),
        "whole embed, patches/s": max(whole),
        "share of bare": max(whole) / max(bare),
    }


def _in_memory(slide: Path, store: str, limit: int = 8) -> list[np.ndarray]:
    opened = open_slide(str(slide))
    stored = Store.open(store).grid(slide.stem, SPEC.key)
    grid: PatchGrid = stored.grid
    batches = []
    for block in stored.planned((32, 32)):
        for batch in read_batches(opened, grid, block, stored.is_tissue[block.slices], BATCH):
            batches.append(batch.pixels)
            if len(batches) == limit:
                return batches
    return batches


if __name__ == "__main__":
    main()
