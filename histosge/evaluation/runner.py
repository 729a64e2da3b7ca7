"""How well methods predict spots that they have not seen.

Every number comes from held-out spots. Genes are chosen on the training part of each fold, and a
noise control (`ridge` on random embeddings) goes through exactly the same code: if it scores, the
evaluation leaks. Its rows bear the number of the draw as their seed. The one figure that looks at
training spots bears its own name, `paper_all_spots`; it is given for the `random` split, and for the
published code in an ablation.

It loads no store: `stream` makes the sections.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.events import OnProgress, Progress, ignore_progress
from histosge.calibration.conformal import calibrate
from histosge.data.genes import library_size
from histosge.data.sections import Section
from histosge.errors import HistosgeError
from histosge.evaluation.methods import (
    DEPTH,
    PAPER,
    FittedMethod,
    MapModel,
    Method,
    PaperMethod,
    PresetMethod,
    Reencode,
    ablation_names,
    resolve,
)
from histosge.evaluation.paired_bootstrap import HeldOutSpots, PairedBootstrap, ordered_pairs
from histosge.evaluation.results import NOISE, FoldCount, Scores
from histosge.evaluation.shown_maps import HeldOut, HeldOutMaps
from histosge.evaluation.tasks import Plan, Task
from histosge.heldout.metrics import GeneScores, pearson_all_spots, score_genes
from histosge.heldout.spatial_metrics import SpotLattice
from histosge.heldout.splits import Fold
from histosge.models.registry import DEFAULT_PRESET, load_preset

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


def evaluate_sections(
    sections: Sequence[Section],
    presets: Sequence[str],
    *,
    split: str = "block",
    genes: int | Sequence[str] = DEFAULT_GENES,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    ablate: bool = False,
    reencode: Reencode | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Fit each preset on each fold for each seed, and score it on the held-out spots.

    Parameters
    ----------
    sections
        At least one; the section and donor splits need two.
    presets
        Names that `histosge.evaluation.methods` knows; the noise control is always added.
    split
        One of `histosge.heldout.splits.SPLITS`.
    genes
        How many to choose on each fold's training part, or which.
    seeds
        Of the models, and of the block and random splits.
    epochs
        For presets that iterate; None means each preset's own.
    ablate
        Add the published code without a defect, with each alone and with all, also on random embeddings.
    reencode
        Encodes the patches under spots anew, for the defects that lie there; None leaves those out.
    on_progress
        Called before each fit, and once at the end.

    Raises
    ------
    SplitError
        If the sections cannot give the split, or nothing would be held out.
    HistosgeError
        If there is no preset or no seed, or a preset or gene is unknown.
    """
    names = [*presets, *(ablation_names(patches=reencode is not None) if ablate else ())]
    methods, left_out = resolve(names, split, reencode)
    if ablate and reencode is None:
        left_out = (
            *left_out,
            "bgr and fixed_pixel_crop are left out: the slides cannot be read here, and they encode patches anew.",
        )
    plan = Plan.from_sections(sections, split, genes)
    control = PresetMethod(NOISE, load_preset(NOISE_PRESET))
    scores = score_plan(
        plan, methods, control, seeds=seeds, epochs=epochs, ablate=ablate, on_progress=on_progress
    )
    return replace(scores, left_out=left_out)


