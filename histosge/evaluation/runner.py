"""How well methods predict held-out spots: fits every method on every fold, and scores it.

Every number comes from held-out spots. Genes are chosen on the training part of each fold, and a
noise control (`ridge` on random embeddings) goes through exactly the same code: if it scores, the
evaluation leaks. A second control, `smooth_noise`, has embeddings that are smooth in space: what it scores is not due to
the picture. Rows of both bear the number of the draw as their seed. The one figure that looks at
training spots bears its own name, `paper_all_spots`; it is given for the `random` split, and for the
published code in an ablation.

It loads no store: `histosge.data.section_loading` makes the sections. It knows no preset by name but the control's:
what a method can do is asked of the method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.events import OnProgress, Progress, ignore_progress
from histosge.calibration.conformal import calibrate, named_donors, widest_spot_um
from histosge.data.gene_choice import GeneChoice, GeneSource
from histosge.data.genes import library_size
from histosge.data.sections import Section
from histosge.errors import HistosgeError, ModelError
from histosge.evaluation.ablation import Reencode, ablation_names
from histosge.evaluation.annotated_domains import Annotation, HeldOutDomains, domain_notes, domain_rows
from histosge.evaluation.bin_scores import BinScores, HeldOutBins, bin_suffix
from histosge.evaluation.fine_bins import FineBins
from histosge.evaluation.method_choice import choose_shown, find_methods
from histosge.evaluation.methods import (
    DEPTH,
    AblationMethod,
    FittedMethod,
    LibrarySizeMethod,
    MapModel,
    Method,
    ModelMethod,
)
from histosge.evaluation.paired_bootstrap import HeldOutSpots, PairedBootstrap, ordered_pairs
from histosge.evaluation.results import NOISE, SMOOTH_NOISE, FoldCount, Scores
from histosge.evaluation.shown_maps import FoldPrediction, HeldOutMaps
from histosge.evaluation.tasks import Plan, Task
from histosge.heldout.metric_registry import METRICS, ScoredSpots
from histosge.heldout.metrics import GeneScores, pearson_all_spots, score_genes
from histosge.heldout.splits import INTERLEAVED, Fold
from histosge.models.estimators import ModelSource, find_estimator

NOISE_DRAWS = 20
"""Draws of the noise control, at least. With 10, chance alone would raise a false alarm once in fifty."""
SMOOTH_DRAWS = 5
"""Draws of the smooth control, at least: the mean over a draw's features hardly differs from draw to draw, and drawing
smooth fields costs several times what white noise does."""
# It takes a tenth of a second a fit, so that 20 draws on every fold are affordable.
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
    presets: Sequence[ModelSource],
    *,
    split: str = "block",
    genes: GeneSource | GeneChoice = DEFAULT_GENES,
    seeds: Sequence[int] = (0, 1, 2),
    epochs: int | None = None,
    ablate: bool = False,
    reencode: Reencode | None = None,
    annotation: Annotation | None = None,
    bins: FineBins | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Fit each preset on each fold for each seed, and score it on the held-out spots.

    Parameters
    ----------
    sections
        At least one; the section and donor splits need two.
    presets
        What `histosge.evaluation.method_choice.find_methods` takes: names, model classes, objects with `fit`. The
        noise control is always added.
    split
        One of `histosge.heldout.splits.SPLITS`.
    genes
        How many to choose on each fold's training part, or which; see `histosge.data.gene_choice`.
    seeds
        Of the models, and of the block and random splits.
    epochs
        For models that iterate; None means each model's own.
    ablate
        Add the published code without a defect, with each alone and with all, also on random embeddings.
    reencode
        Encodes the patches under spots again, for the defects that lie there; None leaves those out.
    annotation
        Labels of spots, with which domains are compared; None: no domains are found.
    bins
        Measured bins finer than the spots, at which maps are scored, too; None: at spots alone.
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
    methods, left_out = find_methods(names, split, reencode)
    if ablate and reencode is None:
        left_out = (
            *left_out,
            "bgr and fixed_pixel_crop are left out: the slides cannot be read here, and they encode patches again.",
        )
    plan = Plan.from_sections(sections, split, genes)
    scores = score_plan(
        plan,
        methods,
        noise_control(),
        seeds=seeds,
        epochs=epochs,
        ablate=ablate,
        annotation=annotation,
        bins=bins,
        on_progress=on_progress,
    )
    return replace(scores, left_out=left_out)


def noise_control() -> ModelMethod:
    """Return what is fitted to random embeddings."""
    return ModelMethod(find_estimator(NOISE_PRESET), NOISE)


def score_plan(
    plan: Plan,
    methods: Sequence[Method],
    control: Method,
    *,
    seeds: Sequence[int],
    epochs: int | None = None,
    ablate: bool = False,
    annotation: Annotation | None = None,
    bins: FineBins | None = None,
    on_progress: OnProgress = ignore_progress,
) -> Scores:
    """Run methods over a plan, and the control on random embeddings, white and smooth.

    Raises
    ------
    HistosgeError
        If there is no method or no seed; `SplitError` if the sections cannot give the split.
    """
    # A seed that is given twice would count twice in every mean.
    seeds = tuple(dict.fromkeys(seeds))
    if not methods or not seeds:
        raise HistosgeError(
            f"nothing to evaluate: {len(methods)} presets and {len(seeds)} seeds; give at least one of each"
        )
    names, shown = tuple(method.name for method in methods), choose_shown(methods)
    folds = plan.folds(seeds[0])
    # Of the first seed: folds of a block split differ from seed to seed, and a map is of one set of folds.
    maps = HeldOutMaps.for_sections(plan.sections, folds)
    draws, smooth_draws = _noise_draws(seeds, NOISE_DRAWS), _noise_draws(seeds, SMOOTH_DRAWS)
    n_control = sum(len(some) for some in (*draws.values(), *smooth_draws.values()))
    n_fits = len(folds) * (len(names) * len(seeds) + n_control)
    spots = {section.slide_id: len(section.spots) for section in plan.sections}
    table = _ScoreTable(plan.split, n_fits, on_progress, PairedBootstrap(spots))
    table.bin_suffix = bin_suffix(bins.side_um) if bins else ""
    table.domains = HeldOutDomains(plan.sections, annotation, plan.split) if annotation else None
    for task in plan.tasks(seeds):
        # Half of every section is trained on in this split: then the published figure is given for all methods.
        scorer = _TaskScorer(task, epochs, with_all_spots=plan.split == "random")
        scorer = replace(scorer, bins=HeldOutBins.from_task(bins, task) if bins else None)
        on_noise = None
        if ablate:
            on_noise = replace(scorer, task=task.with_random_embeddings(task.seed), fitted={})
        for number, method in enumerate(methods):
            table.report_progress(method.name, task)
            is_shown = method.name == shown
            result = scorer.score(method, maps if is_shown and task.seed == seeds[0] else None)
            table.add(method.name, result)
            table.bootstrap.add(method.name, result.held_out, result.predicted)
            table.add_domains(method.name, result, with_measured=number == 0)
            # Of the shown method alone: each takes up to four more fits per fold and seed.
            if is_shown:
                table.add_rows(method.name, result.task, _check_intervals(method, result, epochs))
            if isinstance(method, AblationMethod):
                table.add_ablation(method, result, on_noise.score(method) if on_noise else None)
        if scorer.bins is not None and DEPTH not in names:
            table.add_depth_at_bins(scorer)
        _score_controls(table, scorer, control, draws[task.seed], smooth_draws[task.seed])
    table.report_progress("", None)
    domains = table.score_domains()
    return Scores(
        scores=pl.DataFrame(table.rows, schema=SCORE_SCHEMA, orient="row"),
        genes=pl.concat(table.genes),
        presets=names,
        default_preset=shown,
        split=plan.split,
        seeds=seeds,
        buffer_um=plan.buffer_um,
        gene_rule=_gene_rule(plan.genes),
        folds=tuple(_count(seed, fold) for seed in seeds for fold in plan.folds(seed)),
        maps=maps.maps(),
        notes=(
            *_notes(plan, table.halo_um),
            *domain_notes(annotation),
        ),
        domains=domains,
        differences=table.bootstrap.table(ordered_pairs(names, shown), plan.split),
        kinds={method.name: method.kind for method in methods},
        bootstrap=table.bootstrap,
        bins=bins.facts if bins else None,
    )


def _score_controls(
    table: "_ScoreTable",
    scorer: "_TaskScorer",
    control: Method,
    draws: Sequence[int],
    smooth_draws: Sequence[int],
) -> None:
    """Score the control on random embeddings of a fold, white and smooth, one fit a draw."""
    task = scorer.task
    for number, draw in enumerate(draws):
        noise = task.with_random_embeddings(draw)
        table.report_progress(NOISE, noise)
        # At bins as many draws as of the smooth control: each has thousands of bins to be scored on.
        at_bins = scorer.bins if number < SMOOTH_DRAWS else None
        # Through the same scorer as the methods: a leak in it must show in the control, too.
        result = replace(scorer, task=noise, fitted={}, bins=at_bins).score(control)
        table.add(NOISE, result)
        # One draw a seed: k-means takes longer than the fit.
        if number == 0:
            table.add_domains(NOISE, result)
    for number, draw in enumerate(smooth_draws):
        smooth = task.with_smooth_embeddings(draw)
        table.report_progress(SMOOTH_NOISE, smooth)
        result = replace(scorer, task=smooth, fitted={}).score(control)
        table.add(SMOOTH_NOISE, result)
        # How many genes would be trusted that were predicted from nothing; once a fold and seed, as of the model.
        if number == 0:
            table.add_domains(SMOOTH_NOISE, result)
            table.add_rows(SMOOTH_NOISE, result.task, _check_intervals(control, result, scorer.epochs))


@dataclass(frozen=True)
class _MethodScore:
    """One method, fitted on one fold and scored on its held-out spots.

    Parameters
    ----------
    task
        As the method prepared it.
    predicted
        log1p(CP10k) of the held-out spots, ``(n_spots, n_genes)``.
    all_spots
        The published figure, over training spots, too; None where it was not asked for.
    bins
        Scores at finer bins; None without such bins or without a map.
    """

    task: Task
    held_out: HeldOutSpots
    predicted: NDArray[np.float64]
    genes: GeneScores
    all_spots: float | None
    fitted: FittedMethod
    bins: BinScores | None = None


@dataclass(frozen=True)
class _TaskScorer:
    """Fits and scores methods on one task.

    Parameters
    ----------
    with_all_spots
        Whether the published figure is given for every method, not for ablations alone.
    fitted
        Scores by name of what was fitted: variants that differ in their figure alone share a fit.
    bins
        The fold's bins, if maps are scored at bins, too.
    """

    task: Task
    epochs: int | None
    with_all_spots: bool
    fitted: dict[str, _MethodScore] = field(default_factory=dict)
    bins: HeldOutBins | None = None

    def score(self, method: Method, maps: HeldOutMaps | None = None) -> _MethodScore:
        """Fit on the task's training spots, and score all of its held-out spots; `maps` takes the map, if given."""
        if not isinstance(method, AblationMethod):
            return self._score(method, maps, with_all_spots=self.with_all_spots)
        name = method.fit_name(self.task)
        if name not in self.fitted:
            self.fitted[name] = self._score(method, maps, with_all_spots=True)
        return self.fitted[name]

    def _score(self, method: Method, maps: HeldOutMaps | None, *, with_all_spots: bool) -> _MethodScore:
        task = method.prepare(self.task)
        fitted = method.fit(task, self.epochs)
        sections = task.held_out()
        predicted = np.concatenate([fitted.predict_spots(section) for section, _ in sections]).astype(
            np.float64
        )
        held_out = _held_out_spots(task, sections)
        xy_um = np.concatenate([section.spots.xy_um for section, _ in sections])
        # A model may be anybody's: its number of genes is the one thing that the arithmetic below cannot name.
        if predicted.shape != held_out.truth.shape:
            raise ModelError(
                f"{method.name} predicts {predicted.shape[1]} genes, {held_out.truth.shape[1]} were trained on"
            )
        spots = ScoredSpots(held_out.depth, held_out.section, xy_um)
        genes = score_genes(held_out.truth, predicted, spots, METRICS.records())
        if maps is not None:
            _add_map(maps, task, fitted, genes)
        all_spots = _all_spots(task, fitted) if with_all_spots else None
        at_bins = None if self.bins is None else self.bins.score_method(task, fitted)
        return _MethodScore(task, held_out, predicted, genes, all_spots, fitted, at_bins)


