"""Sections in a store -> a saved model. Nothing is encoded here: that was done once, before."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Literal, cast

from featurestore.earlier_results import MadeWith, is_same_result
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.events import OnMessage, OnProgress, ignore_message, ignore_progress
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.storage.store import identity_attrs
from featurestore.threads import keep_to_own_cores
from histosge.calibration.conformal import Intervals, calibrate, named_donors, widest_spot_um
from histosge.data.gene_choice import GeneChoice, GeneSource
from histosge.data.genes import MIN_COUNTS
from histosge.data.section_loading import (
    LoadedSection,
    Selection,
    load_sections,
    training_section,
)
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.checkpoint import Checkpoint, training_key
from histosge.models.encoder_average import EncoderAverage
from histosge.models.estimators import ModelSource, NamedEstimator, check_numbers, find_estimator
from histosge.models.protocol import SQUARED_ERROR, Model, RemarkingModel
from histosge.models.registry import DEFAULT_PRESET
from histosge.models.training_device import training_device
from histosge.reporting.page import is_page_there
from histosge.threads import one_blas_thread
from histosge.training.kept_sums import KeptSection, KeptSums, SumsToKeep, sums_in_memory
from histosge.training.made_with import (
    describe_genes,
    describe_preset,
    describe_sections,
    describe_settings,
)
from histosge.training.processes import first_writes, is_first_process, is_launched, joined, wait_for_all
from histosge.training.report import write_training_report
from histosge.training.saved_model import (
    ModelCard,
    SavedModel,
    check_model_place,
    load_model,
    read_made_with,
    save_model,
)
from histosge.training.streaming.fit_streamed import (
    STREAM_FROM_BYTES,
    StreamedInputs,
    StreamedTraining,
    embedding_bytes,
    fit_from_sums,
    fit_streamed,
    is_attention,
    why_in_memory,
)
from histosge.training.streaming.open_tasks import open_tasks
from histosge.training.streaming.section_tasks import SectionTasks
from histosge.training.streaming.start import Start, new_sections, open_start
from histosge.training.streaming.survey import card_sections
from histosge.training.streaming.work_folder import WorkFolder

DEFAULT_GENES = 1000


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Parameters
    ----------
    preset
        A registered name, ``module:Class``, a model class, or an object whose ``fit(sections, *, seed, epochs)``
        returns a fitted model; see `histosge.models.protocol.Model`. None means `DEFAULT_PRESET`, or that of the model
        which a training goes on from.
    genes
        How many of the most variable genes, ``all``, ``seurat_v3:N`` (the N most variable in excess of the trend over
        the mean), ``N+A,B`` (the N most variable and the named ones), a file with one gene a line, or gene names. None
        means `DEFAULT_GENES`, or those of the model which a training goes on from.
    epochs
        For models that iterate; None means the model's own.
    seed
        Same seed, same machine: the same model.
    selection
        Grid and encoder. With further encoders in `Selection.others`, a model is fitted to each and their predictions
        are averaged.
    intervals
        Whether to calibrate intervals, at the cost of up to four more fits; None means as the model says: all of
        ours but `paper`, which takes minutes a fit.
    loss
        One that the model has: ``mse`` on log1p(CP10k); `dense` also has ``poisson`` and ``nb`` on counts with
        library size.
    stains
        Encode some patches of the training slides in other stains, for models that use such pairs (`dense`): it
        penalises weights along what those move, see `histosge.models.stain_invariance`.
    workers
        Stream the sections, and share them out among so many processes of this machine; ``auto`` for one per core. No
        part of what a model is made with: its bits do not depend on it.
    scheduler
        Instead, the address of a running dask scheduler, whose workers see the same store and expression files.
    """

    # None and not the default itself: `dense` that is asked for must not pass for a preset that was left out.
    preset: ModelSource | None = None
    genes: GeneSource | None = None
    epochs: int | None = None
    seed: int = 0
    selection: Selection = field(default_factory=Selection)
    intervals: bool | None = None
    loss: str = SQUARED_ERROR
    stains: bool = False
    workers: int | Literal["auto"] | None = None
    scheduler: str | None = None

    @property
    def is_shared_out(self) -> bool:
        """Whether sections are worked on by other processes."""
        return self.workers is not None or self.scheduler is not None

    def with_defaults(self) -> "TrainSettings":
        """Return these settings with the defaults of a new training where preset or genes are None."""
        preset = DEFAULT_PRESET if self.preset is None else self.preset
        return replace(self, preset=preset, genes=DEFAULT_GENES if self.genes is None else self.genes)

    def checked(self) -> NamedEstimator:
        """Return what fits the model.

        Raises
        ------
        ModelError
            If it cannot do what the settings want, before any data is loaded.
        """
        estimator = find_estimator(DEFAULT_PRESET if self.preset is None else self.preset)
        estimator.check_loss(self.loss)
        if self.stains and self.selection.others:
            raise ModelError("--stains takes one encoder; leave it out, or name one --encoder")
        if self.stains and not estimator.capabilities.takes_stain_pairs:
            raise ModelError(f"preset {estimator.name!r} takes no stain pairs; leave --stains out")
        check_numbers(self.epochs, self.seed)
        return estimator

    @property
    def gene_choice(self) -> GeneChoice:
        """Which genes."""
        return GeneChoice.parse(DEFAULT_GENES if self.genes is None else self.genes)


