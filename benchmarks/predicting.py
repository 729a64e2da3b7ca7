"""What a dense map of 1,000 genes costs: memory, time against patches, and against the same steps in bare numpy.

    python benchmarks/predicting.py [--quick] [--json FILE]

Stores are made directly, with random embeddings of 1,024 dimensions, the width of a ViT-L (and of 128); `dense` is fitted
on invented spots. The floor is what the model comes to in bare numpy on the same slide, in one pass: the objects read as
bytes, one product with the weights of all scales, the Gaussian of each scale along rows and columns as dense products,
patterns to genes, and the values written as bytes. It neither checks checksums nor knows background, and runs with the
matrix library's threads. `share_of_floor` is its time over that of the whole prediction; both run three times in turn in one
process, and the shortest times count. `share_of_floor_cpu` is the same in CPU-seconds: it hardly depends on other work.
"""

import shutil
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
from histosge.data.embedded_slide import open_embedded
from histosge.models.dense import DenseModel
from histosge.models.scale_ridges import ScaleRidges
from histosge.prediction.predict import predict
from histosge.training.saved_model import load_model

DIMS, GENES = (1024, 128), 1000


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
            wall, cpu = shares_of_floor(runs[1])
            found = [
                *(Result(f"{run.patches} patches: seconds", run.seconds, "s") for run in runs),
                Result("patches a second", runs[1].patches / runs[1].seconds, "patches/s"),
                Result("peak_gb", runs[1].peak_gb, "GB", "<= 2"),
                Result("time_ratio_10x_patches", ratio, "x", "<= 11"),
                Result("share_of_floor", wall, "", ">= 0.6"),
                Result("share_of_floor_cpu", cpu),
            ]
        results += found if wide else [replace(one, what=f"{dim} dims: {one.what}") for one in found]
    report("predicting", results, asked)


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


def shares_of_floor(run: Run, times: int = 3) -> tuple[float, float]:
    """Return the floor's wall-clock and CPU time over those of the prediction."""
    seconds: dict[str, list[tuple[float, float]]] = {"floor": [], "whole": []}
    for _ in range(times):
        seconds["floor"].append(floor(run))
        shutil.rmtree(run.folder / "again", ignore_errors=True)
        begun, used = time.perf_counter(), time.process_time()
        predict(run.url, run.model, run.folder / "again")
        seconds["whole"].append((time.perf_counter() - begun, time.process_time() - used))
    floors, wholes = (np.min(seconds[which], axis=0) for which in ("floor", "whole"))
    return float(floors[0] / wholes[0]), float(floors[1] / wholes[1])


def floor(run: Run) -> tuple[float, float]:
    """Return the seconds and CPU-seconds of the same steps in bare numpy."""
    slide = open_embedded(Store.open(run.url), "S00", None, None)
    model = load_model(run.model).model
    assert isinstance(model, DenseModel)
    linear, targets = model.linear, model.targets
    assert isinstance(linear, ScaleRidges)
    assert linear.weight is not None
    weight = linear.weight.astype(np.float32)
    n_outputs, n_patterns = len(linear.offset), targets.axes.shape[1]
    to_genes = (targets.axes * targets.sd[:, None]).T.astype(np.float32)
    mean = targets.mean.astype(np.float32)
    rows, cols, dim = slide.array.object_shape
    n_rows, n_cols = slide.stored.grid.shape
    stride_um, halo = slide.stored.grid.stride_um, int(linear.halo_um / slide.stored.grid.stride_um)
    bands = [
        (_band(rows, halo, sigma_um / stride_um), _band(cols, halo, sigma_um / stride_um))
        for sigma_um in linear.sigmas_um
        if sigma_um > 0
    ]
    objects = sorted((run.folder / "store" / slide.array.path / "c").glob("*/*/0"))
    begun, used = time.perf_counter(), time.process_time()
    grid = np.zeros(
        (-(-n_rows // rows) * rows + 2 * halo, -(-n_cols // cols) * cols + 2 * halo, weight.shape[1]),
        np.float32,
    )
    for path in objects:
        row, col = int(path.parts[-3]) * rows, int(path.parts[-2]) * cols
        stored = np.frombuffer(path.read_bytes()[: rows * cols * dim * 2], np.float16)
        values = np.nan_to_num(stored.astype(np.float32).reshape(-1, dim)) @ weight
        grid[halo + row : halo + row + rows, halo + col : halo + col + cols] = values.reshape(rows, cols, -1)
    with (run.folder / "floor").open("wb") as out:
        for path in objects:
            row, col = int(path.parts[-3]) * rows, int(path.parts[-2]) * cols
            window = grid[row : row + rows + 2 * halo, col : col + cols + 2 * halo]
            total = window[halo : halo + rows, halo : halo + cols, :n_outputs].copy()
            for i, (down, along) in enumerate(bands, start=1):
                part = np.ascontiguousarray(window[..., i * n_outputs : (i + 1) * n_outputs])
                half = (down @ part.reshape(len(part), -1)).reshape(rows, -1, n_outputs)
                total += np.matmul(along, half)
            patterns = total.reshape(-1, n_outputs)[:, :n_patterns]
            genes = patterns @ to_genes
            genes += mean
            out.write(np.maximum(genes, 0, out=genes).astype(np.float16).tobytes())
    return time.perf_counter() - begun, time.process_time() - used


def _band(n: int, halo: int, sigma: float) -> NDArray[np.float32]:
    """Return the weights of a Gaussian along one axis, ``(n, n + 2 * halo)``; sigma in strides."""
    step = np.arange(-halo, n + halo) - np.arange(n)[:, None]
    weight = np.exp(-((step / sigma) ** 2) / 2) * (abs(step) <= 3 * sigma)
    return np.asarray(weight / weight.sum(axis=1, keepdims=True), np.float32)


if __name__ == "__main__":
    main()