def _check_intervals(method: Method, result: _MethodScore, epochs: int | None) -> dict[str, float]:
    """Return how often intervals from the training part hold on held-out spots, and the share of trusted genes.

    Nothing for methods whose training measures no intervals.
    """
    if not isinstance(method, ModelMethod) or not method.estimator.capabilities.calibrated_by_default:
        return {}
    # On the fold's training part: intervals are measured as `histosge train` would, then met with held-out spots.
    task = result.task
    spots = task.training_spots()
    intervals = calibrate(
        lambda parts: method.fit_sections(parts, task.seed, epochs),
        task.training(),
        widest_spot_um(spots),
        donors=named_donors(spots),
    )
    if intervals is None:
        return {}
    depth = None
    if intervals.strata is not None and isinstance(result.fitted, MapModel):
        depth = np.concatenate([result.fitted.predict_spot_depth(section) for section, _ in task.held_out()])
    # In single precision, as intervals are stored and maps are read.
    truth = result.held_out.truth.astype(np.float32)
    return intervals.scores(truth, result.predicted.astype(np.float32), depth)


def _add_map(maps: HeldOutMaps, task: Task, fitted: FittedMethod, genes: GeneScores) -> None:
    """Add the map of the shown section, if this fold holds out spots of it and the method predicts patches.

    All of its patches are drawn, also those that neither training nor held-out spots may see: no score looks at them.
    """
    slide_id = maps.section.slide_id
    if not task.fold.test[slide_id].any():
        return
    section, target = next(pair for pair in task.all_spots() if pair[0].slide_id == slide_id)
    predicted = fitted.predict_map(section)
    if predicted is not None:
        maps.add(task.fold, FoldPrediction(task.genes, genes.pearson, target, predicted))


