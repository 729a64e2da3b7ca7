"""A model and the genes to predict with it: from the window of a block to the block's values."""

import math
from dataclasses import dataclass
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import EmbeddedSlide, Reduce, Window
from histosge.models.protocol import DepthModel, Model, PartialModel, ReducingModel
from histosge.prediction.conditioning import ConditionedModel
from histosge.prediction.stored_map import StoredMap
from histosge.threads import usable_cores
from histosge.training.saved_model import SavedModel

_MAX_WORKING_BYTES = 1 << 30
"""Memory of all predictions that are computed at once, about."""


@dataclass(frozen=True)
class Predictor:
    """The models and genes of a prediction.

    Parameters
    ----------
    depth_model, model
        Predict depth, and genes: one and the same unless the latter is conditioned on spots.
    columns
        Of the model's genes, those to predict.
    spots
        Fingerprint of the spots that it was conditioned on, or None.
    reduce
        Applied to embeddings before either model, see `ReducingModel`.
    """

    saved: SavedModel
    depth_model: Model
    model: Model | ConditionedModel
    columns: list[int]
    spots: str | None
    reduce: Reduce | None = None

    @classmethod
    def from_saved(cls, saved: SavedModel, columns: list[int]) -> Self:
        """Predict with the saved model, not conditioned."""
        reduce, model = saved.model.split() if isinstance(saved.model, ReducingModel) else (None, saved.model)
        return cls(saved, model, model, columns, None, reduce)

    @property
    def genes(self) -> tuple[str, ...]:
        """Return the names of the genes that are predicted, in order."""
        return tuple(self.saved.card.genes[i] for i in self.columns)

    @property
    def predicts_depth(self) -> bool:
        """Tell whether it predicts depth beside genes."""
        return isinstance(self.depth_model, DepthModel) and self.depth_model.depth is not None

    def made_by(self, slide: EmbeddedSlide) -> dict[str, Any]:
        """Return what decides the values of a slide's map: a map of anything else is not mixed with this one."""
        made_by: dict[str, Any] = {
            "model": self.saved.fingerprint,
            "preset": self.saved.card.preset,
            "encoder": slide.identity.fingerprint,
            "slide": slide.fingerprint,
            "genes": len(self.columns),
        }
        if self.spots is not None:
            made_by["spots"] = self.spots
        return made_by

    def predict(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return the chosen genes of the block's own patches, and their depth where the model predicts it."""
        own = np.flatnonzero(window.own)
        depth: NDArray[np.float32] | None = None
        if self.predicts_depth:
            genes, depth = cast(DepthModel, self.depth_model).predict_with_depth(window.patches, own)
        if self.spots is not None or not self.predicts_depth:
            genes = self._genes(window, own)
        # Taking all columns by index would copy the largest array there is.
        every = self.columns == list(range(genes.shape[1]))
        return genes if every else genes[:, self.columns], depth

    def _genes(self, window: Window, own: NDArray[np.int64]) -> NDArray[np.float32]:
        if isinstance(self.model, PartialModel):  # the halo's patches are needed, their predictions are not
            return self.model.predict_some(window.patches, own)
        return self.model.predict(window.patches)[own]

    def threads(self, block_shape: tuple[int, int]) -> int:
        """Return how many blocks to predict at once: one a core, as far as memory allows."""
        bytes_each = 4 * block_shape[0] * block_shape[1] * len(self.columns)
        # Three times the float32 values of a block: the values, their stored form, and working memory of the model.
        return max(1, min(usable_cores(), _MAX_WORKING_BYTES // (3 * bytes_each)))


def predict_window(window: Window, predictor: Predictor, stored_map: StoredMap) -> None:
    """Predict one block and write it."""
    shape = window.block.shape
    rows = window.patches.rows[window.own] - window.block.rows[0]
    cols = window.patches.cols[window.own] - window.block.cols[0]
    places = rows * shape[1] + cols
    predicted, depth = np.empty((0, len(predictor.columns)), np.float32), None
    if len(places):
        predicted, depth = predictor.predict(window)
    # Expression last: a block counts as done when that exists, so an interruption in between computes it again.
    if stored_map.depth is not None:
        column = np.full((len(places), 1), np.nan, np.float32) if depth is None else depth.reshape(-1, 1)
        stored_map.depth.write(window.block, _lay_out(column, places, shape, column.dtype))
    stored_map.array.write(window.block, _lay_out(predicted, places, shape, stored_map.array.dtype))


def _lay_out(
    values: NDArray[np.float32], places: NDArray[np.int64], shape: tuple[int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return ``(n, n_channels)`` values on a block, ``(*shape, n_channels)``; NaN where there is no patch.

    Parameters
    ----------
    places
        Of the patches in the block, counted row by row.
    """
    if len(places) == math.prod(shape) and bool((np.diff(places) == 1).all()):
        # Inside the tissue there are no gaps: the largest array there is, is not copied once more.
        return values.astype(dtype).reshape(*shape, -1)
    block = np.full((math.prod(shape), values.shape[1]), np.nan, dtype)
    block[places] = values.astype(dtype)
    return block.reshape(*shape, -1)