@one_blas_thread()
@joined()
def train(
    samples: str | Path,
    store: str | Path,
    model: str | Path,
    settings: TrainSettings | None = None,
    *,
    report: str | Path | None = None,
    overwrite: bool = False,
    force: bool = False,
    stream: bool | None = None,
    start_from: str | Path | None = None,
    keep_sums: bool = True,
    device: str = "auto",
    on_message: OnMessage = ignore_message,
    on_progress: OnProgress = ignore_progress,
) -> SavedModel:
    """Train a model on the sections of a sample sheet and save it.

    A large cohort is streamed where the model is fitted from sums (`dense` and `ridge`): sections are read one after
    another, and memory does not grow with them. The result is the same up to rounding.

    A model that is there, made with the same settings and inputs, is returned as it is. The same means up to rounding:
    the number of threads, and the order of the sheet's rows, do not count.

    Parameters
    ----------
    samples
        A sample sheet whose rows name expression.
    store
        The feature store that holds their embeddings.
    model
        Folder to write.
    settings
        Preset, genes, epochs, seed.
    report
        A page (HTML) to write on the model; None for none.
    overwrite
        Train in any case, and replace a model and a page that are there; they stay until the new ones are complete.
    force
        Train also on spots that do not fit their slide, with a warning, see `histosge.data.alignment_check`.
    stream
        Whether to stream; None means where embeddings of all sections would take more than
        `histosge.training.streaming.fit_streamed.STREAM_FROM_BYTES`.
    start_from
        A saved `dense` or `ridge` that keeps its sums: the sheet's further sections are added to them, exactly, and
        the old ones are not read. Its genes, patterns of genes, weights of scales, intervals and trust stay.
    keep_sums
        Whether the model keeps the sums that it was fitted from, in ``stats/`` of its folder, where it has any.
    device
        Where networks are trained (`attention`, `paper`): ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
    on_message
        Called with one line on what was found.
    on_progress
        Called while sections are streamed, a section and pass a step.

    Raises
    ------
    EarlierResultError
        If a model or a page is there that was made with something else, and `overwrite` is not set.
    FeatureStoreError
        If the sections, the store or the settings are unusable; nothing is written then.
    """
    settings = settings or TrainSettings()
    keep_to_own_cores()
    start = None if start_from is None else open_start(start_from)
    settings = settings.with_defaults() if start is None else settings_of(start, settings, str(start_from))
    # All that can be refused is refused here: loading a cohort takes minutes.
    settings.checked()
    check_model_place(model)
    made_with = describe_training(samples, store, settings)
    if start is not None:
        made_with = {**made_with, "from": start.saved.fingerprint}
    page = None if report is None else Path(report)
    if page is not None and is_page_there(page, made_with, overwrite=overwrite):
        page = None  # whole already, of this very model
    saved = _find_finished(model, made_with, settings, overwrite=overwrite)
    if saved is None:
        run = _Run(samples, store, model, settings, made_with, on_message, on_progress, force, keep_sums)
        with training_device(device):
            if start is not None:
                # What follows from sums gains nothing from further processes.
                saved = first_writes(partial(_train_further, run, start), partial(load_model, model))
            else:
                saved = _train_streamed(run) if _is_streamed(run, stream) else _train(run)
    if page is not None and is_first_process():
        write_training_report(saved, page, made_with)
    return saved


