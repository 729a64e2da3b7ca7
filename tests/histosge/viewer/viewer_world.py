"""Three small slides in a store, a map of two of them, spots of one; and a real server for them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pandas as pd
import polars as pl
import uvicorn
from make_slides import tissue_like, write_pyramid

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge.calibration.conformal import Intervals
from histosge.calibration.depth_strata import DepthStrata
from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.collection import Collection
from histosge.viewer.server import HOST, listen, make_app

MPP = 1.0
SIZE = (1400, 1100)
GRID = GridSpec(mpp=MPP, patch_px=64, stride_px=32)
GENES = ("AAA1", "BBB2", "CCC3", "ABC4", "ZZZ5")
LEFT_TO_RIGHT, TOP_TO_BOTTOM = "AAA1", "BBB2"
SPOT_GENES = (*GENES[:4], "ONLY9")


@dataclass(frozen=True)
class World:
    """Where everything lies. `here` has it all, `gone` has lost its slide, `bare` has no map."""

    store: Path
    maps: Path
    sheet: Path
    domains: Path


def make_world(folder: Path) -> World:
    """Make it all."""
    slides = folder / "slides"
    slides.mkdir()
    for seed, name in enumerate(("bare", "gone", "here")):
        write_pyramid(slides / f"{name}.tif", tissue_like(*SIZE, MPP, seed), MPP)
    made = World(folder / "store", folder / "maps", folder / "sheet.csv", folder / "domains")
    embed(str(slides), str(made.store), EmbedSettings(("colour",), GRID))
    (slides / "gone.tif").unlink()
    store = Store.open(str(made.store))
    maps = ExpressionStore.open_or_create(str(made.maps))
    for name in ("gone", "here"):
        _write_map(store, maps, name)
    _write_domains(store, made.domains)
    spots = _write_spots(folder / "spots.h5ad")
    made.sheet.write_text(f"slide_id,slide,expression\nhere,{slides / 'here.tif'},{spots}\n")
    return made


HALF_WIDTHS = np.array(
    [[0.4, 0.8, 1.2, 1.6, 2.0], [0.2, 0.4, 0.6, 0.8, 1.0], [0.1, 0.2, 0.3, 0.4, 0.5]], np.float32
)
"""By predicted depth, from low to high, of the map of `gone`; that of `here` has one half width a gene."""
DEPTH_EDGES = np.array([7.0, 8.0], np.float32)
_TRUST = np.array([0.9, 0.5, np.nan, 0.1, 0.0], np.float32)


def _write_map(store: Store, maps: ExpressionStore, name: str) -> None:
    """Gene 0 grows from left to right, gene 1 from top to bottom, the others are 2, 3 and 4."""
    stored = store.grid(name, GRID.key)
    has_strata = name == "gone"
    intervals = Intervals(
        np.arange(5, dtype=np.float32) / 4,
        _TRUST,
        0.8 if has_strata else 0.9,
        100,
        "section",
        DepthStrata(DEPTH_EDGES, HALF_WIDTHS) if has_strata else None,
    )
    opened = maps.add_map(
        stored,
        GENES,
        (8, 8),
        {"model": "test"},
        intervals=intervals,
        depth=has_strata,
        trained_on=not has_strata,
    )
    rows, cols = np.mgrid[: stored.grid.n_rows, : stored.grid.n_cols]
    values = np.stack([cols / 8, rows / 8, *(np.full(rows.shape, g) for g in (2.0, 3.0, 4.0))], axis=2)
    # From 6 at the top to 9 at the bottom: all strata occur.
    depth = np.where(stored.is_tissue, 6 + 3 * rows / rows.max(), np.nan)[..., None]
    values[~stored.is_tissue] = np.nan
    for block in opened.planned():
        if opened.depth is not None:
            opened.depth.write(block, depth[block.slices].astype(np.float16))
        opened.array.write(block, values[block.slices].astype(np.float16))


def _write_domains(store: Store, folder: Path) -> None:
    folder.mkdir()
    stored = store.grid("here", GRID.key)
    rows, cols = np.nonzero(stored.is_tissue)
    place = {"x_um": stored.grid.x_um[cols], "y_um": stored.grid.y_um[rows]}
    labels = (cols > stored.grid.n_cols * 0.45).astype(np.int32)
    pl.DataFrame({"row": rows, "col": cols, **place, "cluster": labels}).write_parquet(
        folder / "here.parquet", metadata={"made_by": "two halves\nof a test"}
    )


def _write_spots(path: Path) -> Path:
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(330, 960, 70), np.arange(360, 900, 70)))
    counts = np.random.default_rng(0).poisson(40, (len(x), len(SPOT_GENES)))
    counts[:, 0] = (x - x.min()) / 2  # as the map, it grows from left to right
    data = anndata.AnnData(counts.astype(np.float32), var=pd.DataFrame(index=list(SPOT_GENES)))
    data.obsm["spatial"] = np.stack([x, y], axis=1).astype(float)
    data.write_h5ad(path)
    return path


class Answer(NamedTuple):
    status: int
    body: bytes
    headers: dict[str, str]


Get = Callable[..., Answer]


@contextmanager
def serving(collection: Collection) -> Iterator[str]:
    """Serve a page from a thread, and yield its address."""
    taken = listen(0)
    server = uvicorn.Server(uvicorn.Config(make_app(collection), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        yield f"http://{HOST}:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(120)
        taken.close()
