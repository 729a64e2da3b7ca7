"""The public sections under other splits and gene numbers."""

import math
from pathlib import Path

from _public import SPEC, public_sheet

from _results.part import Part, Record, Table, Values, source
from featurestore.embedding.embed import EmbedSettings, embed
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.evaluation.results import Scores

FEW, MANY = 250, 1000
SEEDS = 3
WITHIN = ("knn", "ridge", "gp", "dense", "dense+spots")
"""Presets that can predict between the spots of a section."""
WHOLE = ("mean", "depth", "ridge", "dense")
METRICS = ("pearson_mean", "pearson_depth_adjusted", "mse", "ssim", "moran_predicted")


def measure(folder: Path, quick: bool) -> Values:
    """Score presets on random halves, on buffered blocks, and on sections with 1,000 genes."""
    sheet, store = _embedded(folder)
    seeds = 1 if quick else SEEDS
    asked = {
        "random": EvaluateSettings(split="random", presets=WITHIN, genes=FEW, seeds=seeds),
        "block": EvaluateSettings(split="block", presets=WITHIN, genes=FEW, seeds=seeds),
        "section": EvaluateSettings(split="section", presets=WHOLE, genes=MANY, seeds=seeds),
    }
    found: Values = {}
    for split, settings in asked.items():
        scores = evaluate(sheet, store, folder / split, settings)
        found |= {f"{split}: {name}": value for name, value in _values(scores).items()}
    return found


def _embedded(folder: Path) -> tuple[Path, str]:
    sheet = public_sheet()
    if sheet is None:
        raise SystemExit("the public sections are absent: name their folder in HISTOSGE_DATA")
    embed(str(sheet), f"{folder}/store", EmbedSettings(encoders=("morphology",), spec=SPEC))
    return sheet, f"{folder}/store"


def _values(scores: Scores) -> Values:
    found = {
        f"{name}, {metric}": scores.mean(name, metric)
        for name in (*scores.presets, *scores.controls)
        for metric in METRICS
    }
    # A prediction without variation has no Moran's I.
    return {what: value for what, value in found.items() if math.isfinite(value)}


def splits_table(record: Record) -> str:
    """Presets by split."""
    value = record["splits"]["values"]
    lines = [
        f"| {FEW} genes: Pearson / depth-adjusted | random half held out | buffered blocks |",
        "|---|---|---|",
    ]
    for name in (*WITHIN, "noise", "smooth_noise"):
        cells = [_both(value, f"{split}: {name}") for split in ("random", "block")]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    lines += [
        "",
        f"| {MANY:,} genes, whole sections | Pearson | depth-adjusted | MSE | SSIM | Moran's I of the prediction |",
        "|---|---|---|---|---|---|",
    ]
    for name in (*WHOLE, "noise"):
        found = [value.get(f"section: {name}, {metric}") for metric in METRICS]
        cells = ["" if one is None else f"{one:z.3f}" for one in found]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source(record, "splits")])


def _both(value: Values, name: str) -> str:
    return f"{value[f'{name}, pearson_mean']:z.3f} / {value[f'{name}, pearson_depth_adjusted']:z.3f}"


PARTS = (
    Part(
        "splits",
        "the public sections ($HISTOSGE_DATA): random halves, buffered blocks, and 1,000 genes; about 15 minutes",
        measure,
        (Table("splits", splits_table),),
    ),
)
