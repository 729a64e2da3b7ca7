"""Ten thousand slides: how soon the first block is encoded, and what the scheduler holds meanwhile.

    python benchmarks/planning.py [--quick] [--json FILE]

The slides are one small file under ten thousand names; sample sheet, planner, scheduler, workers and store are the real
ones. The run is stopped once enough blocks are done to measure the cost of one.
"""

import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil
from _common import Result, options, report, timed

from featurestore.embedding.dask_clients import local_client
from featurestore.embedding.dask_cluster import embed_on_cluster
from featurestore.embedding.embed import EmbedSettings
from featurestore.encoders.loading import load_encoder
from featurestore.events import Progress
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import read_samples
from histosge.synthetic import GeneCounts, SyntheticSpec, make_section

SLIDES, BLOCKS_A_SLIDE, DIM, PATCHES_A_BLOCK = 10_000, 100, 1536, 1024
WORKERS = 2


class EnoughError(Exception):
    """Stops a run that has shown what it should."""


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    wanted = 60 if asked.quick else 1000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spec = SyntheticSpec(size_px=(480, 480), genes=GeneCounts(1, 1, 1, 1), spot_pitch_um=60)
        slide = make_section(folder, spec, "one").slide
        for i in range(SLIDES):
            (folder / f"slide{i:05}.tif").hardlink_to(slide)
        (folder / "cohort.csv").write_text("slide\n" + "".join(f"slide{i:05}.tif\n" for i in range(SLIDES)))
        catalogue_s, samples = timed(read_samples, str(folder / "cohort.csv"))
        settings = EmbedSettings(
            ("colour",), GridSpec(0.5, 32, 32), block_shape=(4, 4), allow_duplicates=True
        )
        encoder_s, vectors = _encoding(settings)
        with local_client(WORKERS) as client:
            client.wait_for_workers(WORKERS)
            watch = Watch(wanted)
            with suppress(EnoughError):
                embed_on_cluster(client, samples, str(folder / "store"), settings, watch)
    overhead = watch.seconds_per_block * WORKERS
    blocks, block_bytes = SLIDES * BLOCKS_A_SLIDE, PATCHES_A_BLOCK * DIM * 2
    results = [
        Result("slides in the sheet", len(samples)),
        Result("reading the sheet", catalogue_s, "s"),
        Result("seconds_to_first_block", watch.first, "s", "<= 10"),
        Result("peak_scheduler_gb", watch.peak_gb, "GB, beyond start", "<= 1"),
        Result("blocks done", watch.blocks),
        Result("a block and its share of planning", 1e3 * overhead, "ms of worker"),
        Result("of which encoding", 1e3 * encoder_s * vectors, "ms"),
        Result(f"{SLIDES} slides of {BLOCKS_A_SLIDE} blocks, {DIM} dims", blocks * block_bytes / 1e12, "TB"),
        Result("requests for them: one PUT a block", blocks / 1e6, "M"),
        Result("hours of overhead for them, one worker", blocks * overhead / 3600, "h"),
    ]
    report("planning", results, asked)


class Watch:
    """Looks at the clock and at this process, which holds client and scheduler, after each block."""

    def __init__(self, wanted: int) -> None:
        self.begun = time.perf_counter()
        self.blocks, self.first, self.peak_gb = 0, 0.0, 0.0
        self.seconds_per_block = 0.0
        self._wanted, self._process = wanted, psutil.Process()
        self._start = self._process.memory_info().rss

    def __call__(self, progress: Progress) -> None:
        """Count one block."""
        now = time.perf_counter() - self.begun
        self.blocks += 1
        self.first = self.first or now
        self.peak_gb = max(self.peak_gb, (self._process.memory_info().rss - self._start) / 1e9)
        self.seconds_per_block = (now - self.first) / max(1, self.blocks - 1)
        if self.blocks >= self._wanted:
            raise EnoughError


def _encoding(settings: EmbedSettings) -> tuple[float, int]:
    """Return seconds a patch, and patches a block, of the encoder alone."""
    import numpy as np

    patches = np.zeros((16, settings.spec.patch_px, settings.spec.patch_px, 3), np.uint8)
    encoder = load_encoder("colour")
    encoder.encode(patches)
    seconds, _ = timed(encoder.encode, patches)
    return seconds / len(patches), len(patches)


if __name__ == "__main__":
    main()
