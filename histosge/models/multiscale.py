"""What `dense` sees of a patch: its own embedding, and what lies around it at two scales.

Embeddings are reduced to at most `MAX_DIM` principal components first, then pooled by Gaussians, a few
components at a time, so that memory holds neither all moments nor all scales at once.

Terms
    view      a scale and a moment: ``(0, "mean")`` is the patch itself, ``(80, "sd")`` the spread around it
    describe  all views of a patch or spot side by side, ``(n, dim * len(VIEWS))``
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.data.embedded_slide import Reduce
from histosge.data.gaussian_pooling import TRUNCATE, Values, View, pool_views
from histosge.data.sections import Patches, TrainingSection
from histosge.models.linear_algebra import Affine, Floats, Indices, Standardiser, principal_axes
from histosge.models.protocol import State

VIEWS: tuple[View, ...] = (
    (0.0, "mean"),
    (80.0, "mean"),
    (80.0, "sd"),
    (160.0, "mean"),
    (160.0, "sd"),
)
"""Sigma in microns, and moment."""
HALO_UM = TRUNCATE * max(sigma for sigma, _ in VIEWS)
MAX_DIM = 256
_SAMPLE = 5000
"""Patches that the principal components are measured on, at most."""


@dataclass(frozen=True)
class Surroundings:
    """From embeddings to views.

    Parameters
    ----------
    reduce
        Embedding -> components; None where embeddings are narrow enough to be used as they are.
    centre
        About the mean of the components, ``(dim,)``: views are computed on what differs from it.
    """

    reduce: Affine | None
    centre: Values

    @classmethod
    def of(cls, sections: Sequence[TrainingSection]) -> Self:
        """Measure principal components on patches under training spots; held-out tissue has no say."""
        under = [s.patches.embedding[np.unique(s.overlap.indices)] for s in sections]
        every = -(-sum(map(len, under)) // _SAMPLE)
        sample = np.concatenate(under)[::every].astype(np.float64)
        if sample.shape[1] <= MAX_DIM:
            return cls(None, sample.mean(axis=0).astype(np.float32))
        standardiser = Standardiser.of(sample)
        axes = principal_axes(standardiser.apply(sample), MAX_DIM)
        reduce = Affine(axes, np.zeros(axes.shape[1])).after(standardiser)
        return cls(reduce, np.zeros(axes.shape[1], np.float32))

    def components(self, patches: Patches) -> Patches:
        """Return the patches with reduced embeddings."""
        if self.reduce is None:
            return patches
        parts = np.array_split(patches.embedding, max(1, len(patches) // 4096))
        return patches.with_embedding(np.concatenate([self.reduce_some(part) for part in parts]))

    def reduce_some(self, embedding: Values) -> Values:
        """Return the components of ``(n, dim)`` embeddings, in single precision: they came in half."""
        assert self.reduce is not None
        components = embedding.astype(np.float32, copy=False) @ self.reduce.weight.astype(np.float32)
        components += self.reduce.offset.astype(np.float32)
        return components

    def split(self) -> tuple[Reduce | None, Self]:
        """Return what reduces embeddings, and the rest, which takes components for embeddings."""
        return (None, self) if self.reduce is None else (self.reduce_some, replace(self, reduce=None))

    def describe_spots(self, section: TrainingSection) -> Floats:
        """Return the views of each spot: those of the patches under its disc, weighted by area."""
        return self.describe(section.patches, section.overlap)

    def describe(self, patches: Patches, overlap: sparse.csr_matrix) -> Floats:
        """Return ``overlap @ views``, shape ``(n_spots, dim * len(VIEWS))``."""
        reduced = self.components(patches)
        described = np.empty((overlap.shape[0], len(self.centre) * len(VIEWS)))
        weight = np.asarray(overlap.sum(axis=1))
        for columns, centre, values in self._views(reduced):
            described[:, columns] = overlap @ values.astype(np.float64) + weight * centre
        return described

    def project(self, patches: Patches, affine: Affine, of: Indices | None = None) -> Floats:
        """Return ``affine(views)`` of every patch, or of some, without holding the views, ``(n, n_outputs)``."""
        # Single precision is enough for what differs from the centre; the centre itself may be large.
        weight = affine.weight.astype(np.float32)
        projected = np.zeros((len(patches) if of is None else len(of), weight.shape[1]))
        for columns, _, values in self._views(self.components(patches), of):
            projected += values @ weight[columns]
        projected += affine.offset + self._centre_of_views() @ affine.weight
        return projected

    def _centre_of_views(self) -> Floats:
        """Return what the views of patches that are all at the centre are."""
        return np.concatenate([self.centre * (moment == "mean") for _, moment in VIEWS], dtype=np.float64)

    def _views(
        self, patches: Patches, of: Indices | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float64], Values]]:
        """Yield columns of the description, what to add to them, and their values, few at a time."""
        dim = len(self.centre)
        for view, features, values in pool_views(patches, VIEWS, of, self.centre):
            start = VIEWS.index(view) * dim
            centre = self.centre[features].astype(np.float64)
            columns = slice(start + features.start, start + features.stop)
            yield columns, centre if view[1] == "mean" else np.zeros_like(centre), values

    def state(self) -> State:
        """Return the arrays."""
        reduce = {f"reduce.{k}": v for k, v in self.reduce.state().items()} if self.reduce else {}
        return {**reduce, "views.centre": self.centre}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        known = "reduce.weight" in state
        reduce = Affine(state["reduce.weight"], state["reduce.offset"]) if known else None
        return cls(reduce, state["views.centre"])


def view_columns(views: Sequence[tuple[float, str]], dim: int) -> Indices:
    """Return the columns of a description that hold some views."""
    return np.concatenate([np.arange(dim) + VIEWS.index(view) * dim for view in views])
