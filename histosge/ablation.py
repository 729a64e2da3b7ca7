"""What each defect of the released code costs, or seems to gain: the `paper` preset with each switched on.

Every variant is fitted on the same folds. Three figures: Pearson on held-out spots; `paper_all_spots`, which
counts training spots; and the latter on random embeddings, where nothing can be known.

Terms
    variant  `paper`, ``paper+<switch>``, or ``paper+all``
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.errors import HistosgeError
from histosge.genes import choose_genes, library_size, select_target
from histosge.metrics import pearson_all_spots, score_genes
from histosge.models.paper import PaperModel, PaperSwitches
from histosge.scores import Ablation
from histosge.sections import Section, Spots
from histosge.tasks import Plan, Task
from histosge.windows import spots_from_patches

MODEL = ("file_order_groups", "integer_coordinates")
ENCODING = ("bgr", "fixed_pixel_crop")
EVALUATION = ("hvg_before_split", "all_spots_metric")
SWITCHES = (*MODEL, *ENCODING, *EVALUATION)
METRICS = ("pearson_mean", "paper_all_spots", "paper_all_spots_on_noise", "as_reported")

Say = Callable[[str], None]
Encoded = Mapping[frozenset[str], Sequence[Section]]
"""Switches of the encoding -> sections with such embeddings; the empty set is the store's own."""


def ablate(
    encoded: Encoded,
    *,
    split: str,
    genes: int | Sequence[str],
    seeds: Sequence[int],
    epochs: int | None = None,
    left_out: Sequence[str] = (),
    say: Say = lambda _: None,
) -> Ablation:
    """Fit and score every variant on every fold of every seed.

    Parameters
    ----------
    encoded
        Must hold the empty set; a switch of the encoding is tried where its set is there, and ``paper+all``
        has those of the largest set.
    left_out
        Passed on to the result.

    Raises
    ------
    SplitError
        If the sections cannot give the split.
    """
    if frozenset() not in encoded:
        raise HistosgeError("an ablation needs the sections as they are stored")
    variants = _variants(encoded)
    rows: list[tuple[str, str, str, int, str, float]] = []
    for task in Plan.of(encoded[frozenset()], split, genes).tasks(seeds):
        noise: dict[tuple[PaperSwitches, bool], float] = {}
        for name, switches in variants.items():
            say(f"{name}, fold {task.fold.name}, seed {task.seed}")
            here = _prepared(task, encoded, switches, genes)
            model = PaperSwitches(*(switch in switches for switch in MODEL))
            key = model, "hvg_before_split" in switches
            held_out, all_spots = score_variant(here, model, epochs)
            if key not in noise:
                noise[key] = score_variant(here.with_noise(task.seed), model, epochs)[1]
            reported = all_spots if "all_spots_metric" in switches else held_out
            values = zip(METRICS, (held_out, all_spots, noise[key], reported), strict=True)
            rows += [(name, split, task.fold.name, task.seed, metric, value) for metric, value in values]
    columns = ("preset", "split", "fold", "seed", "metric", "value")
    frame = pl.DataFrame(rows, schema=columns, orient="row")
    return Ablation(frame, tuple(variants), split, tuple(left_out))


def _variants(encoded: Encoded) -> dict[str, frozenset[str]]:
    alone = [s for s in SWITCHES if s not in ENCODING or frozenset({s}) in encoded]
    everything = frozenset(MODEL + EVALUATION) | max(encoded, key=len)
    return {
        "paper": frozenset(),
        **{f"paper+{switch}": frozenset({switch}) for switch in alone},
        "paper+all": everything,
    }


def _prepared(task: Task, encoded: Encoded, switches: frozenset[str], genes: int | Sequence[str]) -> Task:
    """Return the task on the embeddings and genes that the switches ask for."""
    sections = tuple(encoded[switches & frozenset(ENCODING)])
    chosen = task.genes
    if "hvg_before_split" in switches and isinstance(genes, int):
        chosen = choose_genes([section.spots for section in sections], genes)
    targets = tuple(select_target(section.spots, chosen) for section in sections)
    return replace(task, sections=sections, genes=chosen, targets=targets)


def score_variant(task: Task, switches: PaperSwitches, epochs: int | None) -> tuple[float, float]:
    """Return Pearson over held-out spots, and over all spots of all sections."""
    fitted = PaperModel.fit(task.training(), seed=task.seed, epochs=epochs, switches=switches)
    guess = np.concatenate([spots_from_patches(s.overlap, fitted.predict(s.patches)) for s in task.sections])
    truth = np.concatenate(task.targets)
    spots: list[Spots] = [section.spots for section in task.sections]
    label: NDArray[np.str_] = np.concatenate([np.full(len(part), part.slide_id) for part in spots])
    out = np.concatenate([task.fold.test[part.slide_id] for part in spots])
    depth = np.concatenate([library_size(part) for part in spots])
    scored = score_genes(truth[out], guess[out], depth[out], label[out])
    return float(scored.pearson.mean()), pearson_all_spots(truth, guess, label)
