"""Every preset on donors that training has not seen: synthetic cohorts whose donors differ in picture and expression.

    python benchmarks/donors.py [--quick] [--json FILE] [--seeds 0,1,2,3,4] [--presets a,b] [--stains]

Leave-donor-out. A cohort has 8 donors with one section of 1.8 x 1.8 mm each; what a donor changes is drawn as
`histosge.synthetic.donors` writes down (stain, scanner, tissue composition, levels of genes, depth). All 60 genes are
scored by the mean Pearson within sections, as they are and after depth is removed. Encoders: `colour` and
`morphology`. Seeds 0 to 4 give the figures and were not used while anything was developed; that was done on seeds
from 100 on. The target is on the mean over encoders and cohorts. With --quick: `colour` alone, seed 0, five donors.
Stores are kept under ``HISTOSGE_BENCH_CACHE`` where that is set. The networks take 15 minutes a cohort; without them,
as `results.py` measures it, all five take ten.

--stains: the same cohorts, encoded with `embed --stain none|macenko|reinhard`; ridge and `dense` alone.
"""

import argparse
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from _common import Result, report

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.stain_normalisation import METHODS as STAINS
from featurestore.grid import GridSpec
from histosge.data.section_loading import Selection, load_sections
from histosge.data.sections import Section
from histosge.evaluation.methods import LibrarySizeMethod, Method, ModelMethod
from histosge.evaluation.results import NOISE
from histosge.evaluation.runner import noise_control, score_plan
from histosge.evaluation.tasks import Plan
from histosge.models.estimators import find_estimator
from histosge.models.registry import MODELS
from histosge.synthetic import SyntheticSpec, make_cohort

SEEDS = (0, 1, 2, 3, 4)
N_DONORS, QUICK_DONORS = 8, 5
SIDE_PX = 3600
GRID = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
"""The demo's: patches of 112 µm every 56 µm."""
ENCODERS = ("colour", "morphology")
SLOW = ("paper", "attention", "dense+attention")
"""Minutes a fit: `benchmarks/attention.py` scores them."""
NETWORKS = ("bleep", "mlp", "triplex")
"""Trained by gradient descent on a few hundred spots, for each donor that is left out."""
METRICS = {"pearson_mean": "Pearson", "pearson_depth_adjusted": "after depth"}


@dataclass(frozen=True)
class Cohort:
    """Sections of one cohort with one encoder's embeddings."""

    seed: int
    encoder: str
    sections: tuple[Section, ...]


def load(
    folder: Path, seed: int, encoders: Sequence[str], n_donors: int, stain: str = "none"
) -> list[Cohort]:
    """Make and embed a cohort."""
    # Sections of different cohorts share no seed.
    spec = SyntheticSpec(size_px=(SIDE_PX, SIDE_PX), seed=1000 * (seed + 1), programme_seed=seed)
    made = make_cohort(folder / f"cohort-{seed}-{n_donors}", spec, n_donors, donors_differ=True)
    store = str(folder / f"store-{seed}-{n_donors}{'' if stain == 'none' else f'-{stain}'}")
    embed(str(made.sheet), store, EmbedSettings(encoders=tuple(encoders), spec=GRID, stain=stain))
    return [
        Cohort(
            seed,
            encoder,
            tuple(item.section for item in load_sections(str(made.sheet), store, Selection(encoder=encoder))),
        )
        for encoder in encoders
    ]


def presets(*, with_networks: bool = True) -> list[Method]:
    """Return every preset that predicts slides without measured spots in seconds, and the oracle of library size."""
    found: list[Method] = []
    slow = SLOW if with_networks else (*SLOW, *NETWORKS)
    for name in MODELS.names():
        estimator = find_estimator(name)
        if name not in slow and not estimator.capabilities.needs_position_on_slide:
            found.append(ModelMethod(estimator, name))
    return [*found, LibrarySizeMethod()]


