"""Condition a model on spots measured on the slide that is predicted.

The model's residuals at the spots are interpolated between them (`models.residual_kriging`), and the map is rescaled so
that the patches under each disc have the rate estimated for its spot (`spot_rescaling`). Any saved model can be
conditioned.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from featurestore.wording import counted
from histosge.calibration.wording import trained_on_sentence
from histosge.data.genes import SCALE, library_size, select_target
from histosge.data.section_loading import load_section
from histosge.data.sections import Patches, Section, TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.errors import ModelError
from histosge.models.empirical_bayes import posterior_rates
from histosge.models.low_rank_targets import FLOOR_SHARE, soft_floor
from histosge.models.multiscale import HALO_UM
from histosge.models.protocol import Model
from histosge.models.residual_kriging import ResidualKriging
from histosge.prediction.spot_rescaling import RateFactors
from histosge.training.saved_model import SavedModel

MIN_SPOTS = 20
"""With fewer, neither the residuals' patterns nor the share of them to add can be estimated."""
# Memory holds the predictions of this many rows and their halo, not of the slide.
_ROWS_AT_ONCE = 16


@dataclass(frozen=True)
class ConditionedModel:
    """A model of one slide: a saved model, its interpolated residuals, and factors under measured discs.

    Parameters
    ----------
    model
        Predicts all genes from embeddings.
    columns
        The genes that were measured; the others stay as `model` predicts them.
    residual, factors
        Of the measured genes.
    floor
        Values of the measured genes below which `soft_floor` applies, ``(n_measured,)``.
    spot_rates
        Posterior mean rate of each spot per 10,000, ``(n_spots, n_measured)``: the mean of the map over its disc.
    fingerprint
        Of the spots.
    """

    model: Model
    columns: NDArray[np.int64]
    residual: ResidualKriging
    factors: RateFactors
    floor: NDArray[np.float32]
    spot_rates: NDArray[np.float64]
    fingerprint: str

    @property
    def halo_um(self) -> float:
        """Return the larger halo of the model and of the residuals."""
        return max(self.model.halo_um, HALO_UM)

    @classmethod
    def fit(cls, saved: SavedModel, section: Section) -> Self:
        """Condition a model on a section's spots.

        Raises
        ------
        ModelError
            If there are fewer than `MIN_SPOTS` usable spots, or they measured none of the model's genes.
        """
        columns, genes = _measured_genes(saved, section)
        overlap, model = section.overlap, saved.model
        covered = CoveredPatches.from_overlap(section.patches, overlap)
        # Only patches under discs are predicted: all that fitting needs, and far fewer than the slide has.
        log_covered = covered.predict(model.predict, model.halo_um)[:, columns]
        predicted = spots_from_patches(covered.overlap, log_covered)
        target, library = select_target(section.spots, genes), library_size(section.spots)
        measured = TrainingSection(section.patches, overlap, section.spots.xy_um, target, library)
        residual, out_of_fold = ResidualKriging.fit_out_of_fold([measured], [predicted])
        floor = (FLOOR_SHARE * target.mean(axis=0)).astype(np.float32)
        # The prior of a spot's rate must not know its counts: its residual is the one interpolated from other spots.
        rate = np.expm1(soft_floor(predicted + out_of_fold[0], floor).astype(np.float64))
        counts = np.rint(np.expm1(target.astype(np.float64)) * (library / SCALE)[:, None])
        spot_rates = posterior_rates(counts, library / SCALE, rate)
        added = covered.predict(residual, HALO_UM)
        # Residuals first: the factors are those that are still needed on top of them.
        factors = RateFactors.solve(
            section.patches, overlap, soft_floor(log_covered + added, floor), spot_rates
        )
        # What decides the conditioning, beside the model: part of the map's identity.
        digest = hashlib.sha256(target.tobytes() + section.spots.xy_um.tobytes()).hexdigest()
        return cls(model, columns, residual, factors, floor, spot_rates, digest)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        log_patches = self.model.predict(patches)
        # In the order of `fit`: residuals, floor, factors.
        measured = soft_floor(log_patches[:, self.columns] + self.residual(patches), self.floor)
        log_patches[:, self.columns] = self.factors.apply(patches, measured)
        return log_patches