@dataclass(frozen=True)
class _Run:
    """The arguments of `train` that its two ways share."""

    samples: str | Path
    store: str | Path
    model: str | Path
    settings: TrainSettings
    made_with: MadeWith
    on_message: OnMessage
    on_progress: OnProgress
    force: bool
    keep_sums: bool

    def inputs(
        self, samples: Sequence[Sample], choice: GeneChoice, tasks: SectionTasks, *, calibrated: bool
    ) -> StreamedInputs:
        """Return what a streamed training works on; its work folder is made."""
        return StreamedInputs(
            samples,
            str(self.store),
            self.settings.selection,
            choice,
            WorkFolder.open(self.model, self.made_with),
            calibrated,
            self.force,
            tasks,
        )

    def writing(
        self, sums: SumsToKeep | None, sections: Sequence[str], earlier: Sequence[KeptSection] = ()
    ) -> Callable[[Path], None] | None:
        """Return what writes the sums beside the model; None if they are not kept."""
        if sums is None or not self.keep_sums:
            return None
        facts = self.made_with["sections"]
        kept = [KeptSection(name, facts[name]["slide"], facts[name]["expression"]) for name in sections]
        return partial(sums.write, sections=[*earlier, *kept])

    @property
    def is_calibrated(self) -> bool:
        """Whether intervals are measured."""
        wanted = self.settings.intervals
        return self.settings.checked().capabilities.calibrated_by_default if wanted is None else wanted


def _is_streamed(run: _Run, stream: bool | None) -> bool:
    """Decide whether sections are streamed; say why where a large cohort cannot be."""
    settings, is_wanted = run.settings, bool(stream) or run.settings.is_shared_out
    if stream is False and not settings.is_shared_out:
        return False
    n_bytes = 0 if is_wanted else embedding_bytes(run.samples, run.store, settings.selection)
    if not is_wanted and n_bytes < STREAM_FROM_BYTES:
        return False
    reason = why_in_memory(
        settings.checked().estimator,
        len(read_samples(str(run.samples))),
        settings.selection,
        settings.loss,
        stains=settings.stains,
        calibrated=run.is_calibrated,
    )
    if settings.is_shared_out:
        _check_shared_out(settings, reason)
    if reason and stream:
        raise ModelError(f"sections cannot be streamed: {reason}; leave stream out")
    if reason:
        run.on_message(f"embeddings of all sections are held in memory ({n_bytes / 1e9:.1f} GB): {reason}")
    return not reason


def _check_shared_out(settings: TrainSettings, reason: str) -> None:
    """Refuse workers for a training that they cannot share.

    Parameters
    ----------
    reason
        Why it cannot be streamed; empty if it can.
    """
    if is_attention(settings.checked().estimator):
        raise ModelError(
            "--workers and --scheduler share out sections for dense and ridge; several processes train attention with: "
            "torchrun --nproc-per-node N -m histosge_cli train ..."
        )
    if reason:
        raise ModelError(
            f"--workers and --scheduler share out sections that are streamed, and these cannot be: {reason}; leave them out"
        )
    if is_launched():
        raise ModelError(
            "torchrun starts processes of its own; leave --workers and --scheduler out, or torchrun"
        )


