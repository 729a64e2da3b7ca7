"""One more ridge of `dense`: on the differences of neighbouring scales and the widest scale, all of them together.

A patch less its neighbourhood changes less with a slide's stain than the patch itself does. The five ridges of
`scale_ridges` cannot use that, since each sees one scale. The inputs are linear in the same pooled embeddings, so the
fitted weights fold back into weights of the scales, and prediction does not change.

Terms
    difference   the mean around a spot at one scale less that at the next wider scale
    projection   from embeddings to fewer numbers, the same for all scales
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self

import numpy as np
from numpy.typing import NDArray

from histosge.models.linear_algebra import Affine, Floats, Indices, Standardiser, fix_signs, symmetric_eigen
from histosge.models.ridge_sums import RidgeSums, standardiser_from_sums

MAX_DIM = 256
"""Numbers of an embedding that is taken as it is. A longer one is projected: the Gram matrix has five times its side."""
N_COMPONENTS = 64
"""Components that a longer embedding is projected on. On the pretrained network and the public sections 64 gained 0.008 and
0.009, 128 and 256 between 0.003 and 0.009; on `morphology` 64 and 128 were alike. They also cost least."""
SAMPLED = 512
"""Patches of a section, at most, that the projection is computed from: at 1,536 numbers they take 1.5 MB on disk."""
_CANDIDATES = 8 * SAMPLED
"""Patches of a section, at most, that are held until it is known which of them lie under spots."""
# As `principal_axes`: n rows have rank n at most, and what lies beyond is rounding.
_LEAST_VARIANCE = 1e-10


@dataclass(frozen=True)
class ScaleDifferences:
    """From embeddings pooled at each scale to the inputs of the ridge on differences, and back.

    Parameters
    ----------
    n_scales
        How many scales there are; at least two.
    dim
        Numbers of an embedding.
    projection
        ``(dim, n_projected)``, or None: embeddings are taken as they are.
    """

    n_scales: int
    dim: int
    projection: Floats | None

    @classmethod
    def fit(cls, n_scales: int, dim: int, samples: Iterable[NDArray[np.floating]]) -> Self | None:
        """Choose the projection: leading principal components of standardised embeddings; none up to `MAX_DIM` numbers.

        Returns None where a projection is needed, and the samples show no direction in which embeddings differ.

        Parameters
        ----------
        samples
            Of each section `sample_patches`; not looked at where there is no projection.
        """
        if not is_projected(dim):
            return cls(n_scales, dim, None)
        sums, centre = RidgeSums.zeros(dim, 0), np.zeros(dim)
        for sample in samples:
            rows = sample.astype(np.float64)
            if sums.n == 0 and len(rows):
                # Of differences from a mean: squares of large numbers would lose the variance.
                centre = rows.mean(axis=0)
            sums = sums.add_rows(rows - centre, np.zeros((len(rows), 0)))
        if sums.n < 2:
            return None
        standardiser = standardiser_from_sums(sums, centre)
        by = 1 / standardiser.scale
        variances, axes = symmetric_eigen(sums.mapped(standardiser.mean - centre, by).xx)
        leading = np.argsort(variances)[::-1][:N_COMPONENTS]
        if variances[leading[0]] <= 0:
            return None
        leading = leading[variances[leading] > _LEAST_VARIANCE * variances[leading[0]]]
        return cls(n_scales, dim, by[:, None] * fix_signs(axes[:, leading]))

    @property
    def n_inputs(self) -> int:
        """Return the inputs of the ridge."""
        return self.n_scales * (self.dim if self.projection is None else self.projection.shape[1])

    def project(self, pooled: Floats) -> Floats:
        """Return pooled embeddings, ``(n, dim)``, projected, ``(n, n_projected)``; the same array without a projection."""
        return pooled if self.projection is None else pooled @ self.projection

    def add_scale(self, inputs: Floats, scale: int, pooled: Floats) -> None:
        """Write embeddings pooled at a scale, ``(n, dim)``, into the inputs, ``(n, n_inputs)``.

        Scales come in order, the narrowest first. So one array is filled, which is the largest of a training in memory.
        """
        n, own = self.n_inputs // self.n_scales, self.project(pooled)
        inputs[:, scale * n : (scale + 1) * n] = own
        if scale > 0:
            inputs[:, (scale - 1) * n : scale * n] -= own

    def reference(self, of_scales: Floats) -> Floats:
        """Return the inputs where every scale has the same embedding, ``(dim,)``."""
        own = self.project(of_scales)
        return np.concatenate([np.zeros(self.n_inputs - len(own)), own])

    def standardiser(self, found: Standardiser, means: Sequence[Floats]) -> Standardiser:
        """Return how the inputs are standardised.

        Embeddings that are taken as they are: each input by itself, as at each scale. Components of a projection: all of
        a scale alike, so that the last ones stay as small as they are. Each by itself, the ridge gained nothing on the
        pretrained network (0.000), and 0.009 this way.

        Parameters
        ----------
        found
            Mean and standard deviation of the inputs, ``(n_inputs,)``.
        means
            Of the embeddings at each scale, ``(dim,)`` each.
        """
        if self.projection is None:
            # Of a feature that is constant but not 0, the differences are rounding, which `found` takes for small ones.
            least = 1e-6 * np.abs(np.concatenate(list(means)))
            return Standardiser(found.mean, np.where(found.scale > least, found.scale, np.inf))
        variance = np.where(np.isfinite(found.scale), found.scale, 0.0) ** 2
        spread = np.sqrt(variance.reshape(self.n_scales, -1).mean(axis=1))
        spread = np.where(spread > 0, spread, np.inf)
        return Standardiser(found.mean, np.repeat(spread, self.n_inputs // self.n_scales))

    def to_scales(self, weight: Floats) -> list[Floats]:
        """Return weights of the inputs, ``(n_inputs, n_outputs)``, as weights of the embedding at each scale."""
        own = np.split(weight, self.n_scales)
        # Scale i is in its own difference, and with the other sign in that of the narrower scale.
        folded = [own[0], *(part - before for before, part in pairwise(own))]
        return [part if self.projection is None else self.projection @ part for part in folded]

    def stain_covariance(self, own: Floats, around: Floats) -> Floats:
        """Return the covariance of the inputs' shifts with stain, ``(n_inputs, n_inputs)``.

        A stain shifts the means around a patch alike, so that it leaves the differences between them.

        Parameters
        ----------
        own, around
            Covariances of the shifts of a patch less those of the whole slide, and of the whole slide, ``(dim, dim)``.
        """
        n = self.n_inputs // self.n_scales
        found = np.zeros((self.n_inputs, self.n_inputs))
        for start, covariance in ((0, own), (self.n_inputs - n, around)):
            part = slice(start, start + n)
            found[part, part] = self.project(self.project(covariance).T)
        return found


def is_projected(dim: int) -> bool:
    """Tell whether embeddings of so many numbers are projected."""
    return dim > MAX_DIM


def sample_patches(embedding: NDArray[np.floating], under: Indices) -> NDArray[np.floating]:
    """Return the embeddings of some patches under spots, evenly spread, ``(at most SAMPLED, dim)``.

    Only of those: tissue that no spot sees, in particular that of a held-out part, has no part in a fit.

    Parameters
    ----------
    embedding
        Of all patches of a slide, ``(n_patches, dim)``.
    under
        Indices of the patches under spots.
    """
    step = _step(len(embedding), _CANDIDATES)
    return _under_spots(embedding[::step], step, under)


class PatchSample:
    """`sample_patches` of embeddings that come in parts, before it is known which patches lie under spots."""

    def __init__(self) -> None:
        self._step = 1
        self._n_seen = 0
        self._parts: list[NDArray[np.floating]] = []

    def add(self, embedding: NDArray[np.floating]) -> None:
        """Look at the next ``(n, dim)`` embeddings."""
        # Copies: a view would keep the whole block. In half precision, as stores hold embeddings.
        self._parts.append(embedding[-self._n_seen % self._step :: self._step].astype(np.float16))
        self._n_seen += len(embedding)
        while sum(map(len, self._parts)) > _CANDIDATES:
            # Every second one is left out whenever there are too many, so that any way of reading ends with the same.
            self._step *= 2
            self._parts = [np.concatenate(self._parts)[::2]]

    def rows(self, dim: int, under: Indices) -> NDArray[np.floating]:
        """Return the sample, ``(at most SAMPLED, dim)``."""
        every = np.concatenate([np.empty((0, dim), np.float16), *self._parts])
        return _under_spots(every, self._step, under)


def _under_spots(candidates: NDArray[np.floating], step: int, under: Indices) -> NDArray[np.floating]:
    """Return those of every ``step``-th patch that lie under spots, evenly thinned out."""
    found: NDArray[np.floating] = candidates[np.unique(under[under % step == 0]) // step]
    return found[:: _step(len(found), SAMPLED)]


def _step(n: int, most: int) -> int:
    """Return the least power of 2 that thins n out to as many as there may be."""
    step = 1
    while -(-n // step) > most:
        step *= 2
    return step


def fold_weights(
    ridges: Sequence[Affine], weights: Floats, differences: ScaleDifferences | None
) -> list[Floats]:
    """Return the weighted sum of ridges as one weight of pooled embeddings per scale, ``(dim, n_outputs)``.

    Parameters
    ----------
    ridges
        One for each scale, and with `differences` one more on those.
    """
    scaled = [weight * ridge.weight for weight, ridge in zip(weights, ridges, strict=True)]
    if differences is None:
        return scaled
    added = differences.to_scales(scaled.pop())
    return [own + more for own, more in zip(scaled, added, strict=True)]
