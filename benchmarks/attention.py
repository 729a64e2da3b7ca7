"""What attention over blocks gains over `dense`, and what its training from a store costs.

    python benchmarks/attention.py [--quick] [--json FILE] [--seeds 0,1,2,3,4] [--part accuracy] [--merge FILE ...]

Accuracy. Cohorts of `histosge.synthetic.arrangements`, whose truth is known: *long-range* genes depend on how patches
200 to 250 um away are arranged, which no mean over them tells; *local* genes follow the patch's own features; in the
*permuted* control genes follow another arrangement than the embedding shows. `dense` and `attention` learn from the same
sections and are scored on sections that neither has seen, by the mean Pearson of genes within sections. Seeds 0 to 4
give the figures and were not used in development, which was done on seeds from 10 on. The curve runs over the number of
training sections. With --quick: one seed, the first, without the curve; several such records are merged by --merge.

What a gain consists of. Beside both stand one ridge on all scales at once, a linear map of the same pooled features, of
which `dense` has one kind among its six ridges; and `dense` that is given where the nests are, but not of which
kind. And what the network adds at the centres of mixed nests, of nests apart, and elsewhere.

Training. Steps per second on blocks that are streamed from a store, beside the same steps on the same blocks, read
before; both alternate in one process. Peak memory of a process that trains on all sections, over that of one that trains
on a quarter of them with as many steps.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _cohorts import MadeCohort, write_cohort
from _common import Result, parser_of, report
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from histosge import Loader, LoadSettings, SpotTargets
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_blocks import SpotBlock, SpotBlocks
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.heldout.metrics import correlate
from histosge.models.block_attention import AttentionModel, preparing_threads
from histosge.models.block_network import BlockNetwork
from histosge.models.block_training import AttentionSettings, DensePatches, TrainingData
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Standardiser
from histosge.models.protocol import Model
from histosge.models.scale_ridges import SIGMAS_UM
from histosge.synthetic.arrangements import (
    NEST_APART_UM,
    NEST_SD_UM,
    ArrangementSpec,
    draw_counts,
    make_arrangement,
)
from histosge.training.train import TrainSettings, train

SEEDS = (0, 1, 2, 3, 4)
SIZES, SIZE = (12, 25, 50, 100, 200), 100
"""Training sections of the curve, and those of the figures that have a target."""
N_TEST = 12
TITLE = f"attention ({SIZE} training sections, {N_TEST} held out)"
SETTINGS = AttentionSettings(width=32, epochs=45, learning_rate=4e-3)
"""Half the default width, so that two cores take minutes; the rate was chosen on seed 10."""
SPOT_UM, PITCH_UM = 55.0, 100.0
TRUTHS = {
    "long": ArrangementSpec(),
    "local": ArrangementSpec(strength=0.0),
    "permuted": ArrangementSpec(permuted=True),
}


def make_sections(spec: ArrangementSpec, numbers: Sequence[int]) -> list[TrainingSection]:
    """Make sections with spots on a square lattice."""
    return [_section(spec, number) for number in numbers]


def _section(spec: ArrangementSpec, number: int) -> TrainingSection:
    made = make_arrangement(spec, number)
    patches = Patches(
        f"S{number:04}", made.rows, made.cols, made.embedding, spec.stride_um, 2 * spec.stride_um
    )
    along = np.arange(PITCH_UM, spec.side * spec.stride_um, PITCH_UM)
    xy = np.stack([axis.ravel() for axis in np.meshgrid(along, along)], axis=1)
    overlap = disc_overlap(xy, SPOT_UM, patches)
    counts, library = draw_counts(overlap @ made.rates, np.random.default_rng([spec.seed, number, 1]))
    target = np.log1p(counts / library[:, None] * 1e4).astype(np.float32)
    return TrainingSection(patches, overlap, xy, target, library)


def score(model: Model, sections: Sequence[TrainingSection]) -> float:
    """Return the mean Pearson over genes and sections."""
    each = []
    for section in sections:
        guess = spots_from_patches(section.overlap, model.predict(section.patches))
        each.append(correlate(section.target, guess, np.zeros(len(guess)))[0].mean())
    return float(np.mean(each))


def all_scales(training: Sequence[TrainingSection], testing: Sequence[TrainingSection], side: int) -> float:
    """Return the score of one ridge on the features pooled at all scales of `dense`, whose shape is a square."""

    def features(section: TrainingSection) -> NDArray[np.float64]:
        square = section.patches.embedding.reshape(side, side, -1).astype(np.float64)
        pooled = []
        for sigma_um in SIGMAS_UM:
            sd, inside = sigma_um / section.patches.stride_um, np.ones((side, side, 1))
            # Over the patches that exist: outside of the section there are none.
            sums, weight = (gaussian_filter(one, (sd, sd, 0), mode="constant") for one in (square, inside))
            pooled.append((sums / weight).reshape(side * side, -1))
        values = section.overlap @ np.hstack(pooled)
        return np.asarray(values - values.mean(axis=0))

    target = np.concatenate([one.target - one.target.mean(axis=0) for one in training])
    model = make_pipeline(StandardScaler(), RidgeCV(np.logspace(0, 5, 11)))
    model.fit(np.concatenate([features(one) for one in training]), target)
    guesses = [(one.target, model.predict(features(one)).astype(np.float32)) for one in testing]
    return float(np.mean([correlate(t, guess, np.zeros(len(t)))[0].mean() for t, guess in guesses]))


def nest_signal(spec: ArrangementSpec, number: int) -> NDArray[np.float64]:
    """Return how near a patch is to a nest of either kind, ``(n_patches,)``: what genes of a control follow on average."""
    made = make_arrangement(spec, number)
    xy = np.stack([made.cols, made.rows], axis=1) * spec.stride_um
    square = ((xy[:, None] - made.centres_um) ** 2).sum(axis=2)
    return np.asarray(np.exp(-square / (2 * NEST_SD_UM**2)).sum(axis=1))


def with_nests(sections: Sequence[TrainingSection], spec: ArrangementSpec) -> list[TrainingSection]:
    """Return the sections with one more number in the embedding, `nest_signal`."""
    found = []
    for section in sections:
        # As large as the other numbers: `dense` standardises them, and shrinks all alike.
        signal = nest_signal(spec, int(section.patches.slide_id[1:])).astype(np.float32)
        patches = section.patches
        wide = np.column_stack([patches.embedding, signal / signal.std()])
        found.append(replace(section, patches=patches.with_embedding(wide)))
    return found


def added_at_nests(
    model: AttentionModel, spec: ArrangementSpec, sections: Sequence[TrainingSection]
) -> tuple[float, float, float]:
    """Return what the network adds within 100 um of centres of mixed nests, of nests apart, and elsewhere.

    In log1p(CP10k), each gene counted in the direction in which mixed nests change it, the mean over genes.
    """
    values: tuple[list[float], ...] = ([], [], [])
    for section in sections:
        number = int(section.patches.slide_id[1:])
        made, without = (make_arrangement(one, number) for one in (spec, replace(spec, strength=0.0)))
        # The draws are the same: the ratio of the rates is what nests do.
        direction = np.sign(np.log(made.rates / without.rates).sum(axis=0))
        added = (model.predict(section.patches) - model.dense.predict(section.patches)) @ direction
        xy = np.stack([made.cols, made.rows], axis=1) * spec.stride_um
        distance = np.hypot(*(xy[:, None] - made.centres_um).transpose(2, 0, 1))
        for centre, mixed in enumerate(made.is_mixed):
            near = added[distance[:, centre] <= 100] / len(direction)
            values[0 if mixed else 1].append(float(near.mean()))
        values[2].append(float(added[distance.min(axis=1) > NEST_APART_UM / 2].mean() / len(direction)))
    mixed, apart, elsewhere = (float(np.mean(some)) for some in values)
    return mixed, apart, elsewhere


def compare(truth: str, size: int, seed: int, *, explain: bool = True) -> tuple[dict[str, float], str]:
    """Return scores and, to explain them, what else is in the data; and what became of the network."""
    spec = replace(TRUTHS[truth], seed=seed)
    training = make_sections(spec, range(1, 1 + size))
    model = AttentionModel.fit(training, seed=seed, settings=SETTINGS)
    testing = make_sections(spec, range(10_001, 10_001 + N_TEST))
    found = {"dense": score(model.dense, testing), "attention": score(model, testing)}
    if explain:
        found["one ridge on all scales"] = all_scales(training, testing, spec.side)
        informed = DenseModel.fit(with_nests(training, spec), seed=seed)
        found["dense with the places of nests"] = score(informed, with_nests(testing, spec))
        names = ("at mixed nests", "at nests apart", "elsewhere")
        for name, value in zip(names, added_at_nests(model, spec, testing), strict=True):
            found[f"added {name}"] = value
    return found, model.remark


def accuracy(seeds: Sequence[int], sizes: Sequence[int]) -> list[Result]:
    """Return gains at `SIZE` sections, mean over seeds, and the curve of the first seed."""
    results = list[Result]()
    for truth in TRUTHS:
        for seed in seeds:
            found, remark = compare(truth, SIZE, seed)
            print(f"  {truth}, seed {seed}: {remark}", flush=True)
            results += [
                Result(
                    f"{truth}, seed {seed}: {name}", value, "log" if name.startswith("added") else "Pearson"
                )
                for name, value in found.items()
            ]
    for size in sizes:
        found, _ = compare("long", size, seeds[0], explain=False)
        gain = found["attention"] - found["dense"]
        results.append(Result(f"long, {size} sections: attention - dense", gain, "Pearson"))
    return [*results, *gains(results)]


def gains(results: Sequence[Result]) -> list[Result]:
    """Return the gains that have a target: means over all seeds among some results."""
    scores = {result.what: result.value for result in results}

    def gain(truth: str) -> float:
        each = [
            float(value or 0) - float(scores[what.replace(": attention", ": dense")] or 0)
            for what, value in scores.items()
            if what.startswith(f"{truth}, seed") and what.endswith(": attention")
        ]
        return float(np.mean(each))

    return [
        Result("gain_long_range", gain("long"), "Pearson", ">= 0.05"),
        Result("loss_local", -gain("local"), "Pearson", "<= 0.005"),
        Result("gain_permuted", gain("permuted"), "Pearson", "<= 0.01"),
    ]


GAINS = {"gain_long_range", "loss_local", "gain_permuted"}


def merge(files: Sequence[Path]) -> tuple[list[Result], dict[str, Any]]:
    """Return the figures of several records, whose gains are means over the seeds of all, and one record of them."""
    documents = [json.loads(file.read_text()) for file in files]
    about = {(one["commit"], one["machine"]) for one in documents}
    if len(about) > 1:
        raise SystemExit(f"records of {len(about)} commits or machines are not merged: {sorted(about)}")
    found = dict[str, Result]()
    for one in (one for document in documents for one in document["results"]):
        found[one["what"]] = Result(one["what"], one["value"], one["unit"], one["target"])
    kept = [result for what, result in found.items() if what not in GAINS]
    if any(result.what.endswith(": attention") for result in kept):
        kept += gains(kept)
    rows = [{**asdict(result), "met": result.met} for result in kept]
    return kept, {**documents[-1], "results": rows}


CPU = torch.device("cpu")
STREAMED = MadeCohort(sections=4, shape=(96, 96), dim=256, spots=900, genes=50)
"""Slides of 5.4 mm: nine blocks each, whose halos reach into the blocks around."""
ROUNDS = 3


@dataclass(frozen=True)
class Held:
    """Blocks that were read before: what streaming is compared with."""

    blocks: Sequence[SpotBlock]

    @property
    def section_of(self) -> NDArray[np.int64]:
        """Return the section of each block."""
        return np.array([block.section for block in self.blocks])

    @property
    def n_spots(self) -> NDArray[np.int64]:
        """Return the spots of each block."""
        return np.array([len(block.spots) for block in self.blocks])

    def read(self, numbers: Iterable[int]) -> Iterator[SpotBlock]:
        """Return blocks that are here."""
        return (self.blocks[number] for number in numbers)


def streaming(
    folder: Path, device: torch.device = CPU, settings: AttentionSettings = SETTINGS
) -> list[Result]:
    """Compare steps on blocks from a store with steps on the same blocks in memory; both take turns."""
    sheet, store = write_cohort(folder / "streamed", STREAMED)
    targets = SpotTargets.from_samples(sheet, store, STREAMED.genes)
    # 32 MB of stored objects in memory: a small part of the cohort, as with a large one.
    loader = Loader(store, targets=targets, settings=LoadSettings(buffer_mb=32))
    streamed = loader.spot_blocks(sum(settings.radii_um))
    numbers = np.arange(len(streamed.n_spots))
    held = Held(list(streamed.read(numbers.tolist())))
    torch.manual_seed(0)
    shape = settings.shape(STREAMED.dim, STREAMED.genes, 1)
    network = BlockNetwork(shape, np.ones((STREAMED.genes, 1)), np.ones(STREAMED.genes)).to(device).train()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4)
    streamed_s, held_s = list[float](), list[float]()
    for number in range(ROUNDS):
        order = np.random.default_rng(number).permutation(numbers).tolist()
        streamed_s.append(_seconds_of_epoch(streamed, order, network, optimiser))
        held_s.append(_seconds_of_epoch(held, order, network, optimiser))
    return [
        Result("steps on streamed blocks", len(numbers) / min(streamed_s), "blocks/s"),
        Result("steps on preloaded blocks", len(numbers) / min(held_s), "blocks/s"),
        Result("share_of_preloaded_steps", min(held_s) / min(streamed_s), "", ">= 0.8"),
    ]


def _seconds_of_epoch(
    source: SpotBlocks, order: list[int], network: BlockNetwork, optimiser: torch.optim.Optimizer
) -> float:
    """Take one step a block, and return the seconds of all."""

    def to_genes(patterns: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.ones((len(patterns), STREAMED.genes), np.float32)

    # A constant stands in for `dense`, whose cost `cohort.py` measures.
    constant = DensePatches(
        np.zeros((STREAMED.shape[0] * STREAMED.shape[1], 1), np.float32),
        to_genes,
        np.zeros(STREAMED.genes, np.float32),
    )
    device = network.tokens.weight.device
    data = TrainingData(
        source,
        [constant] * STREAMED.sections,
        Standardiser(np.zeros(STREAMED.dim), np.ones(STREAMED.dim)),
        np.ones(STREAMED.genes),
        network.shape.radii_um,
        preparing_threads(device),
    )
    begun = time.perf_counter()
    for example in data.examples(order):
        optimiser.zero_grad()
        torch.autograd.backward(data.spot_errors(network, example.to(device)).mean())
        optimiser.step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


MEMORY = MadeCohort(sections=40, shape=(160, 160), dim=1024, spots=225, genes=30)
"""52 MB of stored objects a section: the five or so that a quarter of the sections leaves to learn from fill the 256 MB of
objects that training keeps. With 26 MB they did not, and this fixed cost was compared with a part of itself."""
EPOCHS = 1
"""On all sections. On a quarter of them four times as many, so that both take the same number of steps."""


def memory(folder: Path) -> list[Result]:
    """Return the peak of training on all sections over that on a quarter of them, in processes of their own."""
    peaks = []
    for share in (4, 1):
        place = folder / f"memory-{share}"
        write_cohort(place, replace(MEMORY, sections=MEMORY.sections // share))
        ran = subprocess.run(
            [sys.executable, __file__, "--peak-of", str(place), "--epochs", str(EPOCHS * share)],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks.append(float(ran.stdout.split()[-1]))
    return [
        Result(f"peak, {MEMORY.sections // 4} sections", peaks[0], "GB"),
        Result(f"peak, {MEMORY.sections} sections", peaks[1], "GB"),
        Result("peak_ratio_4x_sections", peaks[1] / peaks[0], "", "<= 1.15"),
    ]


def peak_of(folder: Path, epochs: int) -> None:
    """Train `attention` on a cohort, and print this process's peak memory in GB."""
    with tempfile.TemporaryDirectory() as name:
        settings = TrainSettings("attention", genes=MEMORY.genes, epochs=epochs)
        train(folder / "cohort.csv", folder / "store", f"{name}/model", settings, stream=True)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def main() -> None:
    """Measure."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", help="of the figures")
    parser.add_argument("--part", choices=("accuracy", "streaming", "memory"), help="only this part")
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="records to merge; run nothing")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--epochs", type=int, default=EPOCHS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.peak_of is not None:
        peak_of(asked.peak_of, asked.epochs)
        return
    if asked.merge:
        results, document = merge(asked.merge)
        if asked.json is not None:
            asked.json.write_text(json.dumps(document, indent=1) + "\n")
        # Not again: the commit is that of the records.
        asked.json = None
        report(TITLE, results, asked)
        return
    seeds = [int(seed) for seed in asked.seeds.split(",")] if asked.seeds else list(SEEDS)
    sizes: Sequence[int] = () if asked.quick else SIZES
    results = []
    with tempfile.TemporaryDirectory() as name:
        parts = {
            "accuracy": partial(accuracy, seeds[:1] if asked.quick else seeds, sizes),
            "streaming": partial(streaming, Path(name)),
            "memory": partial(memory, Path(name)),
        }
        for part, measure in parts.items():
            if asked.part in (None, part):
                results += measure()
    report(TITLE, results, asked)


if __name__ == "__main__":
    main()