def _held_out_spots(task: Task, sections: Sequence[tuple[Section, NDArray[np.float32]]]) -> HeldOutSpots:
    ids = [section.slide_id for section, _ in sections]
    return HeldOutSpots(
        task.fold.name,
        task.seed,
        task.genes,
        np.concatenate([target for _, target in sections]).astype(np.float64),
        np.concatenate([library_size(section.spots) for section, _ in sections]),
        np.concatenate([np.full(len(section.spots), section.slide_id) for section, _ in sections]),
        np.concatenate([np.flatnonzero(task.fold.test[slide_id]) for slide_id in ids]),
    )


def _all_spots(task: Task, fitted: FittedMethod) -> float:
    """Return the published figure: over all spots, those trained on included."""
    sections = task.all_spots()
    truth = np.concatenate([target for _, target in sections])
    predicted = np.concatenate([fitted.predict_spots(section) for section, _ in sections])
    label = np.concatenate([np.full(len(section.spots), section.slide_id) for section, _ in sections])
    return pearson_all_spots(truth, predicted, label)


@dataclass
class _ScoreTable:
    """Collects the rows of scores.csv and genes.csv while fits go by.

    Parameters
    ----------
    n_fits
        How many there will be, for `on_progress`.
    halo_um
        Preset -> how far beyond a patch it looked, at most.
    bin_suffix
        Ends the names of metrics at bins; empty where none are scored.
    """

    split: str
    n_fits: int
    on_progress: OnProgress
    bootstrap: PairedBootstrap
    rows: list[tuple[str, str, str, int, str, float]] = field(default_factory=list)
    genes: list[pl.DataFrame] = field(default_factory=list)
    halo_um: dict[str, float] = field(default_factory=dict)
    done: int = 0
    domains: HeldOutDomains | None = None
    bin_suffix: str = ""

    def report_progress(self, preset: str, task: Task | None) -> None:
        """Report how far it is, before a fit; without a task: at the end."""
        label = f"{preset}, fold {task.fold.name}, seed {task.seed}" if task else "scored"
        self.on_progress(Progress(self.done, self.n_fits, label))

    def add(self, preset: str, result: _MethodScore) -> None:
        """Add the rows of one fit."""
        top = result.task.top_genes()
        values = result.genes.summary(top)
        if result.all_spots is not None:
            values["paper_all_spots"] = result.all_spots
        if result.bins is not None:
            values |= result.bins.values
        key = self.add_rows(preset, result.task, values)
        rows = _gene_rows(key, result.task.genes, result.genes, top)
        self.genes.append(rows.with_columns(self._bin_columns(result.bins)))
        # It may differ from fold to fold: that of the published network follows the distance between spots.
        self.halo_um[preset] = max(result.fitted.halo_um, self.halo_um.get(preset, 0.0))
        self.done += 1

    def add_depth_at_bins(self, scorer: _TaskScorer) -> None:
        """Add what depth alone scores at bins, also where nobody asked for it."""
        # At few counts a gene's logarithm follows the depth most of all.
        fitted = LibrarySizeMethod().fit(scorer.task, scorer.epochs)
        scores = scorer.bins.score_method(scorer.task, fitted) if scorer.bins else None
        if scores is not None:
            self.add_rows(DEPTH, scorer.task, scores.values)

    def _bin_columns(self, bins: BinScores | None) -> list[pl.Series | pl.Expr]:
        """Return the columns of genes.csv at bins, empty where this fit was not scored there."""
        if not self.bin_suffix:
            return []
        names = (f"pearson_{self.bin_suffix}", f"pearson_within_spots_{self.bin_suffix}")
        if bins is None:
            return [pl.lit(None, dtype=pl.Float64).alias(name) for name in names]
        return [
            pl.Series(name, values)
            for name, values in zip(names, (bins.pearson, bins.within_spots), strict=True)
        ]

    def add_domains(self, preset: str, result: _MethodScore, *, with_measured: bool = False) -> None:
        """Add held-out predictions to the domains, where an annotation was given; and what was measured there."""
        if self.domains is None:
            return
        # The seed of a control is its draw, as in its other rows.
        self.domains.add(preset, result.task.seed, result.held_out, result.predicted)
        if with_measured:
            self.domains.add_measured(result.task.seed, result.held_out)

    def score_domains(self) -> pl.DataFrame | None:
        """Return the table of domains, and add its means to the rows; None without an annotation."""
        if self.domains is None:
            return None
        found = self.domains.table()
        self.rows += domain_rows(found)
        return found

    def add_ablation(
        self, method: AblationMethod, result: _MethodScore, on_noise: _MethodScore | None
    ) -> None:
        """Add what the published code would report, and what the same code makes of random embeddings."""
        values = {"as_reported": _reported(method, result)}
        if on_noise is not None:
            values["pearson_mean_on_noise"] = float(on_noise.genes.pearson.mean())
            values["paper_all_spots_on_noise"] = _published_figure(on_noise)
            values["as_reported_on_noise"] = _reported(method, on_noise)
        self.add_rows(method.name, result.task, values)

    def add_rows(self, preset: str, task: Task, values: Mapping[str, float]) -> tuple[str, str, str, int]:
        """Add a row for each value, and return what the rows begin with."""
        key = (preset, self.split, task.fold.name, task.seed)
        self.rows += [(*key, metric, value) for metric, value in values.items()]
        return key


