"""What a dense map of 1,000 genes costs: memory, time against patches, compute against its bare matrix products.

    python benchmarks/predicting.py [--quick] [--json FILE]

Stores are made directly, with random embeddings of 1,024 dimensions, the width of a ViT-L (and of 128, where nothing is
reduced first); `dense` is fitted on invented spots. The bare products are those that the model's linear steps come down
to, in the same precision, on arrays of the same sizes that are there already: embeddings to components (of a block's
own patches), the Gaussians of every view along rows and columns of a window, views to patterns, patterns to genes; sums
of squares and roots, filling the lattice and putting results in their place are not among them. They run with the matrix
library's threads, and block by block side by side as prediction does; the faster counts. Writing is timed apart.
"""

import subprocess
import sys
import tempfile
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import Result, options, report
from _models import invent_model
from _stores import Made, write_store
from numpy.typing import NDArray

from featurestore.storage.store import Store
from histosge.data.embedded_slide import EmbeddedSlide, Window, open_embedded, stream_windows
from histosge.models.dense import DenseModel
from histosge.models.multiscale import MOMENTS
from histosge.prediction.expression_store import ExpressionStore
from histosge.threads import side_by_side, usable_cores
from histosge.training.saved_model import load_model

DIMS, GENES = (1024, 128), 1000
WINDOWS = 24


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    small, large = ((64, 160), (320, 320)) if asked.quick else ((320, 320), (1000, 1024))
    results = []
    for dim in DIMS:
        wide = dim == DIMS[0]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            runs = [Run(folder / f"{side[0] * side[1]}", side, dim) for side in (small, large)]
            ratio = runs[1].seconds / runs[0].seconds
            found = [
                *(Result(f"{run.patches} patches: seconds", run.seconds, "s") for run in runs),
                Result("patches a second", runs[1].patches / runs[1].seconds, "patches/s"),
                Result("peak_gb", runs[1].peak_gb, "GB", "<= 2"),
                Result("time_ratio_10x_patches", ratio, "x", "<= 11"),
                *stages(runs[1]),
            ]
        results += found if wide else [replace(one, what=f"{dim} dims: {one.what}") for one in found]
    report("predicting", results, asked.json)


SCRIPT = """
    import sys, time
    from histosge.prediction.predict import predict
    begun = time.perf_counter()
    predict(*sys.argv[1:])
    seconds = time.perf_counter() - begun
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(seconds, peak)
"""


class Run:
    """One slide, predicted in a process of its own."""

    def __init__(self, folder: Path, shape: tuple[int, int], dim: int) -> None:
        self.patches = shape[0] * shape[1]
        self.folder = folder
        store = write_store(folder / "store", 1, Made(shape, dim))
        self.url, self.model = store.location.url, folder / "model"
        invent_model(store, "S00", self.model, GENES)
        command = [
            sys.executable,
            "-c",
            textwrap.dedent(SCRIPT),
            self.url,
            str(self.model),
            str(folder / "maps"),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, peak = done.stdout.split()
        self.seconds, self.peak_gb = float(seconds), int(peak) / 2**20


def stages(run: Run) -> list[Result]:
    """Time the stages apart, on some windows from the middle of the slide."""
    slide = open_embedded(Store.open(run.url), "S00", None, None)
    model = load_model(run.model).model
    assert isinstance(model, DenseModel)
    blocks = slide.stored.planned(slide.array.block_shape)
    blocks = blocks[len(blocks) // 2 :][:WINDOWS]
    reduce, model = model.split()
    begun = time.perf_counter()
    windows = list(stream_windows(slide, blocks, model.halo_um))
    read = time.perf_counter() - begun
    patches = sum(int(window.own.sum()) for window in windows)
    if reduce is not None:  # as it is read, once per patch: here, those of the blocks
        own = [window.patches.embedding[window.own] for window in windows]
        windows = list(stream_windows(slide, blocks, model.halo_um, reduce))

    def work(number: int) -> int:
        if reduce is not None:
            reduce(own[number])
        return len(_predict(model, windows[number]))

    compute, products = [], []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in side_by_side(work, range(len(windows)), usable_cores()):
            pass  # as in prediction, where what is written makes way for the next
        compute.append(time.perf_counter() - begun)
        products += bare_products(model, slide, len(windows))
    predicted = [_predict(model, window) for window in windows]
    begun = time.perf_counter()
    values = [
        genes.reshape(*window.block.shape, GENES) for window, genes in zip(windows, predicted, strict=True)
    ]
    array = (
        ExpressionStore.open(str(run.folder / "maps"))
        .map("S00", slide.stored.grid.spec.key, read_only=False)
        .array
    )
    for window, genes in zip(windows, values, strict=True):
        array.write(window.block, genes)
    write = time.perf_counter() - begun
    return [
        Result("reading", patches / read, "patches/s"),
        Result("computing", patches / min(compute), "patches/s"),
        Result("its bare matrix products", patches / min(products), "patches/s"),
        Result("share_of_bare_products", min(products) / min(compute), "", ">= 0.8"),
        Result("writing", patches / write, "patches/s"),
    ]


def _predict(model: DenseModel, window: Window) -> NDArray[np.float32]:
    return model.predict_some(window.patches, np.flatnonzero(window.own))


def bare_products(model: DenseModel, slide: EmbeddedSlide, n_blocks: int) -> list[float]:
    """Return the seconds of nothing but matrix products, for as many blocks, both ways."""
    rng = np.random.default_rng(0)
    rows, cols = slide.array.block_shape
    halo = int(np.ceil(model.halo_um / slide.stored.grid.stride_um))
    sigmas = {sigma for sigma, _ in MOMENTS if sigma > 0}

    def some(*shape: int) -> NDArray[np.float32]:
        return rng.standard_normal(shape, dtype=np.float32)

    dim = model.affine.weight.shape[0] // len(MOMENTS)
    embedding = some(rows * cols, slide.array.shape[2])
    to_components = some(embedding.shape[1], dim) if dim < embedding.shape[1] else None
    lattice = some(rows + 2 * halo, (cols + 2 * halo) * dim)
    down, along = some(rows, rows + 2 * halo), some(cols, cols + 2 * halo)
    features, to_patterns = some(rows * cols, dim * len(MOMENTS)), model.affine.weight.astype(np.float32)
    to_genes = some(to_patterns.shape[1], GENES)

    def products(_: int) -> None:
        if to_components is not None:
            embedding @ to_components
        for _ in range(2 * len(sigmas)):  # of values and of their squares
            half = (down @ lattice).reshape(rows, -1, dim)
            np.matmul(along, half)
        features @ to_patterns @ to_genes

    begun = time.perf_counter()
    for block in range(n_blocks):
        products(block)
    middle = time.perf_counter()
    for _ in side_by_side(products, range(n_blocks), usable_cores()):
        pass
    return [middle - begun, time.perf_counter() - middle]


if __name__ == "__main__":
    main()
