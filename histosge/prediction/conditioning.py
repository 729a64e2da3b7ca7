"""A model conditioned on spots measured on the very slide that is predicted.

The image model's leftover is interpolated between the spots (`models.leftover`), and the map is brought to
what the spots say under their discs (`honour`). Any saved model can be conditioned.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from histosge.data.genes import SCALE, library_size, select_target
from histosge.data.section_loading import load_section
from histosge.data.sections import Patches, Section, TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.errors import ModelError
from histosge.models.empirical_bayes import posterior_rates
from histosge.models.low_rank_targets import FLOOR, bend
from histosge.models.multiscale import HALO_UM
from histosge.models.protocol import Model
from histosge.models.residual_kriging import Leftover
from histosge.prediction.spot_rescaling import RateFactors
from histosge.training.saved_model import SavedModel

MIN_SPOTS = 20
"""With fewer, neither what is left nor how much of it to trust can be told."""
_BAND = 16
"""Rows of patches predicted at once while a model is conditioned."""


@dataclass(frozen=True)
class ConditionedModel:
    """A model of one slide: image, leftover and measured discs.

    Parameters
    ----------
    image
        Predicts all genes.
    columns
        Those that were measured; the others stay as the image predicts them.
    leftover, stamps
        Of the measured genes.
    floor
        Where their predictions bend, ``(n_measured,)``.
    values
        What each spot's rate is believed to be, per 10,000, ``(n_spots, n_measured)``: what the map's mean
        over its disc is brought to.
    fingerprint
        Of the spots.
    """

    image: Model
    columns: NDArray[np.int64]
    leftover: Leftover
    stamps: RateFactors
    floor: NDArray[np.float32]
    values: NDArray[np.float64]
    fingerprint: str

    @property
    def halo_um(self) -> float:
        """Return how far image model and leftover look."""
        return max(self.image.halo_um, HALO_UM)

    @classmethod
    def of(cls, saved: SavedModel, section: Section) -> Self:
        """Condition a model on a section's spots.

        Raises
        ------
        ModelError
            If there are fewer than 20 usable spots, or they measured none of the model's genes.
        """
        columns, genes = _measured(saved, section)
        overlap, image = section.overlap, saved.model
        under = Under.of(section.patches, overlap)
        log_under = under.predict(image.predict, image.halo_um)[:, columns]
        predicted = spots_from_patches(under.overlap, log_under)
        target, library = select_target(section.spots, genes), library_size(section.spots)
        known = TrainingSection(section.patches, overlap, section.spots.xy_um, target, library)
        leftover, unseen = Leftover.fit_unseen([known], [predicted])
        floor = (FLOOR * target.mean(axis=0)).astype(np.float32)
        rate = np.expm1(bend(predicted + unseen[0], floor).astype(np.float64))
        counts = np.rint(np.expm1(target.astype(np.float64)) * (library / SCALE)[:, None])
        wanted = posterior_rates(counts, library / SCALE, rate)
        added = under.predict(leftover, HALO_UM)
        stamps = RateFactors.solve(section.patches, overlap, bend(log_under + added, floor), wanted)
        digest = hashlib.sha256(target.tobytes() + section.spots.xy_um.tobytes()).hexdigest()
        return cls(image, columns, leftover, stamps, floor, wanted, digest)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        log_patches = self.image.predict(patches)
        own = bend(log_patches[:, self.columns] + self.leftover(patches), self.floor)
        log_patches[:, self.columns] = self.stamps.apply(patches, own)
        return log_patches


@dataclass(frozen=True)
class Under:
    """The patches under measured discs.

    Parameters
    ----------
    patches
        All of the slide.
    index
        Which of them, in ascending order.
    overlap
        With these alone as columns.
    """

    patches: Patches
    index: NDArray[np.int64]
    overlap: sparse.csr_matrix

    @classmethod
    def of(cls, patches: Patches, overlap: sparse.csr_matrix) -> Self:
        """Find them."""
        index = np.unique(overlap.indices).astype(np.int64)
        return cls(patches, index, sparse.csr_matrix(overlap[:, index]))

    def predict(
        self, predict: Callable[[Patches], NDArray[np.float32]], halo_um: float
    ) -> NDArray[np.float32]:
        """Predict them, ``(n_under, n_genes)``, a band of rows with its halo at a time."""
        rows, halo = self.patches.rows, int(np.ceil(halo_um / self.patches.stride_um))
        band = rows[self.index] // _BAND
        out: NDArray[np.float32] | None = None
        for number in np.unique(band):
            first, last = number * _BAND - halo, (number + 1) * _BAND + halo
            near = np.flatnonzero((rows >= first) & (rows < last))
            mine = band == number
            values = predict(_take(self.patches, near))[np.searchsorted(near, self.index[mine])]
            if out is None:
                out = np.empty((len(self.index), values.shape[1]), np.float32)
            out[mine] = values
        return np.empty((0, 0), np.float32) if out is None else out


def _take(patches: Patches, index: NDArray[np.int64]) -> Patches:
    return replace(
        patches, rows=patches.rows[index], cols=patches.cols[index], embedding=patches.embedding[index]
    )


def load_conditioned(
    store: Store,
    saved: SavedModel,
    sample: Sample,
    selection: tuple[str | None, str | None],
    on_message: Callable[[str], None],
) -> ConditionedModel:
    """Read a slide's spots and condition a model on them; `selection` is grid and encoder.

    Raises
    ------
    ExpressionError
        If the spots cannot be read, or do not fit the slide.
    """
    loaded = load_section(sample, store, *selection)
    model = ConditionedModel.of(saved, loaded.section)
    trained_on = {section["slide_fingerprint"] for section in saved.card.sections}
    if loaded.slide.fingerprint in trained_on:
        on_message(
            f"{sample.slide_id}: the model was trained on this slide, so less is left over than on a new one"
        )
    on_message(
        f"{sample.slide_id}: conditioned on {len(loaded.section.spots)} spots and {len(model.columns)} of "
        f"{len(saved.card.genes)} genes ({loaded.few_counts} spots under the floor on counts and {loaded.off_tissue} "
        f"off tissue left out); patterns blended in by {', '.join(f'{b:.2f}' for b in model.leftover.blend)}"
    )
    return model


def _measured(saved: SavedModel, section: Section) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    known = set(section.spots.genes)
    columns = [i for i, gene in enumerate(saved.card.genes) if gene in known]
    if not columns:
        raise ModelError(
            f"the spots of {section.slide_id!r} measured none of the model's {len(saved.card.genes)} genes (such as "
            f"{saved.card.genes[0]!r}; they measured {section.spots.genes[0]!r}): are the names of one kind?"
        )
    if len(section.spots) < MIN_SPOTS:
        raise ModelError(
            f"{len(section.spots)} usable spots on {section.slide_id!r} are too few to condition on, {MIN_SPOTS} are "
            "needed; predict without --condition-on"
        )
    return np.array(columns, dtype=np.int64), tuple(saved.card.genes[i] for i in columns)
