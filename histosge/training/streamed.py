"""A training that visits sections one after another: whether there is one, and what is saved of it."""

from collections.abc import Sequence
from functools import partial
from typing import cast

from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.wording import counted
from histosge.calibration.wording import adapted_sentence
from histosge.errors import ModelError
from histosge.models.adaptation import describe_change
from histosge.models.protocol import Model, RemarkingModel
from histosge.training.in_memory import train_in_memory
from histosge.training.processes import first_writes, is_first_process, is_launched, wait_for_all
from histosge.training.run import Run, describe_intervals, model_card, report_kept_sums
from histosge.training.saved_model import SavedModel, load_model, save_model
from histosge.training.settings import TrainSettings
from histosge.training.streaming.fit_streamed import (
    STREAM_FROM_BYTES,
    GenesOfSums,
    MeasuredGenes,
    StreamedTraining,
    embedding_bytes,
    fit_adapted,
    fit_from_sums,
    fit_streamed,
    is_attention,
    why_adapted_in_memory,
    why_in_memory,
)
from histosge.training.streaming.open_tasks import open_tasks
from histosge.training.streaming.start import (
    SUMS_WITHOUT_DIFFERENCES,
    Start,
    StartFromWeights,
    new_sections,
)
from histosge.training.streaming.survey import card_sections
from histosge.training.streaming.work_folder import WorkFolder

_STREAMED = "sections are streamed: they are read one after another, and memory does not grow with them"
_TOO_FEW = "too few sections are usable for folds of several: they are held in memory"
_TWO_KINDS_OF_PROCESSES = (
    "torchrun starts processes of its own; leave --workers and --scheduler out, or torchrun"
)


def is_streamed(run: Run, stream: bool | None) -> bool:
    """Decide whether sections are streamed; say why where a large cohort cannot be."""
    settings, is_wanted = run.settings, bool(stream) or run.settings.is_shared_out
    if stream is False and not settings.is_shared_out:
        return False
    n_bytes = (
        0 if is_wanted else embedding_bytes(read_samples(str(run.samples)), run.store, settings.selection)
    )
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
        raise ModelError(_TWO_KINDS_OF_PROCESSES)


def train_streamed(run: Run) -> SavedModel:
    """Fit from sums, section after section; what a run that was interrupted left is used."""
    settings, estimator = run.settings, run.settings.checked()
    run.on_message(_STREAMED)
    is_shared = is_attention(estimator.estimator)
    if not is_first_process():
        # What follows from sums gains nothing from further processes. `attention` does, after the passes of the first.
        if not is_shared:
            return first_writes(partial(train_in_memory, run), partial(load_model, run.model))
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
            loss=settings.loss,
            seed=settings.seed,
            epochs=settings.epochs,
        )
    if found is None:
        run.on_message(_TOO_FEW)
        if is_shared and is_first_process():
            wait_for_all()
        wait_for_all()  # nobody reads the folder any more
        inputs.folder.remove()
        return train_in_memory(run)
    if run.is_calibrated:
        run.on_message(describe_intervals(found.intervals))
    return _save_streamed(run, estimator.name, found, inputs.folder)


def train_adapted(run: Run, start: StartFromWeights, stream: bool | None) -> SavedModel:
    """Adapt an earlier model to the sheet's new sections, streamed by the same rule as a training."""
    settings, new = run.settings, run.unseen_by(start)
    is_wanted = bool(stream) or settings.is_shared_out
    n_bytes = 0 if is_wanted else embedding_bytes(new, run.store, settings.selection)
    if not is_wanted and (stream is False or n_bytes < STREAM_FROM_BYTES):
        return train_in_memory(run, start, new)
    reason = why_adapted_in_memory(start.saved.model, len(new))
    if reason and settings.is_shared_out:
        raise ModelError(
            f"--workers and --scheduler share out new sections that are streamed, and these cannot be: {reason}; leave them "
            "out"
        )
    if settings.is_shared_out and is_launched():
        raise ModelError(_TWO_KINDS_OF_PROCESSES)
    if reason and stream:
        raise ModelError(f"new sections cannot be streamed: {reason}; leave stream out")
    if reason:
        run.on_message(
            f"embeddings of all new sections are held in memory ({n_bytes / 1e9:.1f} GB): {reason}"
        )
        return train_in_memory(run, start, new)
    # What follows from sums gains nothing from further processes.
    return first_writes(partial(_adapt_streamed, run, start, new), partial(load_model, run.model))


def _adapt_streamed(run: Run, start: StartFromWeights, new: Sequence[Sample]) -> SavedModel:
    settings = run.settings
    run.on_message(_STREAMED)
    with open_tasks(settings.workers, settings.scheduler, len(new)) as tasks:
        inputs = run.inputs(new, MeasuredGenes(), tasks, calibrated=run.is_calibrated)
        found = fit_adapted(inputs, start, run.on_message, run.on_progress)
    if found is None:
        run.on_message(_TOO_FEW)
        inputs.folder.remove()
        return train_in_memory(run, start, new)
    if run.is_calibrated:
        run.on_message(describe_intervals(found.intervals))
        if found.intervals is not None:
            run.on_message(adapted_sentence(len(found.cohort.sections)))
    run.on_message(describe_change(found.model))
    return _save_streamed(run, start.saved.card.preset, found, inputs.folder, start)


def train_further(run: Run, start: Start) -> SavedModel:
    """Add the sheet's new sections to the sums of an earlier model."""
    new = new_sections(start, read_samples(str(run.samples)), run.made_with["sections"])
    names = [section.slide_id for section in start.kept.sections]
    run.on_message(
        f"{counted(len(new), 'section')} added to the sums of {len(names)}, which are not read again"
    )
    if start.kept.lacks_differences:
        run.on_message(SUMS_WITHOUT_DIFFERENCES)
    choice = GenesOfSums(0, start.saved.card.genes, str(start.kept.folder.parent))
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
    run: Run,
    preset: str,
    found: StreamedTraining,
    folder: WorkFolder,
    start: Start | StartFromWeights | None = None,
) -> SavedModel:
    first, sections = found.cohort.first, card_sections(found.cohort)
    earlier = () if start is None else start.saved.card.sections
    card = model_card(
        run.settings,
        preset,
        found.genes,
        first.identity,
        first.stored.grid.spec,
        (*earlier, *sections),
        start.facts if isinstance(start, StartFromWeights) else None,
    )
    if isinstance(found.model, RemarkingModel):
        run.on_message(found.model.remark)
    names = [section.slide_id for section in found.cohort.sections]
    kept = start.kept.sections if isinstance(start, Start) else ()
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
    report_kept_sums(run)
    # Only now: a crash while saving must not lose the sums.
    folder.remove()
    return saved
