"""Whether a change of `dense` is kept: its differences on every held-out section at hand, bootstrapped over the sections.

Sections: C2-C4 with every encoder, two sections of a mouse olfactory bulb (``$HISTOSGE_DATA/mob``), and a cohort of
synthetic donors for development. On three sections alone differences under 0.005 are picks.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import donors
import numpy as np
from _common import Result
from _public import public_sheet

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.section_loading import Selection, load_sections
from histosge.data.sections import Section
from histosge.evaluation.methods import Method
from histosge.evaluation.results import Scores
from histosge.evaluation.runner import noise_control, score_plan
from histosge.evaluation.tasks import Plan
from histosge.heldout.metric_registry import Floats

METRICS = {"pearson_mean": "Pearson", "pearson_depth_adjusted": "after depth"}
MOB_SPEC = GridSpec(mpp=4.63, patch_px=32, stride_px=16)
"""Its picture has 4.63 µm a pixel: patches of 148 µm every 74 µm."""
ENCODERS = ("colour", "morphology")
DEVELOPMENT_SEED = 100
"""Of the donors: those of the published table are not looked at while anything is chosen."""
SAMPLES = 2000
"""Of the bootstrap."""


@dataclass(frozen=True)
class HeldOutSet:
    """Sections with one encoder's embeddings, each held out in turn."""

    sections: Sequence[Section] = field(repr=False)
    split: str
    genes: int | str


def further_sets(folder: Path, genes: int) -> list[HeldOutSet]:
    """Embed the olfactory bulb, where it is there, and the donors for development."""
    kept = Path(os.environ.get("HISTOSGE_BENCH_CACHE", folder))
    found = [
        HeldOutSet(cohort.sections, "donor", "all")
        for cohort in donors.load(kept / "donors", DEVELOPMENT_SEED, ENCODERS, donors.N_DONORS)
    ]
    public = public_sheet()
    if public is not None and (public.parent / "mob").is_dir():
        names = ("MOB1", "MOB2")
        rows = [
            f"{name},{public.parent}/mob/{name}.jpg,{public.parent}/mob/{name}.h5ad,4.63" for name in names
        ]
        sheet, store = kept / "mob.csv", str(kept / "mob")
        sheet.write_text("\n".join(["slide_id,slide,expression,mpp", *rows]) + "\n")
        embed(str(sheet), store, EmbedSettings(encoders=ENCODERS, spec=MOB_SPEC))
        for encoder in ENCODERS:
            loaded = load_sections(str(sheet), store, Selection(encoder=encoder))
            found.append(HeldOutSet([item.section for item in loaded], "section", genes))
    return found


def compare(sets: Sequence[HeldOutSet], base: Method, variants: Sequence[Method]) -> list[Result]:
    """Score the variants on every set; return mean difference to the base and its interval, for each variant."""
    differences: dict[str, dict[str, list[float]]] = {
        variant.name: {metric: [] for metric in METRICS} for variant in variants
    }
    for one in sets:
        plan = Plan.from_sections(one.sections, one.split, one.genes)
        scores = score_plan(plan, [base, *variants], noise_control(), seeds=(0,))
        for name, values in differences.items():
            for metric in METRICS:
                values[metric] += np.subtract(
                    folds(scores, name, metric), folds(scores, base.name, metric)
                ).tolist()
    return [result for name, values in differences.items() for result in _rows(name, values)]


def folds(scores: Scores, preset: str, metric: str = "pearson_mean") -> list[float]:
    """Return a preset's value in each fold, in their order."""
    rows = scores.scores.filter((scores.scores["preset"] == preset) & (scores.scores["metric"] == metric))
    return rows.sort("fold")["value"].to_list()


def bootstrap_mean(values: Floats, seed: int = 0) -> tuple[float, float, float]:
    """Return the mean of ``(n,)`` differences, and its 95 % interval over the sections that they are of."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (SAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(axis=1), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)


def _rows(name: str, values: Mapping[str, Sequence[float]]) -> list[Result]:
    rows = []
    for metric, label in METRICS.items():
        mean, low, high = bootstrap_mean(np.array(values[metric]))
        about = f"{name} - dense, {label}"
        rows += [Result(about, mean), Result(f"{about}, low", low), Result(f"{about}, high", high)]
    return rows
