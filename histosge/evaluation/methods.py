"""What stands behind a name in an evaluation: a model, an oracle, or a variant of the published code.

A method fits on a task's training part and predicts held-out spots; how it is scored is not its business.
Names: registered models and ``module:Class`` (`histosge.models.estimators`), ``depth``, and ``paper`` with switches
(`histosge.evaluation.ablation`).

Terms
    oracle   knows something of the held-out spots' counts: shown as a yardstick, never as a model
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from histosge.calibration.conformal import predict_patches
from histosge.data.genes import library_size
from histosge.data.sections import Section, TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.errors import ModelError
from histosge.evaluation.results import BASELINE, MODEL, ORACLE
from histosge.evaluation.tasks import Task
from histosge.models.estimators import NamedEstimator
from histosge.models.library_size import DepthOracle
from histosge.models.protocol import Model

DEPTH = "depth"


class FittedMethod(Protocol):
    """A method after training."""

    @property
    def halo_um(self) -> float:
        """Return how far beyond a patch it looks."""
        ...

    def predict_spots(self, section: Section) -> NDArray[np.float32]:
        """Return log1p(CP10k) of a section's spots, ``(n_spots, n_genes)``."""
        ...

    def predict_map(self, section: Section) -> NDArray[np.float32] | None:
        """Return log1p(CP10k) of a section's patches, ``(n_patches, n_genes)``; None if it predicts no patches."""
        ...


class Method(Protocol):
    """One row of the table of scores."""

    @property
    def name(self) -> str:
        """Return the name in scores.csv."""
        ...

    @property
    def kind(self) -> str:
        """Return what it is, for the report: `MODEL`, or text that begins with `BASELINE`, `ORACLE` or `VARIANT`."""
        ...

    def prepare(self, task: Task) -> Task:
        """Return the task that it is fitted and scored on: a defect may lie in the data that it is given."""
        ...

    def fit(self, task: Task, epochs: int | None) -> FittedMethod:
        """Train on a prepared task's training part."""
        ...


@runtime_checkable
class AblationMethod(Method, Protocol):
    """A method that is also scored on all spots and on random embeddings, to see what a defect does to a figure."""

    @property
    def reports_all_spots(self) -> bool:
        """Tell whether the figure that it would report counts spots that it was trained on."""
        ...

    def fit_name(self, task: Task) -> str:
        """Return a name of what is fitted; methods that share it share one fit of the task."""
        ...


@runtime_checkable
class BinModel(Protocol):
    """A fitted method that can be scored at bins finer than spots: it predicts a map, or needs none."""

    def predict_bins(self, section: Section) -> NDArray[np.float32]:
        """Return log1p(CP10k) of bins, which stand in the place of the section's spots, ``(n_bins, n_genes)``."""
        ...


@dataclass(frozen=True)
class MapModel:
    """A trained model: scored by the map that a user would get."""

    model: Model
    name: str = "model"

    @property
    def halo_um(self) -> float:
        """Return the model's."""
        return self.model.halo_um

    def predict_spots(self, section: Section) -> NDArray[np.float32]:
        """Average the map under each disc."""
        # Not from the mean embedding under a spot, as a ridge is often scored: users get the map.
        return spots_from_patches(section.overlap, self.predict_map(section))

    def predict_bins(self, section: Section) -> NDArray[np.float32]:
        """Average the map over each bin's area."""
        return self.predict_spots(section)

    def predict_spot_depth(self, section: Section) -> NDArray[np.float64]:
        """Predict the log of total counts of a section's spots, ``(n_spots,)``; NaN where the model knows none."""
        _, depth = predict_patches(self.model, section.patches)
        return np.full(len(section.spots), np.nan) if depth is None else section.overlap @ depth

    def predict_map(self, section: Section) -> NDArray[np.float32]:
        """Predict all patches.

        Raises
        ------
        ModelError
            If the model does not return one finite row a patch.
        """
        values = self.model.predict(section.patches)
        # The model may be anybody's: what it did wrong is said here, not by the arithmetic of a metric.
        if values.ndim != 2 or len(values) != len(section.patches):
            raise ModelError(
                f"{self.name} predicts shape {values.shape} for {len(section.patches)} patches: return one row a patch"
            )
        if bad := int((~np.isfinite(values)).sum()):
            raise ModelError(f"{self.name} predicts {bad} of {values.size} values that are not finite")
        return values


@dataclass(frozen=True)
class ModelMethod:
    """A model as `histosge train` would train it.

    Parameters
    ----------
    estimator
        What fits it.
    name
        In scores.csv.
    """

    estimator: NamedEstimator
    # Apart from the estimator's: the noise control is `ridge` under another name.
    name: str

    @property
    def kind(self) -> str:
        """Return whether it is a baseline, and with what it works."""
        baseline = self.estimator.capabilities.baseline
        return f"{BASELINE}: {baseline}" if baseline else MODEL

    def prepare(self, task: Task) -> Task:
        """Return the task as it is."""
        return task

    def fit(self, task: Task, epochs: int | None) -> MapModel:
        """Train the model."""
        return MapModel(self.fit_sections(task.training(), task.seed, epochs), self.name)

    def fit_sections(self, sections: Sequence[TrainingSection], seed: int, epochs: int | None) -> Model:
        """Train on some sections: all of a fold's, or those that calibration leaves in."""
        return self.estimator.fit(sections, seed=seed, epochs=epochs)


@dataclass(frozen=True)
class FittedLibrarySize:
    """The oracle, fitted."""

    oracle: DepthOracle
    halo_um: float = 0.0
    median_depth: float = 1.0
    """Of the training spots."""

    def predict_spots(self, section: Section) -> NDArray[np.float32]:
        """Predict from the spots' own total counts."""
        return self.oracle.predict(library_size(section.spots))

    def predict_bins(self, section: Section) -> NDArray[np.float32]:
        """Predict from the bins' own total counts, scaled so that their median is that of the training spots."""
        # A bin has a hundredth of a spot's counts: the fitted square would be read far beyond where it was fitted.
        depth = library_size(section.spots)
        return self.oracle.predict(depth * (self.median_depth / np.median(depth)))

    def predict_map(self, section: Section) -> None:
        """Return nothing: no patch has counts."""
        return


@dataclass(frozen=True)
class LibrarySizeMethod:
    """Library size alone."""

    name: str = DEPTH
    kind: str = f"{ORACLE}: knows the total counts"

    def prepare(self, task: Task) -> Task:
        """Return the task as it is."""
        return task

    def fit(self, task: Task, epochs: int | None) -> FittedLibrarySize:
        """Fit on the training spots' own totals."""
        # From the spots, not from the training sections: a model must never get at counts, so tasks hand them out
        # apart.
        depth = np.concatenate([library_size(spots) for spots in task.training_spots()])
        target = np.concatenate([section.target for section in task.training()])
        return FittedLibrarySize(DepthOracle.fit(depth, target), median_depth=float(np.median(depth)))
