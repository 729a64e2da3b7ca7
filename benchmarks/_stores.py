"""Feature stores of any size without a slide: random embeddings, written as the embedding writes them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.protocol import EncoderIdentity
from featurestore.grid import GridSpec, PatchGrid
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import SlideRecord, Store
from featurestore.tissue.survey import Survey

SPEC = GridSpec(mpp=0.5, patch_px=224, stride_px=112)


@dataclass(frozen=True)
class Made:
    """What a slide of a made store should look like.

    Parameters
    ----------
    shape
        Patches, ``(rows, cols)``.
    dim
        Of an embedding.
    block
        Patches in a block.
    frame
        So many patches on the left and the top are background, all else is tissue.
    """

    shape: tuple[int, int]
    dim: int
    block: tuple[int, int] = (32, 32)
    frame: int = 0


def write_store(folder: Path, slides: int, made: Made, seed: int = 0) -> Store:
    """Write slides ``S00``, ``S01`` ... of independent normal embeddings."""
    store = Store.open_or_create(str(folder))
    for number in range(slides):
        rng = np.random.default_rng([seed, number])
        array, is_tissue = add_slide(store, f"S{number:02}", made)
        # One block's worth of numbers, shuffled for each block: drawing a normal costs more than writing it.
        values = rng.standard_normal((*made.block, made.dim), dtype=np.float32).astype(np.float16)
        for block in store.grid(f"S{number:02}", SPEC.key).planned(made.block):
            values = np.roll(rng.permutation(values, axis=0), int(rng.integers(made.dim)), axis=2)
            part = values[: block.shape[0], : block.shape[1]].copy()
            part[~is_tissue[block.slices]] = np.nan
            array.write(block, part)
        store.consolidate(f"S{number:02}")
    return store


def add_slide(store: Store, slide_id: str, made: Made) -> tuple[BlockArray, NDArray[np.bool_]]:
    """Write a slide's metadata; return its empty embedding and which patches are tissue."""
    rows, cols = made.shape
    grid = PatchGrid(SPEC, SPEC.mpp, SPEC.mpp, rows, cols)
    is_tissue = np.zeros(made.shape, bool)
    is_tissue[made.frame :, made.frame :] = True
    width, height = grid.region_px((0, rows), (0, cols))[2:]
    store.add_slide(SlideRecord(slide_id, "made", (width, height), SPEC.mpp, f"made-{slide_id}"))
    rgb = np.full((rows, cols, 3), 200, np.uint8)
    store.add_grid(slide_id, grid, Survey(is_tissue * np.uint8(255), rgb, {"name": "made"}), {})
    return store.add_embedding(slide_id, grid, EncoderIdentity("random", made.dim), made.block), is_tissue