def _train_streamed(run: _Run) -> SavedModel:
    """Fit from sums, section after section; what a run that was interrupted left is used."""
    settings, estimator = run.settings, run.settings.checked()
    run.on_message(
        "sections are streamed: they are read one after another, and memory does not grow with them"
    )
    is_shared = is_attention(estimator.estimator)
    if not is_first_process():
        # What follows from sums gains nothing from further processes. `attention` does, after the passes of the first.
        if not is_shared:
            return first_writes(partial(_train, run), partial(load_model, run.model))
        wait_for_all()
    choice = settings.gene_choice
    samples = read_samples(str(run.samples))
    with open_tasks(settings.workers, settings.scheduler, len(samples)) as tasks:
        inputs = run.inputs(samples, choice, tasks, calibrated=run.is_calibrated)
        found = fit_streamed(
            inputs,
            cast(type[Model], estimator.estimator),
            run.on_message,
            run.on_progress,
            seed=settings.seed,
            epochs=settings.epochs,
        )
    if found is None:
        run.on_message("too few sections are usable for folds of several: they are held in memory")
        if is_shared and is_first_process():
            wait_for_all()
        wait_for_all()  # nobody reads the folder any more
        inputs.folder.remove()
        return _train(run)
    if run.is_calibrated:
        run.on_message(_calibrated(found.intervals))
    return _save_streamed(run, estimator.name, found, inputs.folder)


def _train_further(run: _Run, start: Start) -> SavedModel:
    """Add the sheet's new sections to the sums of an earlier model."""
    new = new_sections(start, read_samples(str(run.samples)), run.made_with["sections"])
    names = [section.slide_id for section in start.kept.sections]
    run.on_message(f"{len(new)} sections are added to the sums of {len(names)}, which are not read again")
    choice = GeneChoice.parse(start.saved.card.genes)
    with open_tasks(run.settings.workers, run.settings.scheduler, len(new)) as tasks:
        inputs = run.inputs(new, choice, tasks, calibrated=False)
        found = fit_from_sums(inputs, start, run.on_message, run.on_progress)
    if found.covered is not None and found.intervals is not None:
        share, n_spots = found.covered
        run.on_message(
            f"{round(100 * found.intervals.level)} % prediction intervals and trust stay those of the earlier model; its "
            f"intervals cover {share:.0%} of the values of {n_spots} spots of the new sections, predicted before they were "
            "added"
        )
    return _save_streamed(run, start.saved.card.preset, found, inputs.folder, start)


def _save_streamed(
    run: _Run, preset: str, found: StreamedTraining, folder: WorkFolder, start: Start | None = None
) -> SavedModel:
    first, sections = found.cohort.first, card_sections(found.cohort)
    earlier = () if start is None else start.saved.card.sections
    card = _card(
        run.settings, preset, found.genes, first.identity, first.stored.grid.spec, (*earlier, *sections)
    )
    if isinstance(found.model, RemarkingModel):
        run.on_message(found.model.remark)
    names = [section.slide_id for section in found.cohort.sections]
    kept = () if start is None else start.kept.sections
    write = partial(
        save_model,
        run.model,
        found.model,
        card,
        found.intervals,
        made_with=run.made_with,
        also=run.writing(found.sums, names, kept),
    )
    # A training that goes on from a model runs in the first process alone.
    saved = write() if start is not None else first_writes(write, partial(load_model, run.model))
    _tell_kept(run)
    # Only now: a crash while saving must not lose the sums.
    folder.remove()
    return saved


