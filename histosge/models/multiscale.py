"""Multiscale features: a patch's own embedding, and Gaussian-weighted moments of those around it at two scales.

Embeddings are reduced to at most `MAX_DIM` principal components first, then pooled by Gaussians, a few
components at a time, so that memory holds neither all moments nor all scales at once.

Terms
    moment    a scale and a kind: ``(0, "mean")`` is the patch itself, ``(80, "sd")`` the spread within 80 microns
    features  all moments of a patch or spot side by side, ``(n, dim * len(MOMENTS))``
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.data.embedded_slide import Reduce
from histosge.data.gaussian_pooling import TRUNCATE, Moment, Values, pool_moments
from histosge.data.sections import Patches, TrainingSection
from histosge.models.kriging import SpotFeatures
from histosge.models.linear_algebra import Affine, Floats, Indices, Standardiser, principal_axes
from histosge.models.nested_state import nest, take, unnest
from histosge.models.protocol import State

# Means at 80 and 160 um and the spread at 160 um were the best single set of several hundred tried on the public sections.
MOMENTS = (
    Moment(0.0, "mean"),
    Moment(80.0, "mean"),
    Moment(80.0, "sd"),
    Moment(160.0, "mean"),
    Moment(160.0, "sd"),
)
"""What `dense` and `gp` use of a patch and its neighbourhood; sigma in microns."""
HALO_UM = TRUNCATE * max(moment.sigma_um for moment in MOMENTS)
MAX_DIM = 256
"""Components that wider embeddings are reduced to: as many as the field's ridge benchmark takes."""
_MAX_SAMPLE = 5000
"""Patches that the principal components are measured on, at most."""
# A slide has more patches than one product should hold a second copy of.
_PATCHES_AT_ONCE = 4096


@dataclass(frozen=True)
class MultiscaleFeatures:
    """From embeddings to multiscale features.

    Parameters
    ----------
    reduce
        Embedding -> components; None where embeddings are narrow enough to be used as they are.
    centre
        About the mean of the components, ``(dim,)``: moments are computed of differences from it.
    """

    reduce: Affine | None
    centre: Values

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection]) -> Self:
        """Measure principal components on the patches under training spots: held-out tissue takes no part."""
        under = [s.patches.embedding[np.unique(s.overlap.indices)] for s in sections]
        every = -(-sum(map(len, under)) // _MAX_SAMPLE)
        sample = np.concatenate(under)[::every].astype(np.float64)
        if sample.shape[1] <= MAX_DIM:
            return cls(None, sample.mean(axis=0).astype(np.float32))
        standardiser = Standardiser.fit(sample)
        axes = principal_axes(standardiser.apply(sample), MAX_DIM)
        reduce = Affine(axes, np.zeros(axes.shape[1])).after(standardiser)
        # Standardised components have their mean at 0 already.
        return cls(reduce, np.zeros(axes.shape[1], np.float32))

    def components(self, patches: Patches) -> Patches:
        """Return the patches with components for embeddings."""
        if self.reduce is None:
            return patches
        parts = np.array_split(patches.embedding, max(1, len(patches) // _PATCHES_AT_ONCE))
        return patches.with_embedding(np.concatenate([self.reduce_embedding(part) for part in parts]))

    def reduce_embedding(self, embedding: Values) -> Values:
        """Return the components of ``(n, dim)`` embeddings, ``(n, n_components)``."""
        assert self.reduce is not None
        # Single precision: embeddings are stored in half, and double took 2.9 times as long in prediction.
        components = embedding.astype(np.float32, copy=False) @ self.reduce.weight.astype(np.float32)
        components += self.reduce.offset.astype(np.float32)
        return components

    def split(self) -> tuple[Reduce | None, Self]:
        """Return the reduction of embeddings, and the rest, which takes components in their place."""
        return (None, self) if self.reduce is None else (self.reduce_embedding, replace(self, reduce=None))

    def at_spots(self, section: TrainingSection) -> Floats:
        """Return the features of each spot, ``(n_spots, dim * len(MOMENTS))``.

        They are those of the patches under its disc, weighted by area.
        """
        overlap = section.overlap
        features = np.empty((overlap.shape[0], len(self.centre) * len(MOMENTS)))
        weight = np.asarray(overlap.sum(axis=1))
        for columns, centre, values in self._moments(self.components(section.patches)):
            features[:, columns] = overlap @ values.astype(np.float64) + weight * centre
        return features

    def project(self, patches: Patches, affine: Affine, of: Indices | None = None) -> Floats:
        """Return ``affine(features)`` of all patches, or of some, ``(n, n_outputs)``, a few features at a time."""
        # Single precision is enough for differences from the centre; the centre itself may be large.
        weight = affine.weight.astype(np.float32)
        projected = np.zeros((len(patches) if of is None else len(of), weight.shape[1]))
        for columns, _, values in self._moments(self.components(patches), of):
            projected += values @ weight[columns]
        projected += affine.offset + self._features_of_centre() @ affine.weight
        return projected

    def _features_of_centre(self) -> Floats:
        """Return the features of a patch if all patches had the centre for components."""
        return np.concatenate([self.centre * (kind == "mean") for _, kind in MOMENTS], dtype=np.float64)

    def _moments(
        self, patches: Patches, of: Indices | None = None
    ) -> Iterator[tuple[slice, NDArray[np.float64], Values]]:
        """Yield a range of columns of the features, the centre to add to them, and their values."""
        dim = len(self.centre)
        for moment, components, values in pool_moments(patches, MOMENTS, of, self.centre):
            start = MOMENTS.index(moment) * dim
            centre = self.centre[components].astype(np.float64)
            columns = slice(start + components.start, start + components.stop)
            # A standard deviation does not change with the centre.
            yield columns, centre if moment.kind == "mean" else np.zeros_like(centre), values

    def state(self) -> State:
        """Return the arrays."""
        reduce = nest("reduce", self.reduce.state()) if self.reduce else {}
        return {**reduce, "views.centre": self.centre}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        centre, reduce = take(state, "views.centre", None), unnest("reduce", state)
        if reduce:
            take(state, "reduce.offset", len(centre))
        return cls(Affine.from_state(reduce) if reduce else None, centre)


def spot_features(sections: Sequence[TrainingSection], features: MultiscaleFeatures) -> SpotFeatures:
    """Return the spots of all sections, one after another, with their multiscale features."""
    return SpotFeatures(
        np.repeat(np.arange(len(sections)), [len(s.spot_xy_um) for s in sections]),
        np.concatenate([s.spot_xy_um for s in sections]),
        np.concatenate([features.at_spots(s) for s in sections]),
    )


def standardised_spot_features(
    sections: Sequence[TrainingSection], features: MultiscaleFeatures
) -> tuple[SpotFeatures, Standardiser]:
    """Return `spot_features` of mean 0 and standard deviation 1, and what standardised them."""
    spots = spot_features(sections, features)
    standardiser = Standardiser.fit(spots.features)
    return replace(spots, features=standardiser.apply(spots.features)), standardiser
