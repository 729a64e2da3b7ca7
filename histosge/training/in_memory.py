"""A training whose sections are all in memory."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from featurestore.events import OnMessage
from featurestore.slides.sample_sheet import Sample, read_samples
from histosge.calibration.conformal import calibrate, widest_spot_um
from histosge.calibration.wording import adapted_sentence
from histosge.data.genes import shared_genes
from histosge.data.section_loading import (
    LoadedSection,
    load_sections,
    training_section,
)
from histosge.data.sections import TrainingSection
from histosge.heldout.donors import named_donors
from histosge.models.adaptation import Adaptation, describe_change
from histosge.models.checkpoint import Checkpoint, training_key
from histosge.models.encoder_average import EncoderAverage
from histosge.models.estimators import NamedEstimator
from histosge.models.protocol import Model, RemarkingModel
from histosge.training.kept_sums import sums_in_memory
from histosge.training.processes import first_writes
from histosge.training.run import Run, describe_intervals, model_card, report_kept_sums
from histosge.training.saved_model import SavedModel, load_model, save_model
from histosge.training.settings import TrainSettings
from histosge.training.streaming.start import StartFromWeights


def train_in_memory(
    run: Run, start: StartFromWeights | None = None, new: Sequence[Sample] = ()
) -> SavedModel:
    """Fit to all sections in memory, and save the model.

    Parameters
    ----------
    start
        A model that is adapted to those sections of the sheet that it has not seen.
    new
        These sections.
    """
    samples, store, model, settings = run.samples, run.store, run.model, run.settings
    on_message = run.on_message
    estimator, choice = settings.checked(), settings.gene_choice
    among = None if start is None else [sample.slide_id for sample in new]
    loaded = load_sections(
        str(samples), str(store), settings.selection, among=among, force=run.force, on_message=on_message
    )
    # By id: sums over sections are rounded, so that another order of the sheet's rows would change the last bits.
    loaded.sort(key=lambda item: item.section.slide_id)
    sections = [item.section for item in loaded]
    if start is None:
        genes = choice.choose([section.spots for section in sections])
    else:
        genes, columns = start.common_genes(shared_genes([section.spots for section in sections]), on_message)
        estimator = replace(estimator, estimator=Adaptation(start.saved.model, columns), is_named=True)
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
        on_message(describe_intervals(intervals))
        if start is not None and intervals is not None:
            on_message(adapted_sentence(len(sections)))
    earlier, origin = ((), None) if start is None else (start.saved.card.sections, start.facts)
    card = model_card(
        settings,
        estimator.name,
        genes,
        first.identity,
        first.stored.grid.spec,
        (*earlier, *_card_sections(loaded)),
        origin,
    )
    unfinished = checkpoint_path(model)
    # What decides the result beside the data: with any of it changed, a checkpoint must not be gone on from.
    facts = asdict(card) | {"epochs": settings.epochs, "loss": settings.loss}
    # Only for the final fit: those of the calibration see other sections.
    checkpoint = Checkpoint(unfinished, training_key(facts, training))
    fitted = fit(training, checkpoint)
    # A model may have decided something by itself, such as leaving a part of it out.
    if isinstance(fitted, RemarkingModel):
        on_message(fitted.remark)
    if start is not None:
        on_message(describe_change(fitted))
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
            # Sums of residuals of another model are none that sections could be added to.
            sums_in_memory(fitted, training, settings.loss) if run.keep_sums and start is None else None,
            [section.slide_id for section in sections],
        ),
    )
    saved = first_writes(write, partial(load_model, model, settings.preset if ":" in named else None))
    report_kept_sums(run)
    for path in (unfinished, *(checkpoint.numbered(i).path for i in range(len(dims)))):
        path.unlink(missing_ok=True)
    return saved


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
