"""How long a person waits in front of the page: for the first picture, and for another gene.

    python benchmarks/viewing.py [--quick] [--json FILE]

A slide of 105,000 patches, all of them tissue, with 1,000 genes, from the page cache. In Chromium, where there is one: from
the address being opened until the frame with the slide's thumbnail, with all tiles of its H&E, and with the first gene; and
from a gene being chosen until the frame with it. "far" is a gene whose group has not been read yet, "near" one of a group
that is held. Over HTTP alone: the same requests, one after the other; and a region of 20,000 patches compared with the rest,
the first one of a slide, for which the whole map is added up, and another.
"""

import json
import shutil
import statistics
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import uvicorn
from _common import Result, options, report, section, timed

from featurestore.grid import GridSpec, PatchGrid
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import SlideRecord, Store
from featurestore.tissue.survey import Survey
from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.collection import Collection
from histosge.viewer.server import HOST, listen, make_app

N_GENES = 1000
BLOCK = (32, 32)
SWITCHES = 12
REGION = 20_000
"""Patches of the region that is compared with the rest."""
FAR = 300
"""Genes from one far gene to the next: always in another group of 256."""


def main() -> None:
    """Measure one slide."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = section(folder, quick=asked.quick)
        store, maps, sheet = folder / "store.zarr", folder / "maps.zarr", folder / "samples.csv"
        n_patches = write_stores(made.slide, store, maps)
        sheet.write_text(f"slide_id,slide,expression\nslide,{made.slide.name},{made.expression.name}\n")
        results = [
            Result("patches", n_patches),
            Result("genes", N_GENES),
            *over_http(store, maps),
            *in_chromium(store, maps, sheet),
        ]
    report("viewing", results, asked)


def write_stores(slide_file: Path, store: Path, maps: Path) -> int:
    """Write a feature store without embeddings, and a map of random genes; return the number of patches."""
    slide = open_slide(str(slide_file))
    spec = GridSpec(slide.mpp, 26, 26)
    grid = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, spec)
    opened = Store.open_or_create(str(store))
    opened.add_slide(
        SlideRecord("slide", str(slide_file), slide.size_px, slide.mpp, slide_fingerprint(str(slide_file)))
    )
    rgb = slide.read_region(0, 0, grid.n_cols, grid.n_rows, slide.mpp * 26)
    opened.add_grid("slide", grid, Survey(np.full(grid.shape, 255, np.uint8), rgb, {"name": "none"}), {})
    stored = opened.grid("slide", spec.key)
    genes = tuple(f"GENE{i:04d}" for i in range(N_GENES))
    target = ExpressionStore.open_or_create(str(maps)).add_map(stored, genes, BLOCK, {"model": "random"})
    rng = np.random.default_rng(0)
    noise = rng.gamma(2.0, 0.5, (*BLOCK, N_GENES)).astype(np.float16)
    for block in target.planned():
        rows, cols = block.shape
        target.array.write(block, np.roll(noise, sum(block.index), axis=2)[:rows, :cols])
    return grid.n_rows * grid.n_cols


@contextmanager
def serving(store: Path, maps: Path, sheet: Path | None = None) -> Iterator[str]:
    """Serve a page from a thread, all caches empty."""
    collection = Collection.open(str(store), str(maps), str(sheet) if sheet else None)
    taken = listen(0)
    server = uvicorn.Server(uvicorn.Config(make_app(collection), log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [taken]})
    thread.start()
    try:
        yield f"http://{HOST}:{taken.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def over_http(store: Path, maps: Path) -> list[Result]:
    """Time the server alone."""
    with serving(store, maps) as address:

        def get(path: str) -> bytes:
            with urllib.request.urlopen(f"{address}/{path}", timeout=60) as answer:
                return answer.read()

        def picture() -> None:
            for path in (
                "",
                "static/main.js",
                "data/index.json",
                "data/0/slide.json",
                "data/0/thumbnail.png",
            ):
                get(path)
            found = json.loads(get("data/0/picture.json"))
            level = max(1, found["min_level"], found["max_level"] - 3)  # 0 is a single tile
            for col, row in ((0, 0), (1, 0), (0, 1), (1, 1)):
                get(f"data/0/tiles/{level}/{col}_{row}.jpg")

        first, _ = timed(picture)
        get("data/0/layers/0/layer.json")
        far = [timed(get, f"data/0/layers/0/genes/{gene}.f16")[0] for gene in range(0, N_GENES, FAR)]
        near = [timed(get, f"data/0/layers/0/genes/{gene}.f16")[0] for gene in range(1, 1 + SWITCHES)]
        layer = json.loads(get("data/0/layers/0/layer.json"))

        def region(shift: float) -> int:
            """Compare a square of `REGION` patches, shifted by some patches, and return how many it holds."""
            step, side = layer["step_um"], REGION**0.5 * layer["step_um"]
            left, top = (start + shift * step for start in layer["origin_um"])
            corners = [[left, top], [left + side, top], [left + side, top + side], [left, top + side]]
            content = json.dumps({"layer": 0, "region": [[corners]], "other": None}).encode()
            asked = urllib.request.Request(
                f"{address}/data/0/regions", content, {"content-type": "application/json"}
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return int(json.load(answer)["predicted"]["n"])

        first_region, n_inside = timed(region, 0.0)
        next_region, _ = timed(region, 20.0)
    return [
        Result("HTTP: first picture, 4 tiles", first, "s"),
        Result("HTTP: a far gene, slowest", 1000 * max(far), "ms"),
        Result("HTTP: a near gene, median", 1000 * statistics.median(near), "ms"),
        Result("patches of the region", n_inside),
        Result("HTTP: a region, the first of a slide", first_region, "s", "<= 2"),
        Result("HTTP: another region", next_region, "s", "<= 2"),
    ]


@dataclass
class Waits:
    """Milliseconds that were waited in the browser."""

    thumbnail: list[float] = field(default_factory=list)
    tiles: list[float] = field(default_factory=list)
    gene: list[float] = field(default_factory=list)
    far: list[float] = field(default_factory=list)
    near: list[float] = field(default_factory=list)


def in_chromium(store: Path, maps: Path, sheet: Path) -> list[Result]:
    """Time the page; nothing where there is no Chromium."""
    chromium = next((found for n in ("chromium", "google-chrome") if (found := shutil.which(n))), None)
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        print("no Chromium, or no playwright: the page itself is not timed")
        return []
    waits = Waits()
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=chromium, args=flags, timeout=60_000)
        for _ in range(3):
            with serving(store, maps, sheet) as address:
                page = browser.new_page(viewport={"width": 1280, "height": 760})
                _time_page(page, address, waits)
                page.close()
        browser.close()
    return [
        Result("browser: thumbnail, slowest of 3", max(waits.thumbnail) / 1000, "s", "<= 2"),
        Result("browser: H&E sharp, slowest of 3", max(waits.tiles) / 1000, "s", "<= 2"),
        Result("browser: first gene drawn, slowest of 3", max(waits.gene) / 1000, "s"),
        Result("browser: switch to a near gene, median", statistics.median(waits.near), "ms", "<= 300"),
        Result("browser: switch to a near gene, slowest", max(waits.near), "ms", "<= 300"),
        Result("browser: switch to a far gene, median", statistics.median(waits.far), "ms", "<= 300"),
        Result("browser: switch to a far gene, slowest", max(waits.far), "ms", "<= 300"),
    ]


def _time_page(page: "object", address: str, waits: Waits) -> None:
    evaluate: Callable[..., float] = page.evaluate  # type: ignore[attr-defined]
    last = "(name) => performance.getEntriesByName(name).at(-1)?.startTime ?? 0"

    def when(name: str, after: float = 0.0) -> float:
        deadline = time.monotonic() + 60
        while (found := evaluate(last, name)) <= after:
            assert time.monotonic() < deadline, f"the page never came to {name}"
            time.sleep(0.02)
        return found

    def switch(gene: int) -> float:
        before = when("gene-drawn")
        page.fill("#gene", f"GENE{gene:04d}")  # type: ignore[attr-defined]
        page.press("#gene", "Enter")  # type: ignore[attr-defined]
        drawn = when("gene-drawn", before)
        return drawn - when("gene-asked")

    page.goto(address)  # type: ignore[attr-defined]
    waits.thumbnail.append(when("thumbnail"))
    waits.gene.append(when("gene-drawn"))
    # At once, before anything can be read ahead; the spots are still being read.
    waits.far += [switch(gene) for gene in range(FAR, N_GENES, FAR)]
    waits.tiles.append(when("sharp"))
    waits.near += [switch(gene) for gene in range(1, 1 + SWITCHES)]


if __name__ == "__main__":
    main()
