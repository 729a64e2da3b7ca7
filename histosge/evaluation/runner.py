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

from collections.abc import Sequence
from dataclasses import replace

import polars as pl

from featurestore.events import OnProgress, ignore_progress
from histosge.data.gene_choice import GeneChoice, GeneSource
from histosge.data.sections import Section
from histosge.errors import HistosgeError
from histosge.evaluation.ablation import Reencode, ablation_names
from histosge.evaluation.annotated_domains import Annotation, HeldOutDomains, domain_notes
from histosge.evaluation.bin_scores import HeldOutBins, bin_suffix
from histosge.evaluation.fine_bins import FineBins
from histosge.evaluation.method_choice import choose_shown, find_methods
from histosge.evaluation.methods import DEPTH, AblationMethod, Method, ModelMethod
from histosge.evaluation.paired_bootstrap import PairedBootstrap, ordered_pairs
from histosge.evaluation.plan_notes import gene_rule, plan_notes
from histosge.evaluation.results import NOISE, SMOOTH_NOISE, FoldCount, Scores
from histosge.evaluation.score_rows import SCORE_SCHEMA, ScoreTable
from histosge.evaluation.shown_maps import EvaluationMaps
from histosge.evaluation.task_scorer import TaskScorer, check_intervals
from histosge.evaluation.tasks import Plan
from histosge.heldout.splits import Fold
from histosge.models.estimators import ModelSource, find_estimator

NOISE_DRAWS = 20
"""Draws of the noise control, at least. With 10, chance alone would raise a false alarm once in fifty."""
SMOOTH_DRAWS = 5
"""Draws of the smooth control, at least: the mean over a draw's features hardly differs from draw to draw, and drawing
smooth fields costs several times what white noise does."""
# It takes a tenth of a second a fit, so that 20 draws on every fold are affordable.
NOISE_PRESET = "ridge"
DEFAULT_GENES = 250


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
    maps = EvaluationMaps(plan.sections, folds, plan.genes.named)
    draws, smooth_draws = _noise_draws(seeds, NOISE_DRAWS), _noise_draws(seeds, SMOOTH_DRAWS)
    n_control = sum(len(some) for some in (*draws.values(), *smooth_draws.values()))
    n_fits = len(folds) * (len(names) * len(seeds) + n_control)
    spots = {section.slide_id: len(section.spots) for section in plan.sections}
    table = ScoreTable(plan.split, n_fits, on_progress, PairedBootstrap(spots))
    table.bin_suffix = bin_suffix(bins.side_um) if bins else ""
    table.domains = HeldOutDomains(plan.sections, annotation, plan.split) if annotation else None
    for task in plan.tasks(seeds):
        # Half of every section is trained on in this split: then the published figure is given for all methods.
        scorer = TaskScorer(task, epochs, with_all_spots=plan.split == "random")
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
                table.add_rows(method.name, result.task, check_intervals(method, result, epochs))
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
        gene_rule=gene_rule(plan.genes),
        folds=tuple(_fold_count(seed, fold) for seed in seeds for fold in plan.folds(seed)),
        maps=maps.drawn(),
        section_maps=maps.packed(),
        notes=(
            *plan_notes(plan, table.halo_um),
            *domain_notes(annotation),
            *maps.notes(),
        ),
        domains=domains,
        differences=table.bootstrap.table(ordered_pairs(names, shown), plan.split),
        kinds={method.name: method.kind for method in methods},
        bootstrap=table.bootstrap,
        bins=bins.facts if bins else None,
    )


def _score_controls(
    table: ScoreTable,
    scorer: TaskScorer,
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
            table.add_rows(SMOOTH_NOISE, result.task, check_intervals(control, result, scorer.epochs))


def _noise_draws(seeds: tuple[int, ...], n_draws: int) -> dict[int, list[int]]:
    """Return seed -> numbers of the draws, `n_draws` at least, that are scored on that seed's folds, in turn."""
    # Shared out among the seeds, so that more seeds do not mean more draws; each seed has one at least.
    draws = range(max(n_draws, len(seeds)))
    return {seed: list(draws[i :: len(seeds)]) for i, seed in enumerate(seeds)}


def _fold_count(seed: int, fold: Fold) -> FoldCount:
    return FoldCount(seed, fold.name, fold.n_train, fold.n_test, fold.n_dropped)