def _tell_kept(run: _Run) -> None:
    kept = KeptSums.open(run.model)
    if kept is not None:
        run.on_message(
            f"sums for further sections: {kept.n_bytes / 1e6:.1f} MB in {kept.folder} (--from; --no-stats leaves them out)"
        )


def _train(run: _Run) -> SavedModel:
    """Fit to all sections in memory."""
    samples, store, model, settings = run.samples, run.store, run.model, run.settings
    on_message = run.on_message
    estimator, choice = settings.checked(), settings.gene_choice
    loaded = load_sections(
        str(samples), str(store), settings.selection, force=run.force, on_message=on_message
    )
    # By id: sums over sections are rounded, so that another order of the sheet's rows would change the last bits.
    loaded.sort(key=lambda item: item.section.slide_id)
    sections = [item.section for item in loaded]
    genes = choice.choose([section.spots for section in sections])
    training = [training_section(s, genes) for s in sections]
    if settings.stains:
        training = _with_stain_pairs(str(samples), settings, loaded, training, on_message)

    first = loaded[0].slide
    dims = [first.identity.dim - sum(s.identity.dim for s in first.others)]
    dims += [slide.identity.dim for slide in first.others]

    def fit(some: Sequence[TrainingSection], checkpoint: Checkpoint | None = None) -> Model:
        fit_any = partial(EncoderAverage.fit_each, dims=dims) if len(dims) > 1 else NamedEstimator.fit
        return fit_any(
            estimator,
            some,
            seed=settings.seed,
            epochs=settings.epochs,
            loss=settings.loss,
            checkpoint=checkpoint,
        )

    intervals = None
    if run.is_calibrated:
        spots = [s.spots for s in sections]
        # A buffer as wide as the widest spot: held-out discs of no section may touch those trained on.
        intervals = calibrate(fit, training, widest_spot_um(spots), donors=named_donors(spots))
        on_message(_calibrated(intervals))
    spec = first.stored.grid.spec
    card = _card(settings, estimator.name, genes, first.identity, spec, _card_sections(loaded))
    unfinished = checkpoint_path(model)
    # What decides the result beside the data: with any of it changed, a checkpoint must not be gone on from.
    facts = asdict(card) | {"epochs": settings.epochs, "loss": settings.loss}
    # Only for the final fit: those of the calibration see other sections.
    checkpoint = Checkpoint(unfinished, training_key(facts, training))
    fitted = fit(training, checkpoint)
    # A model may have decided something by itself, such as leaving a part of it out.
    if isinstance(fitted, RemarkingModel):
        on_message(fitted.remark)
    # The checkpoint goes only now: a crash while saving must not lose the training.
    named = estimator.saved_name(fitted.models[0] if isinstance(fitted, EncoderAverage) else fitted)
    write = partial(
        save_model,
        model,
        fitted,
        replace(card, preset=named),
        intervals,
        made_with=run.made_with,
        also=run.writing(
            sums_in_memory(fitted, training, settings.loss) if run.keep_sums else None,
            [section.slide_id for section in sections],
        ),
    )
    saved = first_writes(write, partial(load_model, model, settings.preset if ":" in named else None))
    _tell_kept(run)
    for path in (unfinished, *(checkpoint.numbered(i).path for i in range(len(dims)))):
        path.unlink(missing_ok=True)
    return saved


def settings_of(start: Start, settings: TrainSettings, origin: str) -> TrainSettings:
    """Return the settings of a training that goes on from a model: its preset and genes.

    Raises
    ------
    ModelError
        If others are given.
    """
    card = start.saved.card
    if settings.preset is not None and (wanted := find_estimator(settings.preset).name) != card.preset:
        raise ModelError(
            f"{origin} is a model of preset {card.preset!r}, which stays, and {wanted!r} was given; leave --preset out, or "
            "train without --from"
        )
    if settings.genes is not None:
        raise ModelError(f"{origin} predicts {len(card.genes)} genes, which stay; leave --genes out")
    if settings.loss != SQUARED_ERROR or settings.stains or settings.selection.others:
        raise ModelError(
            "sums are of squared errors and one encoder; leave --loss, --stains and further --encoder out, or train "
            "without --from"
        )
    return replace(settings, preset=card.preset, genes=card.genes)


