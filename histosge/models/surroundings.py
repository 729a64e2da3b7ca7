"""What `dense` sees of a patch: its own embedding, and what lies around it at two scales.

Embeddings are reduced to at most `MAX_DIM` principal components first, then pooled by Gaussians, a few
components at a time, so that memory holds neither all moments nor all scales at once.

Terms
    view      a scale and a moment: ``(0, "mean")`` is the patch itself, ``(80, "sd")`` the spread around it
    describe  all views of a patch or spot side by side, ``(n, dim * len(VIEWS))``
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from histosge.models.linear import Affine, Floats, Indices, Standardiser, principal_axes
from histosge.models.model import State
from histosge.sections import Patches, TrainingSection
from histosge.windows import TRUNCATE, gaussian_pool

VIEWS: tuple[tuple[float, str], ...] = (
    (0.0, "mean"),
    (80.0, "mean"),
    (80.0, "sd"),
    (160.0, "mean"),
    (160.0, "sd"),
)
"""Sigma in microns, and moment."""
HALO_UM = TRUNCATE * max(sigma for sigma, _ in VIEWS)
MAX_DIM = 256
_CHUNK = 64
_SAMPLE = 5000
"""Patches that the principal components are measured on, at most."""


@dataclass(frozen=True)
class Surroundings:
    """From embeddings to views.

    Parameters
    ----------
    reduce
        Embedding -> components; None where embeddings are narrow enough to be used as they are.
    """

    reduce: Affine | None

    @classmethod
    def of(cls, sections: Sequence[TrainingSection]) -> Self:
        """Measure principal components on patches under training spots; held-out tissue has no say."""
        if sections[0].patches.embedding.shape[1] <= MAX_DIM:
            return cls(None)
        under = [s.patches.embedding[np.unique(s.overlap.indices)] for s in sections]
        every = -(-sum(map(len, under)) // _SAMPLE)
        sample = np.concatenate(under)[::every].astype(np.float64)
        standardiser = Standardiser.of(sample)
        axes = principal_axes(standardiser.apply(sample), MAX_DIM)
        return cls(Affine(axes, np.zeros(axes.shape[1])).after(standardiser))

    def components(self, patches: Patches) -> Patches:
        """Return the patches with reduced embeddings."""
        if self.reduce is None:
            return patches
        parts = np.array_split(patches.embedding, max(1, len(patches) // 4096))
        reduced = np.concatenate([self.reduce(part).astype(np.float32) for part in parts])
        return patches.with_embedding(reduced)

    def describe_spots(self, section: TrainingSection) -> Floats:
        """Return the views of each spot: those of the patches under its disc, weighted by area."""
        return self.describe(section.patches, section.overlap)

    def describe(self, patches: Patches, overlap: sparse.csr_matrix) -> Floats:
        """Return ``overlap @ views``, shape ``(n_spots, dim * len(VIEWS))``."""
        reduced = self.components(patches)
        described = np.empty((overlap.shape[0], reduced.embedding.shape[1] * len(VIEWS)))
        for columns, values in _views(reduced):
            described[:, columns] = overlap @ values.astype(np.float64)
        return described

    def project(self, patches: Patches, affine: Affine, of: Indices | None = None) -> Floats:
        """Return ``affine(views)`` of every patch, or of some, without holding the views, ``(n, n_outputs)``."""
        projected = np.tile(affine.offset, (len(patches) if of is None else len(of), 1))
        for columns, values in _views(self.components(patches), of):
            projected += values.astype(np.float64) @ affine.weight[columns]
        return projected

    def state(self) -> State:
        """Return the reduction's arrays, none if there is no reduction."""
        return {f"reduce.{k}": v for k, v in self.reduce.state().items()} if self.reduce else {}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        if "reduce.weight" not in state:
            return cls(None)
        return cls(Affine(state["reduce.weight"], state["reduce.offset"]))


def view_columns(views: Sequence[tuple[float, str]], dim: int) -> Indices:
    """Return the columns of a description that hold some views."""
    return np.concatenate([np.arange(dim) + VIEWS.index(view) * dim for view in views])


def _views(patches: Patches, of: Indices | None = None) -> Iterator[tuple[Indices, NDArray[np.float32]]]:
    """Yield columns of the description and their values, few at a time."""
    dim = patches.embedding.shape[1]
    for start in range(0, dim, _CHUNK):
        part = patches.with_embedding(np.ascontiguousarray(patches.embedding[:, start : start + _CHUNK]))
        width = part.embedding.shape[1]
        for sigma in dict.fromkeys(sigma for sigma, _ in VIEWS):
            moments = [moment for s, moment in VIEWS if s == sigma]
            own = part.embedding if of is None else part.embedding[of]
            values = gaussian_pool(part, sigma, moments, of) if sigma > 0 else own
            places = [VIEWS.index((sigma, moment)) for moment in moments]
            columns = np.concatenate([np.arange(start, start + width) + place * dim for place in places])
            yield columns, values