def score(cohort: Cohort, methods: Sequence[Method]) -> pl.DataFrame:
    """Return preset, fold, metric, value of one cohort."""
    plan = Plan.from_sections(cohort.sections, "donor", "all")
    scores = score_plan(plan, list(methods), noise_control(), seeds=(0,)).scores
    return scores.filter(pl.col("metric").is_in(list(METRICS))).with_columns(
        pl.lit(cohort.seed).alias("cohort"), pl.lit(cohort.encoder).alias("encoder")
    )


def main() -> None:
    """Score every preset on every cohort."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small case")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    parser.add_argument("--seeds", default=",".join(map(str, SEEDS)), help="cohorts; from 100 on to develop")
    parser.add_argument("--presets", help="ridge, dense and others, separated by commas; default all")
    parser.add_argument("--stains", action="store_true", help="what stain normalisation gives")
    asked = parser.parse_args()
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        if asked.stains:
            measured = measure_stains(Path(scratch), seeds, quick=asked.quick)
        else:
            wanted = None if asked.presets is None else set(asked.presets.split(",")) | {"ridge", "dense"}
            methods = [method for method in presets() if wanted is None or method.name in wanted]
            measured = measure(Path(scratch), seeds, quick=asked.quick, methods=methods)
        report("donors", measured, asked)


def _sizes(quick: bool) -> tuple[Sequence[str], int]:
    return (ENCODERS[:1], QUICK_DONORS) if quick else (ENCODERS, N_DONORS)


def _folder(scratch: Path) -> Path:
    return Path(os.environ.get("HISTOSGE_BENCH_CACHE", scratch)) / "donors"


def measure_stains(scratch: Path, seeds: Sequence[int], *, quick: bool) -> list[Result]:
    """Score ridge and `dense` on cohorts of these seeds, with and without stain normalisation."""
    encoders, n_donors = _sizes(quick)
    methods = [ModelMethod(find_estimator(name), name) for name in ("ridge", "dense")]
    found = []
    for stain in ("none", *STAINS):
        tables = [
            score(cohort, methods)
            for seed in seeds[: 1 if quick else None]
            for cohort in load(_folder(scratch), seed, encoders, n_donors, stain)
        ]
        table = pl.concat(tables)
        for encoder in encoders:
            for name in ("ridge", "dense", NOISE):
                for metric, label in METRICS.items():
                    value = _mean(table, encoder, name, metric)
                    found.append(Result(f"{stain}, {encoder}, {name}: {label}", value))
    return found


def measure(
    scratch: Path, seeds: Sequence[int], *, quick: bool, methods: Sequence[Method] | None = None
) -> list[Result]:
    """Score presets, by default every one, on cohorts of these seeds; quick: on a smaller one of the first seed."""
    encoders, n_donors = _sizes(quick)
    folder = _folder(scratch)
    tables, methods = [], presets() if methods is None else methods
    for seed in seeds[: 1 if quick else None]:
        tables += [score(cohort, methods) for cohort in load(folder, seed, encoders, n_donors)]
    return results(pl.concat(tables), [method.name for method in methods])


def results(table: pl.DataFrame, names: Sequence[str]) -> list[Result]:
    """Return means per encoder and preset, and what `dense` gains over `ridge`."""
    found = []
    for encoder in table["encoder"].unique(maintain_order=True):
        for name in (*names, NOISE):
            for metric, label in METRICS.items():
                found.append(Result(f"{encoder}, {name}: {label}", _mean(table, encoder, name, metric)))
    gains = np.array(
        [
            _mean(table, encoder, "dense", "pearson_depth_adjusted")
            - _mean(table, encoder, "ridge", "pearson_depth_adjusted")
            for encoder in table["encoder"].unique(maintain_order=True)
        ]
    )
    found.append(Result("gain_over_ridge", float(gains.mean()), "", ">= 0.03"))
    return found


def _mean(table: pl.DataFrame, encoder: str, preset: str, metric: str) -> float:
    rows = table.filter(
        (pl.col("encoder") == encoder) & (pl.col("preset") == preset) & (pl.col("metric") == metric)
    )
    return float(np.mean(rows["value"].to_numpy()))


if __name__ == "__main__":
    main()
