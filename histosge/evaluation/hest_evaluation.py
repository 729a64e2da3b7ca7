"""HEST-Benchmark in one call: a published task -> its own number, and beside it ours with controls."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.earlier_results import MadeWith, content_fingerprint, is_same_result
from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import Encoder
from featurestore.events import OnProgress, Progress, ignore_progress
from featurestore.object_stores.hub_place import check_writable
from featurestore.storage.store import Store
from featurestore.threads import keep_to_own_cores
from histosge.data.gene_choice import GeneChoice
from histosge.errors import ExpressionError
from histosge.evaluation.encoder_comparison import merge_encoders
from histosge.evaluation.hest_bench import (
    BenchSpots,
    BenchTask,
    bench_section,
    embed_task,
    missing_genes,
    read_sample,
    read_task,
)
from histosge.evaluation.hest_protocol import (
    BenchPlan,
    HestDepth,
    HestMethod,
    published_score,
)
from histosge.evaluation.methods import Method, ModelMethod
from histosge.evaluation.report_files import (
    check_report_place,
    has_evaluation,
    read_evaluation,
    write_evaluation,
)
from histosge.evaluation.results import NOISE, VARIANT, Scores
from histosge.evaluation.runner import score_plan
from histosge.evaluation.score_rows import SCORE_SCHEMA
from histosge.heldout.splits import Fold
from histosge.models.estimators import find_estimator

PUBLISHED = "hest_pearson"
"""Metric of the benchmark's own number: mean over genes of the Pearson over all held-out spots of a split."""
STORE_NAME = "embeddings.zarr"
"""In the report's folder, where no store is named."""
NOTES = (
    (
        f"HEST-Benchmark: {PUBLISHED} is its own number, computed as its code does: Pearson over all held-out spots of a"
        " split, log1p of raw counts, mean over genes and then over splits. All other columns are ours: Pearson within"
        " sections."
    ),
    (
        "hest has log1p of raw counts for targets, so part of its Pearson is library size: compare it with depth, and see"
        " hest+depth_normalised and the depth-adjusted column. ridge is our preset on log1p(CP10k) of the same genes."
    ),
    "Predictions of hest lack each gene's mean: of its columns only correlations can be used.",
)


@dataclass(frozen=True)
class BenchSettings:
    """What to score.

    Parameters
    ----------
    bench
        Folder of the tasks.
    task
        Name of one, such as ``IDC``.
    encoders
        Keys.
    """

    bench: Path
    task: str
    encoders: Sequence[str]


