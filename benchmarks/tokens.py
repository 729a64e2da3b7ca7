"""A dense grid from tokens against one from overlapping patches: positions per second, and what is lost of accuracy.

    python benchmarks/tokens.py [--quick] [--json FILE]

Speed: whole blocks of a made slide are read, encoded and written, 16 patches a block on either side, blocks of the two
sides in turn; random weights. In CPU seconds where the CPU encodes, since they do not change with what else the machine
does; in seconds on a GPU. The limit is K x K.

Accuracy: EfficientNet-Lite0 with ImageNet weights, see `_pretrained.py`, on the sections of ``$HISTOSGE_DATA``, a section
held out, 250 genes chosen on the training part; patches of 224 µm every 56 µm against 7 x 7 tokens of such patches edge
to edge, and variants. Differences are paired over spots and genes. The overlapping side is 8,600 patches, which take six
minutes on two cores; the store is kept under ``HISTOSGE_BENCH_CACHE`` where that is set. With --quick every 112 µm on
that side, and no variants. Without the sections or the package: made sections and random weights, which say nothing of
accuracy.
"""

import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _common import Result, options, report, section
from _pretrained import PRETRAINED, efficientnet_weights
from _public import SPEC, public_sheet

from featurestore.embedding.block_task import embed_blocks
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.embedding.plan import plan_slide
from featurestore.encoders.network_encoder import NetworkEncoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.encoders.vision import load_record, timm_record
from featurestore.grid import GridSpec, TokenGridSpec
from featurestore.slides.open_slide import open_slide
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from histosge.data.section_loading import LoadedSection, Selection, load_sections
from histosge.evaluation.encoder_comparison import keep_common_spots
from histosge.evaluation.methods import ModelMethod
from histosge.evaluation.paired_bootstrap import PairedBootstrap
from histosge.evaluation.task_scorer import TaskScorer
from histosge.evaluation.tasks import Plan
from histosge.models.estimators import find_estimator
from histosge.synthetic import SyntheticSpec, make_cohort

MPP, PATCH, GENES = 0.5, 224, 250
PATCHES_A_BLOCK = 4
"""Along each side of a block: 16 patches are one forward pass on a CPU, so neither side pads."""
MODELS = ("ridge", "dense")
METRICS = {"pearson_mean": "Pearson", "pearson_depth_adjusted": "after depth"}


@dataclass(frozen=True)
class Speed:
    """A network and a grouping to time."""

    key: str
    network: str
    k: int
    target: str


SPEEDS = (
    Speed("speedup_vs_overlap", "timm:vit_small_patch14_dinov2", 4, ">= 10"),
    Speed("speedup_vs_overlap_k7", "timm:vit_small_patch16_224", 7, ">= 30"),
)


def _load(network: str, spec: GridSpec) -> NetworkEncoder:
    """Load a network for patches of 224 px, whatever side it was published for."""
    record = timm_record(network)
    how = replace(record.preprocessing, resize_px=PATCH)
    tokens = spec if isinstance(spec, TokenGridSpec) else None
    # timm's own default of ViT-S/14 is 518 px, a map of 37 x 37 tokens.
    record = replace(record, arguments={"img_size": PATCH}, preprocessing=how)
    return load_record(record, EncoderOptions(random_weights=True, tokens=tokens))


def _clock() -> Callable[[], float]:
    import torch

    return time.perf_counter if torch.cuda.is_available() else time.process_time


def speedup(case: Speed, slide_file: Path, folder: Path, rounds: int) -> list[Result]:
    """Return positions per second of both sides, and their ratio."""
    tokens = TokenGridSpec.from_patches(MPP, PATCH, case.k)
    clock, slide = _clock(), open_slide(str(slide_file))
    sides = []
    for spec, a_patch in ((tokens, case.k), (GridSpec(MPP, PATCH, tokens.stride_px), 1)):
        encoders = {case.network: _load(case.network, spec)}
        settings = EmbedSettings(
            (case.network,), spec, tissue="none", block_shape=(a_patch * PATCHES_A_BLOCK,) * 2
        )
        store = Store.open_or_create(folder / f"{case.key}-{a_patch}")
        plan = plan_slide(store, slide, Sample("s", str(slide_file)), dict(encoders), settings)
        whole = [b for b in plan.missing[case.network] if b.shape == settings.block_shape]
        sides.append((store, plan.stored, whole, encoders))
    seconds: list[list[float]] = [[], []]
    # The first pair warms up buffers and caches, and is not counted.
    for number in range(rounds + 1):
        for side, (store, stored, blocks, encoders) in enumerate(sides):
            begun = clock()
            (done,) = embed_blocks(store, slide, stored, {blocks[number]: (case.network,)}, dict(encoders))
            if number:
                seconds[side].append((clock() - begun) / done.patches)
    slide.close()
    fine, overlap = (1 / float(np.median(times)) for times in seconds)
    name = f"{case.network.removeprefix('timm:')}, K = {case.k}"
    return [
        Result(f"{name}: tokens", fine, "positions/s"),
        Result(f"{name}: overlapping patches", overlap, "positions/s"),
        Result(case.key, fine / overlap, "x", case.target),
    ]


