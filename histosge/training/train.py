"""Sections in a store -> a saved model. Nothing is encoded here: that was done once, before."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from featurestore.encoders.protocol import EncoderIdentity
from featurestore.events import OnMessage, ignore_message
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.store import identity_attrs
from histosge.calibration.conformal import Intervals, calibrate
from histosge.data.genes import MIN_COUNTS
from histosge.data.section_loading import (
    LoadedSection,
    Selection,
    load_sections,
    resolve_genes,
    training_section,
)
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.checkpoint import Checkpoint, training_key
from histosge.models.count_loss import check_loss
from histosge.models.presets.dense import DenseModel
from histosge.models.protocol import Model, RemarkingModel, is_resumable
from histosge.models.registry import DEFAULT_PRESET, load_preset
from histosge.training.saved_model import ModelCard, SavedModel, save_model

DEFAULT_GENES = 1000
SLOW = ("paper",)
"""Presets that take minutes a fit: not calibrated unless asked for."""


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Parameters
    ----------
    preset
        One of `histosge.models.registry.PRESETS`.
    genes
        How many of the most variable genes, or a file that lists them.
    epochs
        For presets that iterate; None means the preset's own.
    seed
        Same seed, same machine: the same model.
    selection
        Grid and encoder.
    intervals
        Whether to calibrate intervals, at the cost of a few more fits; None means all presets but `paper`,
        which takes minutes a fit.
    loss
        Of `dense`: ``mse`` on log1p(CP10k), or ``poisson`` or ``nb`` on counts with library size.
    stains
        Of `dense`: encode some patches of the training slides in other stains, and penalise weights along what
        those move, see `histosge.models.stain_invariance`.
    """

    preset: str = DEFAULT_PRESET
    genes: int | str = DEFAULT_GENES
    epochs: int | None = None
    seed: int = 0
    selection: Selection = field(default_factory=Selection)
    intervals: bool | None = None
    loss: str = "mse"
    stains: bool = False


def train(
    samples: str,
    store: str,
    model: str | Path,
    settings: TrainSettings | None = None,
    *,
    on_message: OnMessage = ignore_message,
) -> SavedModel:
    """Train a model on the sections of a sample sheet and save it.

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
    on_message
        Called with one line on what was found.

    Raises
    ------
    FeatureStoreError
        If the sections, the store or the settings are unusable; nothing is written then.
    """
    settings = settings or TrainSettings()
    preset = load_preset(settings.preset)
    check_loss(settings.loss, settings.preset)
    loaded = load_sections(samples, store, settings.selection, on_message=on_message)
    sections = [item.section for item in loaded]
    genes = resolve_genes(sections, settings.genes)
    training = [training_section(s, genes) for s in sections]
    if settings.stains:
        training = _with_stain_pairs(samples, settings, loaded, training, on_message)

    def fit(some: Sequence[TrainingSection], checkpoint: Checkpoint | None = None) -> Model:
        if settings.loss != "mse":
            return DenseModel.fit(some, seed=settings.seed, loss=settings.loss)
        if checkpoint is not None and is_resumable(preset):
            return preset.fit(some, seed=settings.seed, epochs=settings.epochs, checkpoint=checkpoint)
        return preset.fit(some, seed=settings.seed, epochs=settings.epochs)

    intervals = None
    if settings.intervals if settings.intervals is not None else settings.preset not in SLOW:
        intervals = calibrate(fit, training, max(s.spots.diameter_um for s in sections))
        on_message(_calibrated(intervals))
    card, unfinished = _card(settings, genes, loaded), checkpoint_path(model)
    facts = asdict(card) | {"epochs": settings.epochs, "loss": settings.loss}
    # Only for the final fit: those of the calibration see other sections.
    fitted = fit(training, Checkpoint(unfinished, training_key(facts, training)))
    if isinstance(fitted, RemarkingModel):
        on_message(fitted.remark)
    saved = save_model(model, fitted, card, intervals)
    unfinished.unlink(missing_ok=True)
    return saved


def _with_stain_pairs(
    samples: str,
    settings: TrainSettings,
    loaded: Sequence[LoadedSection],
    training: list[TrainingSection],
    on_message: OnMessage,
) -> list[TrainingSection]:
    from histosge.training.stain_augmentation import PATCHES, STAINS, augment_stains

    if settings.preset != DenseModel.name:
        raise ModelError(f"stains belong to preset 'dense', not {settings.preset!r}; leave --stains out")
    training = augment_stains(read_samples(samples), loaded, training, settings.seed)
    on_message(
        f"{PATCHES} patches of each slide encoded in {STAINS} other stains: what those move is penalised"
    )
    return training


def checkpoint_path(model: str | Path) -> Path:
    """Return where an unfinished training of a model's folder is kept, for presets that iterate."""
    return Path(model).with_name(f".{Path(model).name}.unfinished")


def _calibrated(intervals: Intervals | None) -> str:
    if intervals is None:
        return "no prediction intervals: too few spots to hold some out"
    strata = (
        f" ({len(intervals.strata.half_width)} strata by predicted library size)" if intervals.strata else ""
    )
    return f"{round(100 * intervals.level)} % prediction intervals, calibrated on {intervals.n_spots} held-out spots{strata}"


def _card(settings: TrainSettings, genes: tuple[str, ...], loaded: Sequence[LoadedSection]) -> ModelCard:
    identity: EncoderIdentity = loaded[0].slide.identity
    spec: GridSpec = loaded[0].slide.stored.grid.spec
    return ModelCard(
        preset=settings.preset,
        genes=genes,
        encoder=identity_attrs(identity),
        grid={"mpp": spec.mpp, "patch_px": spec.patch_px, "stride_px": spec.stride_px},
        normalisation={
            "target": "log1p of counts per 10,000",
            "library": "all genes",
            "min_counts": MIN_COUNTS,
        },
        sections=tuple(
            {
                "slide_id": item.section.slide_id,
                "donor": item.section.spots.donor,
                "slide_fingerprint": item.slide.fingerprint,
                "spots": len(item.section.spots),
                "few_counts": item.few_counts,
                "off_tissue": item.off_tissue,
            }
            for item in loaded
        ),
        seed=settings.seed,
    )