@dataclass(frozen=True)
class CoveredPatches:
    """The patches under measured discs.

    Parameters
    ----------
    patches
        All of the slide.
    index
        Which of them are covered, in ascending order.
    overlap
        With these alone as columns, ``(n_spots, n_covered)``.
    """

    patches: Patches
    index: NDArray[np.int64]
    overlap: sparse.csr_matrix

    @classmethod
    def from_overlap(cls, patches: Patches, overlap: sparse.csr_matrix) -> Self:
        """Take the patches with a share in any spot's disc."""
        index = np.unique(overlap.indices).astype(np.int64)
        return cls(patches, index, sparse.csr_matrix(overlap[:, index]))

    def predict(
        self, predict: Callable[[Patches], NDArray[np.float32]], halo_um: float
    ) -> NDArray[np.float32]:
        """Predict them, ``(n_covered, n_genes)``, a band of rows with its halo at a time."""
        rows, halo = self.patches.rows, int(np.ceil(halo_um / self.patches.stride_um))
        band = rows[self.index] // _ROWS_AT_ONCE
        out: NDArray[np.float32] | None = None
        for number in np.unique(band):
            first, last = number * _ROWS_AT_ONCE - halo, (number + 1) * _ROWS_AT_ONCE + halo
            near = np.flatnonzero((rows >= first) & (rows < last))
            in_band = band == number
            values = predict(self.patches.take(near))[np.searchsorted(near, self.index[in_band])]
            # Only now is the number of genes known.
            if out is None:
                out = np.empty((len(self.index), values.shape[1]), np.float32)
            out[in_band] = values
        return np.empty((0, 0), np.float32) if out is None else out


def load_conditioned(
    store: Store,
    saved: SavedModel,
    sample: Sample,
    selection: tuple[str | None, str | None],
    on_message: Callable[[str], None],
    *,
    force: bool = False,
) -> ConditionedModel:
    """Read a slide's spots and condition a model on them.

    Parameters
    ----------
    sample
        The slide, and the file with its spots.
    selection
        Grid and encoder; None where the store holds only one.
    on_message
        Called with one line on the spots, one if they may not fit the slide, and one if the model was trained on it.
    force
        Take spots that do not fit the slide, with a warning.

    Raises
    ------
    ExpressionError
        If the spots cannot be read, or do not fit the slide (unless `force`).
    ModelError
        If there are too few of them, or they measured none of the model's genes.
    """
    loaded = load_section(sample, store, *selection, force=force)
    if loaded.alignment.verdict == "warn":
        on_message(f"{sample.slide_id}: {loaded.alignment.message}")
    model = ConditionedModel.fit(saved, loaded.section)
    if saved.was_trained_on(loaded.slide.fingerprint):
        on_message(
            f"{sample.slide_id}: {trained_on_sentence(True)} Its residuals are smaller than on a new slide, and less of "
            "the spots is added than would be right."
        )
    shares = ", ".join(f"{share:.2f}" for share in model.residual.blend)
    on_message(
        f"{sample.slide_id}: conditioned on {counted(len(loaded.section.spots), 'spot')} and {len(model.columns)} of "
        f"{len(saved.card.genes)} genes ({loaded.n_under_min_counts} spots with too few counts and "
        f"{len(loaded.uncovered)} off tissue "
        f"left out); share of each residual pattern that is added: {shares}"
    )
    return model


def _measured_genes(saved: SavedModel, section: Section) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return which of the model's genes were measured, as columns of its predictions and as names."""
    measured = set(section.spots.genes)
    columns = [i for i, gene in enumerate(saved.card.genes) if gene in measured]
    if not columns:
        raise ModelError(
            f"the spots of {section.slide_id!r} measured none of the model's {len(saved.card.genes)} genes: the model "
            f"has names such as {saved.card.genes[0]!r}, the spots such as {section.spots.genes[0]!r}; give spots with "
            "gene names of the same kind"
        )
    if len(section.spots) < MIN_SPOTS:
        raise ModelError(
            f"{len(section.spots)} usable spots on {section.slide_id!r} are too few to condition on, {MIN_SPOTS} are "
            "needed; predict without --condition-on"
        )
    return np.array(columns, dtype=np.int64), tuple(saved.card.genes[i] for i in columns)
