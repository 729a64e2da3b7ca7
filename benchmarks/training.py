"""How long `dense` takes to learn, beside the published network on its published schedule.

    python benchmarks/training.py [--quick] [--json FILE]

Side by side: sections of invented spots whose genes follow 8 directions of the embedding and noise; one section is held
out; `paper` runs its 1,000 epochs (100 with --quick, scaled by 10). Absolute: 12 sections of 4,000 spots, 1,000 genes,
1,024 dims, everything read from the store.
"""

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
from _common import Result, options, report, timed
from _models import invent_section
from _stores import Made, write_store

from featurestore.storage.store import Store
from histosge.data.embedded_slide import open_embedded
from histosge.data.sections import TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.models.registry import load_preset

EPOCHS = 1000
SMALL = {"sections": 2, "spots": 150, "genes": 50, "dim": 64}


def main() -> None:
    """Measure."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        results = side_by_side(Path(name), 100 if asked.quick else EPOCHS)
        results += absolute(Path(name), 2 if asked.quick else 12)
    report("training", results, asked)


def side_by_side(folder: Path, epochs: int) -> list[Result]:
    """Train both on the same sections, and score both on another."""
    n = SMALL["sections"]
    store = write_store(folder / "small", n + 1, Made((48, 48), SMALL["dim"], (16, 16)))
    seconds, scores = {}, {}
    for preset, passes in (("dense", None), ("paper", epochs)):
        seconds[preset], model = timed(
            lambda preset=preset, passes=passes: load_preset(preset).fit(
                _sections(store, range(n)), epochs=passes
            )
        )
        (held_out,) = _sections(store, [n])
        predicted = spots_from_patches(held_out.overlap, model.predict(held_out.patches))
        scores[preset] = _mean_pearson(predicted, held_out.target)
    reference = seconds["paper"] * EPOCHS / epochs
    return [
        Result(f"{n} sections x {SMALL['spots']} spots x {SMALL['genes']} genes, dim", SMALL["dim"]),
        Result("dense: reading and training", seconds["dense"], "s"),
        Result(f"paper, {EPOCHS} epochs: reading and training", reference, "s"),
        Result("dense: held-out Pearson", scores["dense"]),
        Result("paper: held-out Pearson", scores["paper"]),
        Result("dense_minus_paper_pearson", scores["dense"] - scores["paper"], "", ">= 0"),
        Result("speedup_vs_reference", reference / seconds["dense"], "x", ">= 20"),
    ]


def _sections(store: Store, numbers: range | list[int]) -> list[TrainingSection]:
    return [
        invent_section(open_embedded(store, f"S{i:02}", None, None), SMALL["spots"], SMALL["genes"], seed=i)
        for i in numbers
    ]


def _mean_pearson(predicted: np.ndarray, measured: np.ndarray) -> float:
    a, b = (values - values.mean(axis=0) for values in (predicted.astype(float), measured.astype(float)))
    spread = np.sqrt((a**2).sum(axis=0) * (b**2).sum(axis=0))
    return float(np.divide((a * b).sum(axis=0), spread, out=np.zeros(a.shape[1]), where=spread > 0).mean())


ABSOLUTE = """
    import sys, time
    sys.path.insert(0, sys.argv[2])
    from _models import invent_section
    from featurestore.storage.store import Store
    from histosge.models.dense import DenseModel
    from histosge.data.embedded_slide import open_embedded
    store = Store.open(sys.argv[1])
    begun = time.perf_counter()
    sections = [
        invent_section(open_embedded(store, slide, None, None), 4000, 1000, seed=i)
        for i, slide in enumerate(store.slide_ids())
    ]
    loaded = time.perf_counter()
    DenseModel.fit(sections)
    done = time.perf_counter()
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(loaded - begun, done - loaded, peak)
"""


def absolute(folder: Path, sections: int) -> list[Result]:
    """Train on 12 sections of 4,000 spots in a process of its own."""
    store = write_store(folder / "large", sections, Made((96, 96), 1024))
    command = [
        sys.executable,
        "-c",
        textwrap.dedent(ABSOLUTE),
        store.location.url,
        str(Path(__file__).parent),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    load, fit, peak = map(float, done.stdout.split())
    return [
        Result("absolute: sections of 4,000 spots", sections),
        Result("absolute: reading, spots under discs", load, "s"),
        Result("absolute: dense", fit, "s"),
        Result("absolute_seconds", load + fit, "s", "<= 120"),
        Result("absolute: peak memory", peak / 2**20, "GB"),
    ]


if __name__ == "__main__":
    main()
