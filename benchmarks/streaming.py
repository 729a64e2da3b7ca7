"""How fast a training loop gets shuffled embeddings from a store, beside what the machine and others can do.

    python benchmarks/streaming.py [--quick] [--json FILE]

Local: the loader with 2 threads (checksums compared), beside one thread's `readinto` of a preallocated 1 GB buffer
from the page cache, and beside a shuffled epoch over an HDF5 file chunked (1, dim), as extractors write it (on its
first patches, scaled). S3: beside a plain concurrent download of the same objects, with as many threads and the same
client library, from the same server. Both sides alternate, and the best of each counts.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import h5py
import numpy as np
from _common import Result, options, report
from _s3 import BUCKET, environment, serving
from _stores import SPEC, Made, write_store

from featurestore.storage.store import Store
from histosge.data.load_settings import LoadSettings
from histosge.data.loader import THREADS_REMOTE, Loader

DIM = 1024
ROUNDS = 5
H5_PATCHES = 20_000


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    side = 256 if asked.quick else 512  # 0.13 or 0.54 GB a slide
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = write_store(folder / "store", 2, Made((side, side), DIM))
        results = local(store, folder)
        results += over_s3(store, folder)
        results += memory(folder, 128 if asked.quick else 192)
    report("streaming", results, asked)


def local(store: Store, folder: Path) -> list[Result]:
    """Compare with the page cache, and with HDF5."""
    loader = Loader(store.location.url, settings=LoadSettings(threads=2))
    file = folder / "plain"
    with file.open("wb") as out:
        for slide_id in store.slide_ids():
            array = store.embedding(slide_id, SPEC.key, "random")
            for block in store.grid(slide_id, SPEC.key).planned(array.block_shape):
                out.write(Path(store.location.path(array.object_path(block.index))).read_bytes())
    size = file.stat().st_size
    buffer = np.zeros(size, np.uint8)
    plain, ours, plain_cpu, our_cpu = [], [], [], []
    for _ in range(ROUNDS):
        with file.open("rb", buffering=0) as source:
            begun, cpu = time.perf_counter(), time.process_time()
            source.readinto(buffer.data)
        plain.append(size / (time.perf_counter() - begun))
        plain_cpu.append((time.process_time() - cpu) / size)
        begun, cpu = time.perf_counter(), time.process_time()
        patches = sum(len(batch.rows) for batch in loader)
        ours.append(size / (time.perf_counter() - begun))
        our_cpu.append((time.process_time() - cpu) / size)
    file.unlink()
    del buffer
    per_patch = _h5_seconds_per_patch(folder)
    return [
        Result("read", size / 1e9, "GB"),
        Result("page cache, one readinto", max(plain) / 1e9, "GB/s"),
        Result("loader, 2 threads", max(ours) / 1e9, "GB/s"),
        Result("loader", patches * max(ours) / size, "patches/s"),
        Result("share_of_page_cache", max(ours) / max(plain), "", ">= 0.4"),
        # What others do on the machine slows two threads more than one; processor time hardly sees them.
        Result("page cache: processor time", min(plain_cpu) * 1e9, "s/GB"),
        Result("loader: processor time, all threads", min(our_cpu) * 1e9, "s/GB"),
        Result("HDF5 chunked (1, dim), shuffled", 1 / per_patch, "patches/s"),
        Result("speedup_vs_h5", patches * max(ours) / size * per_patch, "x", ">= 20"),
    ]


def _h5_seconds_per_patch(folder: Path) -> float:
    """Read patches in batches of 1,024 in a shuffled order, as h5py wants them: sorted within a batch."""
    file = folder / "features.h5"
    values = np.random.default_rng(0).standard_normal((1024, DIM)).astype(np.float32)
    with h5py.File(file, "w") as out:
        features = out.create_dataset("features", (H5_PATCHES, DIM), "float32", chunks=(1, DIM))
        for start in range(0, H5_PATCHES, len(values)):
            features[start : start + len(values)] = values[: H5_PATCHES - start]
    seconds = []
    with h5py.File(file) as source:
        for seed in range(2):
            order = np.random.default_rng(seed).permutation(H5_PATCHES)
            begun = time.perf_counter()
            for start in range(0, H5_PATCHES, 1024):
                source["features"][np.sort(order[start : start + 1024])]
            seconds.append(time.perf_counter() - begun)
    file.unlink()
    return min(seconds) / H5_PATCHES


def over_s3(store: Store, folder: Path) -> list[Result]:
    """Compare with downloading the same objects from the same server."""
    os.environ["HISTOSGE_BLOCK_CACHE_GB"] = "0"
    with serving(folder / "objects") as server:
        os.environ.update(environment(server.port))
        shutil.copytree(store.location.path(""), folder / "objects" / BUCKET / "store")
        url = f"s3://{BUCKET}/store"
        opened = Store.open(url)
        slide_id = store.slide_ids()[0]
        array = opened.embedding(slide_id, SPEC.key, "random")
        blocks = opened.grid(slide_id, SPEC.key).planned(array.block_shape)
        names = [array.object_path(block.index) for block in blocks]
        loader = Loader(url, [slide_id])
        plain, ours = [], []
        for _ in range(ROUNDS):
            with ThreadPoolExecutor(THREADS_REMOTE) as pool:
                begun = time.perf_counter()
                size = sum(pool.map(lambda name: len(opened.location.read_bytes(name)), names))
                plain.append(size / (time.perf_counter() - begun))
            begun = time.perf_counter()
            for _ in loader:
                pass
            ours.append(size / (time.perf_counter() - begun))
        os.environ["HISTOSGE_BLOCK_CACHE_GB"] = "10"
        os.environ["HISTOSGE_CACHE"] = str(folder / "cache")
        cached = Loader(url, [slide_id])
        seconds = []
        for _ in range(2):
            begun = time.perf_counter()
            for _ in cached:
                pass
            seconds.append(time.perf_counter() - begun)
    return [
        Result("S3: plain concurrent download", max(plain) / 1e9, "GB/s"),
        Result("S3: loader", max(ours) / 1e9, "GB/s"),
        Result("share_of_s3_download", max(ours) / max(plain), "", ">= 0.8"),
        Result("S3: second epoch, blocks on local disk", size / seconds[1] / 1e9, "GB/s"),
    ]


PEAK = """
    import sys
    from histosge.data.load_settings import LoadSettings
    from histosge.data.loader import Loader
    settings = LoadSettings(buffer_mb=64, threads=2)
    for _ in Loader(sys.argv[1], sys.argv[2].split(","), settings=settings):
        pass
    # Not getrusage: what its parent held counts there.
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(peak)
"""


def memory(folder: Path, side: int) -> list[Result]:
    """Peak memory of a process that streams an epoch of 4 and of 40 slides."""
    store = write_store(folder / "many", 4, Made((side, side), DIM))
    for number in range(4, 40):  # the same objects under other names
        source, copy = (store.location.path(f"S{n:02}") for n in (number % 4, number))
        shutil.copytree(source, copy, copy_function=os.link)
    peaks = []
    for n in (4, 40):
        slides = ",".join(f"S{number:02}" for number in range(n))
        command = [sys.executable, "-c", textwrap.dedent(PEAK), store.location.url, slides]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout) / 1024)
    return [
        Result("peak memory, 4 slides", peaks[0], "MB"),
        Result("peak memory, 40 slides", peaks[1], "MB"),
        Result("memory_40_over_4_slides", peaks[1] / peaks[0], "x", "<= 1.1"),
    ]


if __name__ == "__main__":
    main()
