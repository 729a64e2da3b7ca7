"""What a model of many sections gains from a few of a new laboratory: `train --from MODEL` without sums.

    python benchmarks/adapting.py [--quick] [--json FILE] [--seeds 0,1,2,3,4]

A cohort has eight donors with one section of 1.8 x 1.8 mm each, and a ninth donor, the new laboratory's, with five; what a
donor changes (stain, scanner, composition, expression, depth) is drawn as `histosge.synthetic.donors` writes down. Scored
on the last three sections of the new donor, which nothing was trained on: the model of the eight (`earlier`), a training on
the first one or two sections of the new donor (`alone`), and the earlier model adapted to these (`adapted`). Mean Pearson
within sections over all 60 genes, as they are and after depth is removed, and squared error. Encoders: `colour` and
`morphology`. Seeds 0 to 4 give the figures and were not used while anything was developed; that was done on seeds from 100
on. With --quick: `colour` alone, seed 0, four earlier donors. Stores are kept under ``HISTOSGE_BENCH_CACHE`` where that is
set.

The targets are on `dense` from two sections, mean over encoders and cohorts.
"""

import argparse
import csv
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _common import Result, parser_of, report

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.calibration.conformal import predict_spots
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import TrainingSection
from histosge.heldout.metric_registry import ScoredSpots
from histosge.heldout.metrics import score_genes
from histosge.models.protocol import Model
from histosge.synthetic import SyntheticSpec, make_section
from histosge.synthetic.donors import of_donor
from histosge.training.train import TrainSettings, train

SEEDS = (0, 1, 2, 3, 4)
N_EARLIER, QUICK_EARLIER = 8, 4
N_ADDED, N_HELD_OUT = 2, 3
SIDE_PX = 3600
GRID = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
"""As of `donors.py`: patches of 112 µm every 56 µm."""
ENCODERS = ("colour", "morphology")
PRESETS = ("ridge", "dense")


@dataclass(frozen=True)
class Cohort:
    """Sheets of sections of several donors and of a new one, and the store of their embeddings.

    Parameters
    ----------
    earlier
        Sheet of one section each of the earlier donors.
    added
        Sheets of one, two ... sections of the new donor.
    held_out
        Sheet of further ones.
    """

    store: str
    earlier: Path
    added: tuple[Path, ...]
    held_out: Path


def make(folder: Path, seed: int, encoders: Sequence[str], n_earlier: int) -> Cohort:
    """Make and embed a cohort."""
    folder = folder / f"cohort-{seed}-{n_earlier}"
    folder.mkdir(parents=True, exist_ok=True)
    # Sections of different cohorts share no seed.
    spec = SyntheticSpec(size_px=(SIDE_PX, SIDE_PX), seed=1000 * (seed + 1), programme_seed=seed)
    rows = []
    for number in range(n_earlier + N_ADDED + N_HELD_OUT):
        donor = min(number, n_earlier)
        own = of_donor(replace(spec, seed=spec.seed + number), donor)
        made = make_section(folder, own, slide_id=f"S{number + 1:02}")
        rows.append((made.slide_id, made.slide.name, made.expression.name, spec.mpp, f"D{donor + 1}"))

    def sheet(name: str, some: slice) -> Path:
        with (folder / name).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([("slide_id", "slide", "expression", "mpp", "donor"), *rows[some]])
        return folder / name

    store = str(folder / "store")
    embed(str(sheet("all.csv", slice(None))), store, EmbedSettings(encoders=tuple(encoders), spec=GRID))
    first = n_earlier + N_ADDED
    return Cohort(
        store,
        sheet("earlier.csv", slice(n_earlier)),
        tuple(sheet(f"added-{n + 1}.csv", slice(n_earlier, n_earlier + n + 1)) for n in range(N_ADDED)),
        sheet("held-out.csv", slice(first, None)),
    )


def score(cohort: Cohort, encoder: str, scratch: Path) -> dict[str, float]:
    """Train a cohort's models, and return their scores on the held-out sections."""
    selection = Selection(encoder=encoder)
    genes = tuple(gene for family in SyntheticSpec().genes.names().values() for gene in family)
    held_out = [
        training_section(item.section, genes)
        for item in load_sections(str(cohort.held_out), cohort.store, selection)
    ]
    found = {}
    for preset in PRESETS:
        new = TrainSettings(preset, genes, selection=selection, intervals=False)
        base, going_on = scratch / preset, TrainSettings(selection=selection, intervals=False)
        models = {"earlier": train(cohort.earlier, cohort.store, base, new, keep_sums=False)}
        for n, sheet in enumerate(cohort.added, start=1):
            models[f"alone, {n}"] = train(sheet, cohort.store, scratch / f"{preset}-alone-{n}", new)
            target = scratch / f"{preset}-adapted-{n}"
            models[f"adapted, {n}"] = train(sheet, cohort.store, target, going_on, start_from=base)
        for name, saved in models.items():
            for metric, value in _score(saved.model, held_out).items():
                found[f"{encoder}, {preset}, {name}: {metric}"] = value
    return found


def _score(model: Model, sections: Sequence[TrainingSection]) -> dict[str, float]:
    truth = np.concatenate([section.target for section in sections])
    predicted = np.concatenate([predict_spots(model, section)[0] for section in sections])
    number = np.repeat(np.arange(len(sections)), [len(section.target) for section in sections])
    library = np.concatenate([np.asarray(section.library) for section in sections])
    xy_um = np.concatenate([section.spot_xy_um for section in sections])
    scores = score_genes(truth, predicted, ScoredSpots(library, number, xy_um))
    return {
        "Pearson": float(scores.pearson.mean()),
        "after depth": float(scores.pearson_depth_adjusted.mean()),
        "squared error": float(((predicted - truth) ** 2).mean()),
    }


def measure(scratch: Path, seeds: Sequence[int], *, quick: bool) -> list[Result]:
    """Score cohorts of these seeds; quick: a smaller one of the first seed."""
    encoders, n_earlier = (ENCODERS[:1], QUICK_EARLIER) if quick else (ENCODERS, N_EARLIER)
    folder = Path(os.environ.get("HISTOSGE_BENCH_CACHE", scratch)) / "adapting"
    every = []
    for seed in seeds[: 1 if quick else None]:
        cohort = make(folder, seed, encoders, n_earlier)
        for encoder in encoders:
            with tempfile.TemporaryDirectory(dir=scratch) as models:
                every.append(score(cohort, encoder, Path(models)))
    names = dict.fromkeys(name for scores in every for name in scores)
    means = {name: float(np.mean([scores[name] for scores in every if name in scores])) for name in names}
    results = [Result(name, value) for name, value in means.items()]
    for way in ("earlier", f"alone, {N_ADDED}"):
        gains = [
            scores[f"{encoder}, dense, adapted, {N_ADDED}: Pearson"]
            - scores[f"{encoder}, dense, {way}: Pearson"]
            for scores in every
            for encoder in encoders
            if f"{encoder}, dense, {way}: Pearson" in scores
        ]
        results.append(Result(f"gain_over_{way.partition(',')[0]}", float(np.mean(gains)), "", ">= 0"))
    return results


def main() -> None:
    """Score the three ways on every cohort."""
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="cohorts; from 100 on to develop")
    asked: argparse.Namespace = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        report("adapting", measure(Path(scratch), seeds, quick=asked.quick), asked)


if __name__ == "__main__":
    main()