def score_plan(
    plan: Plan,
    methods: Sequence[Method],
    control: Method,
    *,
    seeds: Sequence[int],
    epochs: int | None = None,
    ablate: bool = False,
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Run methods over a plan, and the control on random embeddings.

    Raises
    ------
    HistosgeError
        If there is no method or no seed; `SplitError` if the sections cannot give the split.
    """
    seeds = tuple(dict.fromkeys(seeds))
    if not methods or not seeds:
        raise HistosgeError(
            f"nothing to evaluate: {len(methods)} presets and {len(seeds)} seeds; give at least one of each"
        )
    names = tuple(method.name for method in methods)
    default = _shown(names)
    folds = plan.folds(seeds[0])
    keeper = HeldOutMaps.for_sections(plan.sections, folds)
    draws = _noise_draws(seeds)
    total = len(folds) * (len(names) * len(seeds) + sum(len(some) for some in draws.values()))
    spots = {section.slide_id: len(section.spots) for section in plan.sections}
    ledger = _Ledger(plan.split, total, on_progress, PairedBootstrap(spots))
    for task in plan.tasks(seeds):
        runner = _Runner(task, epochs, plan.split == "random")
        on_noise = _Runner(task.with_noise(task.seed), epochs, runner.halves) if ablate else None
        for method in methods:
            ledger.announce(method.name, task)
            kept = keeper if (method.name, task.seed) == (default, seeds[0]) else None
            run = runner.run(method, kept)
            ledger.add(method.name, run)
            ledger.bootstrap.add(method.name, run.tested, run.predicted)
            if method.name == DEFAULT_PRESET:
                ledger.write(method.name, run.task, _intervals(run))
            if isinstance(method, PaperMethod):
                ledger.add_paper(method, run, on_noise.run(method, None) if on_noise else None)
        for draw in draws[task.seed]:
            noise = task.with_noise(draw)
            ledger.announce(NOISE, noise)
            ledger.add(NOISE, _Runner(noise, epochs, runner.halves).run(control, None))
    ledger.announce("", None)
    return Scores(
        scores=pl.DataFrame(ledger.rows, schema=SCORE_SCHEMA, orient="row"),
        genes=pl.concat(ledger.genes),
        presets=names,
        default_preset=default,
        split=plan.split,
        seeds=seeds,
        buffer_um=plan.buffer_um,
        gene_rule=_gene_rule(plan.genes),
        folds=tuple(_count(seed, fold) for seed in seeds for fold in plan.folds(seed)),
        maps=keeper.maps(),
        notes=_notes(plan, ledger.halo_um),
        differences=ledger.bootstrap.table(ordered_pairs(names, default), plan.split),
    )


@dataclass(frozen=True)
class _Run:
    """What one method did on one fold."""

    task: Task
    tested: HeldOutSpots
    predicted: NDArray[np.float64]
    genes: GeneScores
    all_spots: float | None
    halo_um: float
    fitted: FittedMethod


@dataclass
class _Runner:
    """Runs methods on one task; defects that only concern the scoring share a fit.

    Parameters
    ----------
    halves
        Whether half of every section was trained on: then the published figure is given for all.
    """

    task: Task
    epochs: int | None
    halves: bool
    cache: dict[str, _Run] = field(default_factory=dict)

    def run(self, method: Method, keeper: HeldOutMaps | None) -> _Run:
        """Fit on a fold's training spots, and score all of its held-out spots."""
        if not isinstance(method, PaperMethod):
            return self._run(method, keeper)
        name = method.fit_name(self.task)
        if name not in self.cache:
            self.cache[name] = self._run(method, keeper)
        return self.cache[name]

    def _run(self, method: Method, keeper: HeldOutMaps | None) -> _Run:
        task = method.prepare(self.task)
        fitted = method.fit(task, self.epochs)
        views = task.tested()
        predicted = np.concatenate([fitted.at_spots(section) for section, _ in views]).astype(np.float64)
        tested = _tested(task, views)
        lattice = SpotLattice.over(
            np.concatenate([section.spots.xy_um for section, _ in views]), tested.section
        )
        genes = score_genes(tested.truth, predicted, tested.depth, tested.section, lattice)
        if keeper is not None:
            _keep(keeper, task, fitted, genes)
        asked = self.halves or isinstance(method, PaperMethod)
        all_spots = _all_spots(task, fitted) if asked else None
        return _Run(task, tested, predicted, genes, all_spots, fitted.halo_um, fitted)


def _intervals(run: _Run) -> dict[str, float]:
    """Return how often intervals from the training part hold on held-out spots, and the share of trusted genes."""
    preset, task = load_preset(DEFAULT_PRESET), run.task
    spot_um = max(section.spots.diameter_um for section in task.sections)
    found = calibrate(lambda parts: preset.fit(parts, seed=task.seed), task.training(), spot_um)
    if found is None:
        return {}
    depth = None
    if found.strata is not None and isinstance(run.fitted, MapModel):
        depth = np.concatenate([run.fitted.depth_at_spots(section) for section, _ in task.tested()])
    return found.scores(run.tested.truth.astype(np.float32), run.predicted.astype(np.float32), depth)


def _keep(keeper: HeldOutMaps, task: Task, fitted: FittedMethod, genes: GeneScores) -> None:
    """Hand the map of the shown section over, if this fold tests it and the method draws one.

    All of its patches are drawn, also those between the sides, which no score looks at.
    """
    slide_id = keeper.section.slide_id
    if not task.fold.test[slide_id].any():
        return
    section, target = next(pair for pair in task.everything() if pair[0].slide_id == slide_id)
    log_patches = fitted.at_patches(section)
    if log_patches is not None:
        keeper.keep(task.fold, HeldOut(task.genes, genes.pearson, target, log_patches))


def _tested(task: Task, views: Sequence[tuple[Section, NDArray[np.float32]]]) -> HeldOutSpots:
    ids = [section.slide_id for section, _ in views]
    return HeldOutSpots(
        task.fold.name,
        task.seed,
        task.genes,
        np.concatenate([target for _, target in views]).astype(np.float64),
        np.concatenate([library_size(section.spots) for section, _ in views]),
        np.concatenate([np.full(len(section.spots), section.slide_id) for section, _ in views]),
        np.concatenate([np.flatnonzero(task.fold.test[slide_id]) for slide_id in ids]),
    )


def _all_spots(task: Task, fitted: FittedMethod) -> float:
    """Return the published figure: over all spots, those trained on included."""
    everything = task.everything()
    truth = np.concatenate([target for _, target in everything])
    guess = np.concatenate([fitted.at_spots(section) for section, _ in everything])
    label = np.concatenate([np.full(len(section.spots), section.slide_id) for section, _ in everything])
    return pearson_all_spots(truth, guess, label)


@dataclass
class _Ledger:
    """Collects rows while runs go by."""

    split: str
    total: int
    on_progress: OnProgress
    bootstrap: PairedBootstrap
    rows: list[tuple[str, str, str, int, str, float]] = field(default_factory=list)
    genes: list[pl.DataFrame] = field(default_factory=list)
    halo_um: dict[str, float] = field(default_factory=dict)
    done: int = 0

    def announce(self, preset: str, task: Task | None) -> None:
        """Tell how far it is, before a fit; without a task: at the end."""
        label = f"{preset}, fold {task.fold.name}, seed {task.seed}" if task else "scored"
        self.on_progress(Progress(self.done, self.total, label))

    def add(self, preset: str, run: _Run) -> None:
        """Write down one run's rows."""
        top = run.task.top()
        values = run.genes.summary(top)
        if run.all_spots is not None:
            values["paper_all_spots"] = run.all_spots
        key = self.write(preset, run.task, values)
        self.genes.append(_gene_rows(key, run.task.genes, run.genes, top))
        self.halo_um[preset] = max(run.halo_um, self.halo_um.get(preset, 0.0))
        self.done += 1

    def add_paper(self, method: PaperMethod, run: _Run, on_noise: _Run | None) -> None:
        """Write down what the published code would report, and what the same makes of random embeddings."""
        values = {"as_reported": _reported(method, run)}
        if on_noise is not None:
            values["pearson_mean_on_noise"] = float(on_noise.genes.pearson.mean())
            values["paper_all_spots_on_noise"] = _figure(on_noise)
            values["as_reported_on_noise"] = _reported(method, on_noise)
        self.write(method.name, run.task, values)

    def write(self, preset: str, task: Task, values: Mapping[str, float]) -> tuple[str, str, str, int]:
        """Write values down, and return what their rows begin with."""
        key = (preset, self.split, task.fold.name, task.seed)
        self.rows += [(*key, metric, value) for metric, value in values.items()]
        return key


def _reported(method: PaperMethod, run: _Run) -> float:
    if "all_spots_metric" in method.switches:
        return _figure(run)
    return float(run.genes.pearson.mean())


def _figure(run: _Run) -> float:
    return np.nan if run.all_spots is None else run.all_spots


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
        "ssim": scores.ssim,
        "moran_measured": scores.moran_measured,
        "moran_predicted": scores.moran_predicted,
        "top50": top,
    }
    labels = [
        pl.lit(preset).alias("preset"),
        pl.lit(split).alias("split"),
        pl.lit(fold).alias("fold"),
        pl.lit(seed, dtype=pl.Int64).alias("seed"),
    ]
    return pl.DataFrame(columns).select(*labels, pl.all())


def _shown(names: tuple[str, ...]) -> str:
    """Return whose maps are shown: the default preset, else the first one that draws a map worth seeing."""
    return min(names, key=lambda n: (n != DEFAULT_PRESET, n == "mean", n == DEPTH, n.startswith(f"{PAPER}+")))


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
    if wide and plan.split == "random":
        notes.append(
            f"Some presets look beyond a patch ({', '.join(wide)}), so training sees the picture around"
            " held-out spots, but never their counts."
        )
    if wide and plan.split == "block":
        notes.append(
            f"Some presets look beyond a patch ({', '.join(wide)}). Patches near the border of a block are hidden"
            " from both sides, so no pixel lies in a window of training and in one of a held-out spot (checked)."
        )
    return tuple(notes)
