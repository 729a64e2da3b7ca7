"""How well presets predict spots that they have not seen.

Every number comes from held-out spots. Genes are chosen on the training part of each fold, and a
noise control (`ridge` on random embeddings) goes through exactly the same code: if it scores, the
evaluation leaks. Its rows bear the number of the draw as their seed. The one figure that looks at
training spots bears its own name, `paper_all_spots`, and is given for the `random` split only.

It loads no store: `stream` makes the sections.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.errors import HistosgeError
from histosge.genes import library_size
from histosge.heldout import HeldOut, MapKeeper
from histosge.metrics import GeneScores, pearson_all_spots, score_genes
from histosge.models.model import Model
from histosge.models.presets import DEFAULT_PRESET, load_preset
from histosge.report import Block, evaluation_blocks, render_report
from histosge.scores import NOISE, FoldCount, Scores
from histosge.sections import Section
from histosge.splits import Fold
from histosge.tasks import Plan, Task
from histosge.windows import spots_from_patches

NOISE_DRAWS = 20
"""Draws of the noise control, at least. With 10, chance alone would raise a false alarm once in fifty."""
NOISE_PRESET = "ridge"
DEFAULT_GENES = 250

SCORE_SCHEMA = {
    "preset": pl.String,
    "split": pl.String,
    "fold": pl.String,
    "seed": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
}

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, what)`` before each fit, and once at the end."""