def speedups(folder: Path, *, quick: bool) -> list[Result]:
    """Return positions per second of both sides, for every network."""
    made = section(folder, quick=True)
    return [result for case in SPEEDS for result in speedup(case, made.slide, folder, 3 if quick else 6)]


OVERLAPPING = "overlapping patches"


def grids(*, quick: bool) -> dict[str, GridSpec]:
    """Return the grids to score, by label; the first two are what is compared."""
    tokens = TokenGridSpec.from_patches
    found = {
        # The grid of this network's other figures. Every 32 µm, as tokens lie, are three times as many patches, and on
        # two of the sections that gave 0.003 more, with an interval of 0.024.
        OVERLAPPING: replace(SPEC, stride_px=2 * SPEC.stride_px) if quick else SPEC,
        "7 x 7 tokens": tokens(1.0, PATCH, 7),
    }
    variants = {
        "7 x 7 tokens + the patch's own vector": tokens(1.0, PATCH, 7, cls_token=True),
        "5 x 5 tokens, rim of 1": tokens(1.0, PATCH, 5, overlap_px=64),
        "5 x 5 tokens, rim of 1 + the patch's own vector": tokens(
            1.0, PATCH, 5, overlap_px=64, cls_token=True
        ),
    }
    return found | ({} if quick else variants)


def accuracy(folder: Path, *, quick: bool) -> list[Result]:
    """Return held-out scores on every grid, and what each gives over overlapping patches."""
    kept = os.environ.get("HISTOSGE_BENCH_CACHE")
    weights, sheet = efficientnet_weights(Path(kept or folder)), public_sheet()
    if weights is None or sheet is None:
        weights, sheet = None, make_cohort(folder, SyntheticSpec(size_px=(2400, 2400)), 3).sheet
        kept = None
    store, chosen = f"{kept or folder}/tokens", grids(quick=quick)
    for spec in chosen.values():
        of = () if weights is None else ((PRETRAINED, str(weights)),)
        asked = EncoderOptions(random_weights=weights is None)
        embed(str(sheet), store, EmbedSettings((PRETRAINED,), spec, asked, weights=of))
    loaded = {
        label: load_sections(str(sheet), store, Selection(spec.key, PRETRAINED))
        for label, spec in chosen.items()
    }
    return score(keep_common_spots(loaded))


def score(loaded: Mapping[str, Sequence[LoadedSection]]) -> list[Result]:
    """Score the models on every grid, and compare each with the first: on the same spots, with the same draws."""
    results, paired = [], PairedBootstrap({})
    for label, items in loaded.items():
        plan = Plan.from_sections([item.section for item in items], "section", GENES)
        drawn = PairedBootstrap({item.section.slide_id: len(item.section.spots) for item in items})
        values: dict[tuple[str, str], list[float]] = {}
        for task in plan.tasks((0,)):
            # The scorer of `histosge evaluate`, without its 25 fits on random embeddings for each fold.
            scorer = TaskScorer(task, None, with_all_spots=False)
            for model in MODELS:
                found = scorer.score(ModelMethod(find_estimator(model), model))
                drawn.add(model, found.held_out, found.predicted)
                summary = found.genes.summary(task.top_genes())
                for metric, name in METRICS.items():
                    values.setdefault((model, name), []).append(summary[metric])
        results += [
            Result(f"{label}, {model}: {name}", float(np.mean(folds)))
            for (model, name), folds in values.items()
        ]
        paired.take(drawn, {model: f"{label}, {model}" for model in MODELS})
    first, *others = loaded
    for number, label in enumerate(others):
        row = paired.table([(f"{label}, dense", f"{first}, dense")], "section").row(0, named=True)
        # Of the plain tokens alone: variants are reported, not chosen from.
        key = "pearson_difference" if number == 0 else f"pearson_difference, {label}"
        results.append(Result(key, row["difference"], "", ">= -0.01" if number == 0 else ""))
        results += [Result(f"{key}, {end}", row[end]) for end in ("low", "high")]
    return results


def main() -> None:
    """Time both sides, then score them."""
    given = options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        results = speedups(Path(name), quick=given.quick)
        results += accuracy(Path(name) / "accuracy", quick=given.quick)
    report("tokens", results, given)


if __name__ == "__main__":
    main()