def evaluate_bench(
    settings: BenchSettings,
    report_dir: Path,
    store: str | None = None,
    *,
    overwrite: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Score encoders on a task of HEST-Benchmark, and write the report.

    Parameters
    ----------
    store
        Feature store for the embeddings of the patches; None: `STORE_NAME` in the report's folder.

    Raises
    ------
    ExpressionError
        If the task is damaged or incomplete.
    EncoderError, IdentityMismatchError
        If an encoder cannot be loaded, or the store holds another one's vectors.
    """
    check_writable(store or report_dir)
    keep_to_own_cores()
    task = read_task(settings.bench, settings.task)
    folder = check_report_place(report_dir)
    encoders = {key: load_encoder(key) for key in dict.fromkeys(settings.encoders)}
    made_with = _made_with(task, encoders)
    if not overwrite and has_evaluation(folder):
        earlier, there = read_evaluation(folder) or (None, None)
        if is_same_result(folder, earlier, made_with, overwrite=overwrite) and there is not None:
            return replace(there, was_there=True)
    spots = {name: read_sample(sample) for name, sample in task.samples.items()}
    for name, found in spots.items():
        if missing := missing_genes(task.genes, found.genes):
            raise ExpressionError(
                f"sample {name!r} did not measure {len(missing)} of the {len(task.genes)} genes of the list, such as "
                f"{missing[0]!r}: it is of another task or version"
            )
    target = Store.open_or_create(store or folder / STORE_NAME)
    scored = {}
    for number, (key, encoder) in enumerate(encoders.items()):
        progress = _part(on_progress, number, len(encoders), key)
        embedding = embed_task(task, target, encoder, progress)
        scored[key] = score_task(task, spots, embedding, progress)
    scores = merge_encoders(scored)
    write_evaluation(scores, folder, made_with=made_with)
    return scores


def score_task(
    task: BenchTask,
    spots: dict[str, BenchSpots],
    embedding: dict[str, NDArray[np.float32]],
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Score one encoder's embeddings by the published protocol and by ours, with all controls."""
    donors = {name: f"split{i}" for i, (_, test) in enumerate(task.splits) for name in test}
    sections = tuple(
        bench_section(sample, spots[name], embedding[name], donors.get(name, name))
        for name, sample in task.samples.items()
    )
    folds = tuple(
        Fold(
            f"split{i}",
            {s.slide_id: np.full(len(s.spots), s.slide_id in train) for s in sections},
            {s.slide_id: np.full(len(s.spots), s.slide_id in test) for s in sections},
        )
        for i, (train, test) in enumerate(task.splits)
    )
    plan = BenchPlan(sections, "donor", GeneChoice.parse(list(task.genes)), 0.0, folds)
    methods: tuple[Method, ...] = (
        HestMethod("hest+depth_normalised", VARIANT, depth_normalised=True, genes=task.genes),
        HestMethod(genes=task.genes),
        ModelMethod(find_estimator("ridge"), "ridge"),
        HestDepth(task.genes),
    )
    # The controls go through the protocol itself: it is this protocol that might leak.
    control = HestMethod(NOISE, genes=task.genes)
    scores = score_plan(plan, methods, control, seeds=(0,), on_progress=on_progress)
    rows = [
        ("hest", "donor", f"split{i}", 0, PUBLISHED, float(published_score(*parts).mean()))
        for i, parts in enumerate(_published_parts(task, spots, embedding))
    ]
    published = pl.DataFrame(rows, schema=SCORE_SCHEMA, orient="row")
    rule = f"the {len(task.genes)} genes of the benchmark's list, chosen by its authors on all spots, held-out ones included"
    notes = (*NOTES, *scores.notes)
    return replace(
        scores, scores=pl.concat([scores.scores, published]), protocol="hest", gene_rule=rule, notes=notes
    )


def _published_parts(
    task: BenchTask, spots: dict[str, BenchSpots], embedding: dict[str, NDArray[np.float32]]
) -> "list[tuple[tuple[NDArray[np.floating], NDArray[np.floating]], tuple[NDArray[np.floating], NDArray[np.floating]]]]":
    """Return embeddings and targets of each split, training and held-out, all spots in the order of the files."""
    target = {}
    for name, found in spots.items():
        column = {gene: i for i, gene in enumerate(found.genes)}
        counts = found.counts[:, [column[gene] for gene in task.genes]].toarray()
        # In double precision, as the benchmark's code takes the logarithm.
        target[name] = np.log1p(counts.astype(np.float64))
    parts = []
    for train, test in task.splits:
        X, Y = (
            tuple(np.concatenate([values[name] for name in part]) for part in (train, test))
            for values in (embedding, target)
        )
        parts.append(((X[0], X[1]), (Y[0], Y[1])))
    return parts


def _made_with(task: BenchTask, encoders: dict[str, Encoder]) -> MadeWith:
    return {
        "protocol": "hest",
        "task": task.name,
        "bench": content_fingerprint(task.folder),
        "encoders": [f"{key} {encoder.identity.fingerprint[:16]}" for key, encoder in encoders.items()],
    }


def _part(on_progress: OnProgress, number: int, total: int, encoder: str) -> OnProgress:
    """Return a callback for one of several encoders."""

    def report(progress: Progress) -> None:
        done, every = number * progress.total + progress.done, total * progress.total
        on_progress(replace(progress, done=done, total=every, label=f"{progress.label}, {encoder}"))

    return report