def evaluate_sections(
    sections: Sequence[Section],
    presets: Sequence[str],
    *,
    split: str = "block",
    genes: int | Sequence[str] = DEFAULT_GENES,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Fit each preset on each fold for each seed, and score it on the held-out spots.

    Parameters
    ----------
    sections
        At least one; the section and donor splits need two.
    presets
        Names from `histosge.models.presets`; the noise control is always added.
    split
        One of `histosge.splits.SPLITS`.
    genes
        How many to choose on each fold's training part, or which.
    seeds
        Of the models, and of the block and random splits.
    epochs
        For presets that iterate; None means each preset's own.
    progress
        Told before each fit.

    Raises
    ------
    SplitError
        If the sections cannot give the split, or nothing would be held out.
    HistosgeError
        If there is no preset or no seed, or a preset or gene is unknown.
    """
    presets, seeds = _asked_for(presets, seeds)
    default = _shown_preset(presets)
    models = {name: load_preset(name) for name in (*presets, NOISE_PRESET)}
    plan = Plan.of(sections, split, genes)
    folds = plan.folds(seeds[0])
    keeper = MapKeeper.over(sections, folds)
    draws = _noise_draws(seeds)
    total = len(folds) * (len(presets) * len(seeds) + sum(len(some) for some in draws.values()))
    ledger = _Ledger(split, total, progress)
    for task in plan.tasks(seeds):
        for name in presets:
            ledger.announce(name, task)
            kept = keeper if (name, task.seed) == (default, seeds[0]) else None
            ledger.add(name, task, _run(models[name], task, epochs, kept))
        for draw in draws[task.seed]:
            noise = task.with_noise(draw)
            ledger.announce(NOISE, noise)
            ledger.add(NOISE, noise, _run(models[NOISE_PRESET], noise, epochs, None))
    ledger.announce("", None)
    return Scores(
        scores=pl.DataFrame(ledger.rows, schema=SCORE_SCHEMA, orient="row"),
        genes=pl.concat(ledger.genes),
        presets=presets,
        default_preset=default,
        split=split,
        seeds=seeds,
        buffer_um=plan.buffer_um,
        gene_rule=_gene_rule(genes),
        folds=tuple(_count(seed, fold) for seed in seeds for fold in plan.folds(seed)),
        maps=keeper.maps(),
        notes=_notes(plan, ledger.halo_um),
    )


def write_evaluation(
    scores: Scores, out_dir: str | Path, *, notes: Sequence[str] = (), extra: Sequence[Block] = ()
) -> Path:
    """Write report.html, scores.csv and genes.csv; after a failure there is no report.html.

    Parameters
    ----------
    scores
        From `evaluate_sections`.
    out_dir
        Made if it is missing; files of an earlier evaluation are replaced.
    notes
        Further caveats, such as how many spots fell under the floor on counts.
    extra
        Further blocks for the page, below the scores.

    Returns
    -------
    pathlib.Path
        Of report.html.

    Raises
    ------
    HistosgeError
        If `out_dir` is a file.
    """
    folder = Path(out_dir)
    if folder.exists() and not folder.is_dir():
        raise HistosgeError(f"cannot write a report to {folder}: it is a file; name a folder")
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.html"
    maps, *rest = evaluation_blocks(scores, notes)
    subtitle = (
        f"split {scores.split}, {len(scores.presets)} presets, seeds {', '.join(map(str, scores.seeds))}"
    )
    texts = {
        folder / "scores.csv": scores.scores.write_csv(),
        folder / "genes.csv": scores.genes.write_csv(),
        page: render_report(
            "How well held-out spots are predicted",
            [maps, *rest[:-1], *extra, rest[-1]],
            subtitle=subtitle,
            footer="Recompute every number from scores.csv and genes.csv beside this page.",
        ),
    }
    # The page goes first and comes back last: whoever finds one finds the tables that belong to it.
    partial = {path: path.with_name(f"{path.name}.partial") for path in texts}
    try:
        for path, text in texts.items():
            partial[path].write_text(text, encoding="utf-8")
        page.unlink(missing_ok=True)
        for path in texts:
            partial[path].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return page


@dataclass(frozen=True)
class _Result:
    """What one model scored on one fold."""

    genes: GeneScores
    all_spots: float
    halo_um: float


@dataclass
class _Ledger:
    """Collects rows while runs go by."""

    split: str
    total: int
    progress: Progress | None
    rows: list[tuple[str, str, str, int, str, float]] = field(default_factory=list)
    genes: list[pl.DataFrame] = field(default_factory=list)
    halo_um: dict[str, float] = field(default_factory=dict)
    done: int = 0

    def announce(self, preset: str, task: Task | None) -> None:
        """Tell how far it is, before a fit; without a task: at the end."""
        if self.progress is not None:
            what = f"{preset}, fold {task.fold.name}, seed {task.seed}" if task else "scored"
            self.progress(self.done, self.total, what)

    def add(self, preset: str, task: Task, result: _Result) -> None:
        """Write down one run's rows."""
        top = task.top()
        values = result.genes.summary(top)
        if self.split == "random":
            values["paper_all_spots"] = result.all_spots
        key = (preset, self.split, task.fold.name, task.seed)
        self.rows += [(*key, metric, value) for metric, value in values.items()]
        self.genes.append(_gene_rows(key, task.genes, result.genes, top))
        self.halo_um[preset] = max(result.halo_um, self.halo_um.get(preset, 0.0))
        self.done += 1


def _run(model: type[Model], task: Task, epochs: int | None, keeper: MapKeeper | None) -> _Result:
    """Fit on a fold's training spots, predict every patch, and score all of its held-out spots."""
    fitted = model.fit(task.training(), seed=task.seed, epochs=epochs)
    tested, spots, shown = task.tested(), [], None
    for section, target in tested:
        log_patches = fitted.predict(section.patches)
        spots.append(spots_from_patches(section.overlap, log_patches))
        if keeper is not None and section.slide_id == keeper.section.slide_id:
            shown = (target, log_patches)
    result = _score(task, tested, spots, fitted.halo_um)
    if keeper is not None and shown is not None:
        keeper.keep(task.fold, HeldOut(task.genes, result.genes.pearson, *shown))
    return result


def _score(
    task: Task,
    tested: list[tuple[Section, NDArray[np.float32]]],
    predicted: list[NDArray[np.float32]],
    halo_um: float,
) -> _Result:
    held_out = np.concatenate([task.fold.test[section.slide_id] for section, _ in tested])
    truth = np.concatenate([target for _, target in tested])
    guess = np.concatenate(predicted)
    depth = np.concatenate([library_size(section.spots) for section, _ in tested])
    label = np.concatenate([np.full(len(section.spots), section.slide_id) for section, _ in tested])
    genes = score_genes(truth[held_out], guess[held_out], depth[held_out], label[held_out])
    return _Result(genes, pearson_all_spots(truth, guess, label), halo_um)


def _gene_rows(
    key: tuple[str, str, str, int], genes: tuple[str, ...], scores: GeneScores, top: NDArray[np.bool_]
) -> pl.DataFrame:
    preset, split, fold, seed = key
    columns = {
        "gene": list(genes),
        "pearson": scores.pearson,
        "pearson_depth_adjusted": scores.pearson_depth_adjusted,
        "spearman": scores.spearman,
        "mse": scores.mse,
        "mae": scores.mae,
        "r2": scores.r2,
        "pearson_undefined": scores.undefined,
        "top50": top,
    }
    labels = [
        pl.lit(preset).alias("preset"),
        pl.lit(split).alias("split"),
        pl.lit(fold).alias("fold"),
        pl.lit(seed, dtype=pl.Int64).alias("seed"),
    ]
    return pl.DataFrame(columns).select(*labels, pl.all())


def _asked_for(presets: Sequence[str], seeds: Sequence[int]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    wanted = tuple(dict.fromkeys(name for name in presets if name != NOISE))
    if not wanted or not seeds:
        raise HistosgeError(
            f"nothing to evaluate: {len(wanted)} presets and {len(seeds)} seeds; give at least one of each"
        )
    return wanted, tuple(dict.fromkeys(seeds))


def _shown_preset(presets: tuple[str, ...]) -> str:
    """Return whose maps are shown: the default preset, else the first one that draws a map at all."""
    return min(presets, key=lambda name: (name != DEFAULT_PRESET, name == "mean"))


def _noise_draws(seeds: tuple[int, ...]) -> dict[int, list[int]]:
    """Return seed -> numbers of the draws that are scored on that seed's folds, in turn."""
    draws = range(max(NOISE_DRAWS, len(seeds)))
    return {seed: list(draws[i :: len(seeds)]) for i, seed in enumerate(seeds)}


def _gene_rule(genes: int | Sequence[str]) -> str:
    if isinstance(genes, int):
        return f"the {genes} most variable genes of each fold's training spots; held-out spots had no say"
    return f"{len(genes)} genes given by the user, the same in every fold"


def _count(seed: int, fold: Fold) -> FoldCount:
    return FoldCount(seed, fold.name, fold.n_train, fold.n_test, fold.n_dropped)


def _notes(plan: Plan, halo_um: Mapping[str, float]) -> tuple[str, ...]:
    donors = {section.spots.donor for section in plan.sections}
    n_sections = len(plan.sections)
    notes = [f"{n_sections} section{'s' * (n_sections > 1)} of {len(donors)} donor{'s' * (len(donors) > 1)}."]
    # With one section a donor, leaving out a section leaves out its donor.
    if plan.split != "donor" and not (plan.split == "section" and len(donors) == n_sections):
        notes.append("Training and held-out spots share donors: expect less on another person's tissue.")
    wide = [f"{preset} by {halo:.0f} µm" for preset, halo in halo_um.items() if halo > 0]
    if wide and plan.split in {"block", "random"}:
        notes.append(
            f"Some presets look beyond a patch ({', '.join(wide)}), so training sees the picture around"
            " held-out spots, but never their counts."
        )
    return tuple(notes)