def _reported(method: AblationMethod, result: _MethodScore) -> float:
    return _published_figure(result) if method.reports_all_spots else float(result.genes.pearson.mean())


def _published_figure(result: _MethodScore) -> float:
    return np.nan if result.all_spots is None else result.all_spots


def _gene_rows(
    key: tuple[str, str, str, int], genes: tuple[str, ...], scores: GeneScores, top: NDArray[np.bool_]
) -> pl.DataFrame:
    preset, split, fold, seed = key
    columns = {
        "gene": list(genes),
        "pearson": scores.pearson,
        "pearson_depth_adjusted": scores.pearson_depth_adjusted,
        "pearson_undefined": scores.undefined,
        **{metric.name: values for metric, values in scores.values.items()},
        "top50": top,
    }
    # Literals, not columns of their own: a table of 20 draws repeats each label as often as there are genes.
    labels = [
        pl.lit(preset).alias("preset"),
        pl.lit(split).alias("split"),
        pl.lit(fold).alias("fold"),
        pl.lit(seed, dtype=pl.Int64).alias("seed"),
    ]
    return pl.DataFrame(columns).select(*labels, pl.all())


def _noise_draws(seeds: tuple[int, ...], n_draws: int) -> dict[int, list[int]]:
    """Return seed -> numbers of the draws, `n_draws` at least, that are scored on that seed's folds, in turn."""
    # Shared out among the seeds, so that more seeds do not mean more draws; each seed has one at least.
    draws = range(max(n_draws, len(seeds)))
    return {seed: list(draws[i :: len(seeds)]) for i, seed in enumerate(seeds)}