def describe_training(samples: str | Path, store: str | Path, settings: TrainSettings) -> MadeWith:
    """Return what a model is made with: settings, and fingerprints of encoder, grid, slides and expression."""
    settings = settings.with_defaults()
    assert settings.preset is not None
    assert settings.genes is not None
    own = {"preset": describe_preset(settings.preset), "genes": describe_genes(settings.genes)}
    made_with = describe_settings(settings, **own)
    # Who works on the sections changes no bit, and models of earlier versions do not record it.
    del made_with["workers"], made_with["scheduler"]
    return made_with | describe_sections(samples, store, settings.selection)


def _find_finished(
    model: str | Path, made_with: MadeWith, settings: TrainSettings, *, overwrite: bool
) -> SavedModel | None:
    """Return the model that is there if it is the one that is wanted; None if it has to be trained."""
    folder = Path(model)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not is_same_result(folder, read_made_with(folder), made_with, overwrite=overwrite):
        return None
    # An object's own fit returned some other class, which its card names.
    named = settings.preset if isinstance(settings.preset, type) or ":" in str(settings.preset) else None
    try:
        return replace(load_model(folder, named), was_there=True)
    except ModelError as error:
        raise ModelError(f"{error}, with --overwrite") from error


def _with_stain_pairs(
    samples: str,
    settings: TrainSettings,
    loaded: Sequence[LoadedSection],
    training: list[TrainingSection],
    on_message: OnMessage,
) -> list[TrainingSection]:
    # Here, since it loads slide readers and encoders, which training does not need otherwise.
    from histosge.training.stain_augmentation import PATCHES, STAINS, augment_stains

    training = augment_stains(read_samples(samples), loaded, training, settings.seed)
    on_message(
        f"{PATCHES} patches of each slide encoded in {STAINS} other stains: weights along what those change are "
        "penalised"
    )
    return training


def checkpoint_path(model: str | Path) -> Path:
    """Return where an unfinished training of a model's folder is kept, for presets that iterate."""
    # Beside the folder, not in it: a model's folder appears whole or not at all.
    return Path(model).with_name(f".{Path(model).name}.unfinished")


def _calibrated(intervals: Intervals | None) -> str:
    if intervals is None:
        return "no prediction intervals: too few spots to hold some out"
    level, strata = round(100 * intervals.level), intervals.strata
    by_size = f" ({len(strata.half_width)} strata by predicted library size)" if strata else ""
    return f"{level} % prediction intervals, calibrated on {intervals.n_spots} held-out spots{by_size}; {intervals.claim}"


def _card(
    settings: TrainSettings,
    preset: str,
    genes: tuple[str, ...],
    identity: EncoderIdentity,
    spec: GridSpec,
    sections: tuple[dict[str, object], ...],
) -> ModelCard:
    # All sections share encoder and grid: loading has checked that.
    return ModelCard(
        preset=preset,
        genes=genes,
        encoder=identity_attrs(identity),
        grid=asdict(spec),
        normalisation={
            "target": "log1p of counts per 10,000",
            "library": "all genes",
            "min_counts": MIN_COUNTS,
        },
        sections=sections,
        seed=settings.seed,
    )


def _card_sections(loaded: Sequence[LoadedSection]) -> tuple[dict[str, object], ...]:
    return tuple(
        {
            "slide_id": item.section.slide_id,
            "donor": item.section.spots.donor,
            "slide_fingerprint": item.slide.fingerprint,
            "spots": len(item.section.spots),
            "few_counts": item.n_under_min_counts,
            "off_tissue": len(item.uncovered),
        }
        for item in loaded
    )
