"""What is trained and how, as a user gives it, and the record by which the same is known again."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from featurestore.earlier_results import MadeWith
from histosge.data.gene_choice import GeneChoice, GeneSource
from histosge.data.section_loading import (
    Selection,
)
from histosge.errors import ModelError
from histosge.models.estimators import ModelSource, NamedEstimator, check_numbers, find_estimator
from histosge.models.protocol import SQUARED_ERROR
from histosge.models.registry import DEFAULT_PRESET
from histosge.training.made_with import (
    describe_genes,
    describe_preset,
    describe_sections,
    describe_settings,
)
from histosge.training.streaming.start import Start, StartFromWeights

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


def settings_of(start: Start | StartFromWeights, settings: TrainSettings, origin: str) -> TrainSettings:
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
            "--from goes on with squared errors and one encoder; leave --loss, --stains and further --encoder out, or train "
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