def _gene_rule(genes: GeneChoice) -> str:
    rule = genes.describe("each fold's training spots")
    return f"{rule}, the same in every fold" if genes.is_given else f"{rule}; no held-out spot was used"


def _count(seed: int, fold: Fold) -> FoldCount:
    return FoldCount(seed, fold.name, fold.n_train, fold.n_test, fold.n_dropped)


def _notes(plan: Plan, halo_um: Mapping[str, float]) -> tuple[str, ...]:
    donors = {section.spots.donor for section in plan.sections}
    n_sections = len(plan.sections)
    notes = [f"{n_sections} section{'s' * (n_sections > 1)} of {len(donors)} donor{'s' * (len(donors) > 1)}."]
    # With one section a donor, leaving out a section leaves out its donor.
    if plan.split != "donor" and not (plan.split == "section" and len(donors) == n_sections):
        notes.append("Training and held-out spots share donors: accuracy on another donor may be lower.")
    # The sections of a fold's training part are of no more donors than all are.
    if len(donors) == 1:
        notes.append(
            f"Intervals and trust (coverage_90, trusted_share) are measured within donor {' '.join(donors)} only."
        )
    # Whoever compares presets must know that some use image patches beyond the spot and others do not.
    wide = [f"{preset} by {halo:.0f} µm" for preset, halo in halo_um.items() if halo > 0]
    if wide and plan.split in INTERLEAVED:
        notes.append(
            f"Some presets look beyond a patch ({', '.join(wide)}), so training uses image patches around"
            " held-out spots, but never their counts."
        )
    if wide and plan.split == "block":
        notes.append(
            f"Some presets look beyond a patch ({', '.join(wide)}). Patches near the border of a block are"
            " used neither for training nor for held-out spots, so the two share no pixel (checked)."
        )
    return tuple(notes)
