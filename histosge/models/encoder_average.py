"""One model for each encoder, predictions averaged: the model of embeddings that lie side by side.

Better than one model of the joined embeddings: on the public sections, with a pretrained network and `morphology`, 0.380
against 0.365 (five scales a model).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.errors import ModelError
from histosge.models.checkpoint import Checkpoint
from histosge.models.estimators import NamedEstimator
from histosge.models.nested_state import nest, read_config, unnest
from histosge.models.protocol import (
    SQUARED_ERROR,
    DepthModel,
    Model,
    PartialModel,
    ReducingModel,
    RemarkingModel,
    State,
)

if TYPE_CHECKING:
    from histosge.data.embedded_slide import Reduce

Values = NDArray[np.float32]


@dataclass(frozen=True)
class EncoderAverage:
    """log1p(CP10k) = mean over encoders of what each one's model predicts from its columns of the embedding.

    Parameters
    ----------
    models
        One for each encoder.
    dims
        How many columns each of them takes, from left to right.
    """

    name: ClassVar[str] = "average over encoders"
    models: tuple[Model, ...]
    dims: tuple[int, ...]

    @property
    def halo_um(self) -> float:
        """Return the farthest that any of them looks."""
        return max(float(model.halo_um) for model in self.models)

    @property
    def remark(self) -> str:
        """Return what the models decided by themselves, in one line."""
        remarks = [model.remark for model in self.models if isinstance(model, RemarkingModel)]
        return "; ".join(dict.fromkeys(remarks)) or "one model for each encoder, predictions averaged"

    @property
    def depth(self) -> object | None:
        """Return what predicts depth; None unless every model does."""
        found = [model.depth if isinstance(model, DepthModel) else None for model in self.models]
        return None if None in found else found

    @classmethod
    def fit_each(
        cls,
        estimator: NamedEstimator,
        sections: Sequence[TrainingSection],
        dims: Sequence[int],
        *,
        seed: int = 0,
        epochs: int | None = None,
        loss: str = SQUARED_ERROR,
        checkpoint: Checkpoint | None = None,
    ) -> Self:
        """Fit a model to each encoder's columns."""
        models = []
        for i, columns in enumerate(_columns(dims)):
            own = [
                replace(s, patches=s.patches.with_embedding(_cut(s.patches.embedding, columns)))
                for s in sections
            ]
            # A file for each: they are trained one after the other.
            kept = None if checkpoint is None else checkpoint.numbered(i)
            models.append(estimator.fit(own, seed=seed, epochs=epochs, loss=loss, checkpoint=kept))
        return cls(tuple(models), tuple(dims))

    def predict(self, patches: Patches) -> Values:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: NDArray[np.int64]) -> Values:
        """Return what `predict` does for some of the patches; the others are only their neighbourhood."""
        return _mean([_predict_some(model, part, of) for model, part in self._parts(patches)])

    def predict_with_depth(self, patches: Patches, of: NDArray[np.int64]) -> tuple[Values, Values | None]:
        """Return `predict_some`, and the mean of the predicted logs of total counts, ``(len(of),)``."""
        if self.depth is None:
            return self.predict_some(patches, of), None
        found = [cast(DepthModel, model).predict_with_depth(part, of) for model, part in self._parts(patches)]
        depths = [depth for _, depth in found if depth is not None]
        return _mean([values for values, _ in found]), _mean(depths) if len(depths) == len(found) else None

    def split(self) -> "tuple[Reduce | None, EncoderAverage]":
        """Return the projections of all encoders side by side, and the models that take projected embeddings."""
        pairs = [
            model.split() if isinstance(model, ReducingModel) else (None, model) for model in self.models
        ]
        reducers = [reduce for reduce, _ in pairs]
        if all(reduce is None for reduce in reducers):
            return None, self
        columns = _columns(self.dims)

        def reduce_each(embedding: Values) -> list[Values]:
            parts = [_cut(embedding, part) for part in columns]
            return [
                part if reduce is None else reduce(part) for reduce, part in zip(reducers, parts, strict=True)
            ]

        # How wide each projection is shows on one row of zeros.
        widths = [part.shape[1] for part in reduce_each(np.zeros((1, sum(self.dims)), np.float32))]
        after = EncoderAverage(tuple(model for _, model in pairs), tuple(widths))
        return lambda embedding: np.hstack(reduce_each(embedding)), after

    def config(self) -> dict[str, Any]:
        """Return the configuration of each model."""
        parts = [
            {"dim": dim, "model": model.config()} for dim, model in zip(self.dims, self.models, strict=True)
        ]
        return {"encoders": parts}

    def state(self) -> State:
        """Return the arrays of all models, under ``encoder0.``, ``encoder1.`` and so on."""
        found: State = {}
        for i, model in enumerate(self.models):
            found |= nest(f"encoder{i}", model.state())
        return found

    @classmethod
    def from_parts(cls, preset: type[Model], config: dict[str, Any], state: State, dim: int) -> Self:
        """Rebuild from models of one class.

        Parameters
        ----------
        dim
            Of the embeddings of all encoders side by side.

        Raises
        ------
        ModelError
            If the dimensions do not add up to it.
        """
        parts = read_config(config, _Config).encoders
        if sum(part.dim for part in parts) != dim:
            raise ModelError(
                f"its encoders have {' + '.join(str(part.dim) for part in parts)} numbers, the card {dim}"
            )
        models = [preset.from_state(part.model, unnest(f"encoder{i}", state)) for i, part in enumerate(parts)]
        return cls(tuple(models), tuple(part.dim for part in parts))

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Refuse: which columns are whose is known to `fit_each` alone."""
        raise ModelError("an average over encoders is fitted by histosge.train with several encoders")

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Refuse: of which class the models are stands in the card; see `from_parts`."""
        raise ModelError("an average over encoders is loaded by histosge.load_model")

    def _parts(self, patches: Patches) -> list[tuple[Model, Patches]]:
        return [
            (model, patches.with_embedding(_cut(patches.embedding, columns)))
            for model, columns in zip(self.models, _columns(self.dims), strict=True)
        ]


class _Part(msgspec.Struct):
    dim: Annotated[int, msgspec.Meta(ge=1)]
    model: dict[str, Any]


class _Config(msgspec.Struct):
    """What `EncoderAverage.config` wrote."""

    encoders: Annotated[tuple[_Part, ...], msgspec.Meta(min_length=2, max_length=64)]


def _columns(dims: Sequence[int]) -> list[slice]:
    ends = np.cumsum(dims).tolist()
    return [slice(end - dim, end) for end, dim in zip(ends, dims, strict=True)]


def _cut(embedding: Values, columns: slice) -> Values:
    # Contiguous: a product with a slice of columns would copy it anyway, for every scale.
    return np.ascontiguousarray(embedding[:, columns])


def _predict_some(model: Model, patches: Patches, of: NDArray[np.int64]) -> Values:
    if isinstance(model, PartialModel):
        return model.predict_some(patches, of)
    return model.predict(patches)[of]


def _mean(values: Sequence[Values]) -> Values:
    return np.asarray(np.mean(np.stack(values), axis=0), dtype=np.float32)
