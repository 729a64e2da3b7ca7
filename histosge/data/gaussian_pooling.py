"""Gaussian-weighted moments of the embeddings around each patch, at several scales at once.

Positions may be missing (background): a missing patch gets no weight, a patch at the rim of the tissue as much as its
share of tissue, and weights are normalised over the patches that exist. A Gaussian on a grid is a product of two banded
matrices, one along columns and one along rows; both are multiplied in float32, so standard deviations are taken of
differences from a centre that is given. A fit pools in double precision: it takes differences of neighbouring scales.

Terms
    moment   mean or standard deviation of the embeddings, weighted by a Gaussian of the distance of a given sigma
    lattice  the rectangle of positions around the wanted patches, 0 where there is no patch
    strip    `_STRIP` rows or columns of the lattice, which one product of matrices pools
"""

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from histosge.data.sections import Patches

TRUNCATE = 3.0
"""Sigmas after which a Gaussian is cut off, which gives the halo: beyond lie 0.3 % of its weight along an axis."""
KINDS = ("mean", "sd")
RIM_SHARE = 0.5
"""Share of tissue below which a patch lies at the rim. Its own embedding is that of background at least as much as of
tissue, so that where the patch itself is wanted, the narrowest Gaussian around it is taken."""
_MAX_LATTICE_BYTES = 64 << 20
"""Working memory of the features that are pooled together, about."""
_FEATURES_AT_ONCE = 128
"""Features pooled together, at most: more do not fit the processor's cache."""
_STRIP = 8
"""Rows or columns that one product of matrices pools: with more, it has more zeros to multiply."""
_MAX_CACHED_PATCHES = 20_000
"""Patches of a window, at most, whose lattice is kept for the next window of the same shape."""
_SMALL_BUFFER = 1 << 18
"""Buffers of at most this many values are kept even if the next one needed is much smaller."""
_ROUNDING = np.float32(1e-6)
"""A variance below this share of the mean square is what rounding leaves of a constant."""

Values = NDArray[np.float32]
Precision = Literal["float32", "float64"]
Precise = NDArray[Any]
"""In the precision that was chosen."""
Indices = NDArray[np.int64]


class Moment(NamedTuple):
    """A weighted moment of the embeddings around a patch.

    Parameters
    ----------
    sigma_um
        Standard deviation of the Gaussian; 0 is the patch itself.
    kind
        ``mean`` or ``sd``.
    """

    sigma_um: float
    kind: str


def gaussian_pool(
    patches: Patches, sigma_um: float, kinds: Sequence[str] = KINDS, of: Indices | None = None
) -> Values:
    """Pool the embeddings around each patch by a Gaussian: mean, standard deviation or both.

    Only patches that exist have weight, so background neither dilutes nor leaks in. A patch's result
    depends on nothing further than ``TRUNCATE * sigma_um`` along either axis.

    Parameters
    ----------
    patches
        Of one slide, no position twice.
    sigma_um
        Standard deviation of the Gaussian, positive.
    kinds
        From `KINDS`, in the order wanted.
    of
        Indices of the patches to pool around; all if None.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_patches or len(of), dim * len(kinds))``, moment after moment. Costs patches x dim x
        window side, as products of matrices; working memory beyond the result is bounded.

    Raises
    ------
    ValueError
        If sigma is not positive, or a kind unknown.
    """
    dim = patches.embedding.shape[1]
    moments = [Moment(sigma_um, kind) for kind in kinds]
    pooled = np.empty((len(patches) if of is None else len(of), dim * len(moments)), np.float32)
    for moment, features, values in pool_moments(patches, moments, of):
        start = moments.index(moment) * dim
        pooled[:, start + features.start : start + features.stop] = values
    return pooled


def pool_moments(
    patches: Patches,
    moments: Sequence[Moment],
    of: Indices | None = None,
    centre: Values | None = None,
    precision: Precision = "float32",
) -> Iterator[tuple[Moment, slice, Precise]]:
    """Yield ``(moment, features, values)``, a few features at a time, until all moments of all features are done.

    `values`, ``(n_patches or len(of), n_features)``, is overwritten by the next one: copy what is to be kept.

    Parameters
    ----------
    patches, of
        As in `gaussian_pool`.
    moments
        None twice. Sigma 0 is the patch itself, whose standard deviation is not defined.
    centre
        Subtracted from the embeddings first, ``(dim,)``; 0 if None. Means are of the differences.
    precision
        Of the arithmetic and of the values.

    Raises
    ------
    ValueError
        If a moment is none of these.
    """
    for sigma_um, kind in moments:
        if kind not in KINDS or not (sigma_um > 0 or (sigma_um == 0 and kind == "mean")):
            raise ValueError(
                f"cannot pool {kind!r} at sigma {sigma_um} µm: give one of {', '.join(KINDS)} and a sigma above 0"
            )
    of = np.arange(len(patches)) if of is None else of
    if len(of) == 0:
        return
    sigmas_um = tuple(dict.fromkeys(sigma_um for sigma_um, _ in moments if sigma_um > 0))
    lattice = _Lattice.from_patches(patches, sigmas_um, of, precision)
    # About eight arrays of the lattice's size are alive at once.
    dim, item_bytes = patches.embedding.shape[1], np.dtype(precision).itemsize
    width = min(_FEATURES_AT_ONCE, _MAX_LATTICE_BYTES // (8 * item_bytes * lattice.size) + 1)
    for start in range(0, dim, width):
        features = slice(start, min(start + width, dim))
        part = patches.embedding[:, features]
        offset = np.zeros(1, precision) if centre is None else centre[features]
        if (0.0, "mean") in moments:
            yield Moment(0.0, "mean"), features, _subtract(part[of], offset, precision)
        for moment, values in lattice.pool(part, offset, moments):
            yield moment, features, values


def sum_pooled(patches: Patches, sigmas_um: Sequence[float], of: Indices | None = None) -> Values:
    """Pool each group of features by a Gaussian of its own, and add the groups up.

    A weighted mean commutes with a linear map: what is projected first and pooled here costs a filter over the few
    outputs of the map, and not over all features of the embedding.

    Parameters
    ----------
    patches, of
        As in `gaussian_pool`. The embedding, ``(n_patches, len(sigmas_um) * n)``, holds a group of n features per sigma.
    sigmas_um
        None twice; 0 is the patch itself.

    Returns
    -------
    numpy.ndarray
        ``(n_patches or len(of), n)``.
    """
    of = np.arange(len(patches)) if of is None else of
    n = patches.embedding.shape[1] // len(sigmas_um)
    total = np.zeros((len(of), n), np.float32)
    if len(of) == 0:
        return total
    lattice = _Lattice.from_patches(patches, tuple(sigma for sigma in sigmas_um if sigma > 0), of)
    filled, no_offset = _buffer("filled", (1, *lattice.shape, n)), np.zeros(1, np.float32)
    for i, sigma_um in enumerate(sigmas_um):
        group = patches.embedding[:, i * n : (i + 1) * n]
        if sigma_um == 0:
            own = group[of]
            rim = np.zeros(0, bool) if patches.tissue_share is None else patches.tissue_share[of] < RIM_SHARE
            if rim.any() and lattice.bands:
                lattice.fill(group, no_offset, filled[0])
                own[rim] = lattice.mean(min(lattice.bands), filled)[rim]
            total += own
        else:
            lattice.fill(group, no_offset, filled[0])
            total += lattice.mean(sigma_um, filled)
    return total


@dataclass(frozen=True)
class _Lattice:
    """A rectangle of grid positions: all that Gaussians around the wanted patches reach, in whole strips.

    Parameters
    ----------
    inner
        Rows and columns of the box around the wanted patches, each a multiple of `_STRIP`.
    margin
        Positions on each side of it, as many as the widest Gaussian reaches.
    inside
        Indices of the patches in the rectangle; None where all are.
    positions
        Of those patches in the rectangle, counted row by row; None where they fill it in order.
    box
        Positions of the wanted patches in the box, counted row by row; None where they fill it in order.
    bands, scale
        Per sigma: its Gaussian, and 1 / the weight of all existing patches around each wanted one, ``(n, 1)``.
    share
        Weight of each position, ``(*shape, 1)``; None where all patches have the same.
    precision
        Of all arrays.
    """

    inner: tuple[int, int]
    margin: int
    inside: Indices | None
    positions: Indices | None
    box: Indices | None
    bands: "dict[float, _Band]"
    scale: dict[float, Precise]
    share: Precise | None = None
    precision: Precision = "float32"

    @classmethod
    def from_patches(
        cls,
        patches: Patches,
        sigmas_um: tuple[float, ...],
        of: Indices,
        precision: Precision = "float32",
    ) -> Self:
        """Place patches on a lattice; the last few lattices are kept, as most windows of a slide have one shape."""
        rows, cols = ((at - at[of].min()).astype(np.int64) for at in (patches.rows, patches.cols))
        of = of.astype(np.int64)
        share = patches.tissue_share
        # Whole patches, as nearly all are: nothing is multiplied, and the bits stay those of equal weights.
        if share is not None and (share == 1).all():
            share = None
        in_strides = tuple(sigma_um / patches.stride_um for sigma_um in sigmas_um)
        if len(rows) > _MAX_CACHED_PATCHES:
            return cls._from_positions(rows, cols, of, share, sigmas_um, in_strides, precision)
        weights = b"" if share is None else share.astype(np.float32).tobytes()
        positions = rows.tobytes(), cols.tobytes(), of.tobytes()
        return cls._from_bytes(*positions, weights, sigmas_um, in_strides, precision)

    @classmethod
    @lru_cache(maxsize=8)
    def _from_bytes(
        cls,
        rows: bytes,
        cols: bytes,
        of: bytes,
        weights: bytes,
        sigmas_um: tuple[float, ...],
        in_strides: tuple[float, ...],
        precision: Precision,
    ) -> Self:
        # Arrays cannot be keys of a cache: their bytes can.
        arrays = [np.frombuffer(part, np.int64) for part in (rows, cols, of)]
        share = np.frombuffer(weights, np.float32) if weights else None
        return cls._from_positions(arrays[0], arrays[1], arrays[2], share, sigmas_um, in_strides, precision)

    @classmethod
    def _from_positions(
        cls,
        rows: Indices,
        cols: Indices,
        of: Indices,
        share: Values | None,
        sigmas_um: tuple[float, ...],
        in_strides: tuple[float, ...],
        precision: Precision,
    ) -> Self:
        """Place patches at rows and columns that are counted from the first wanted ones."""
        bands = {
            sigma_um: _band(sigma, precision) for sigma_um, sigma in zip(sigmas_um, in_strides, strict=True)
        }
        margin = max((band.reach for band in bands.values()), default=0)
        inner = _whole_strips(int(rows[of].max()) + 1), _whole_strips(int(cols[of].max()) + 1)
        shape = inner[0] + 2 * margin, inner[1] + 2 * margin
        box = rows[of] * inner[1] + cols[of]
        rows, cols = rows + margin, cols + margin
        within = (rows >= 0) & (rows < shape[0]) & (cols >= 0) & (cols < shape[1])
        inside = None if within.all() else np.flatnonzero(within)
        positions = (rows * shape[1] + cols)[within]
        lattice = cls(
            inner,
            margin,
            inside,
            _none_if_in_order(positions, shape),
            _none_if_in_order(box, inner),
            bands,
            {},
            None,
            precision,
        )
        # The weights of the patches that exist: a pooled 1. Dividing by it keeps background from diluting a mean.
        ones = np.ones(len(within), precision) if share is None else share
        exists = lattice.fill(ones[:, None], np.zeros(1, precision))
        scale = {
            sigma_um: np.dtype(precision).type(1) / lattice.sum(sigma_um, exists[None])[0]
            for sigma_um in bands
        }
        return replace(lattice, scale=scale, share=None if share is None else exists)

    @property
    def shape(self) -> tuple[int, int]:
        return self.inner[0] + 2 * self.margin, self.inner[1] + 2 * self.margin

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def fill(self, values: NDArray[np.floating], offset: Precise, out: Precise | None = None) -> Precise:
        """Place ``(n_patches, n)`` values less an offset on the lattice, ``(*shape, n)``; 0 where no patch is."""
        n = values.shape[1]
        filled = np.empty((self.size, n), self.precision) if out is None else out.reshape(self.size, n)
        values = values if self.inside is None else values[self.inside]
        if self.positions is None:
            _subtract(values, offset, self.precision, filled)
        else:
            filled[:] = 0
            filled[self.positions] = _subtract(values, offset, self.precision)
        return filled.reshape(*self.shape, n)

    def pool(
        self, values: NDArray[np.floating], offset: Precise, moments: Sequence[Moment]
    ) -> Iterator[tuple[Moment, Precise]]:
        """Yield those moments of ``(n_patches, n)`` values whose sigma is positive."""
        squared = any(kind == "sd" for _, kind in moments)
        filled = _buffer("filled", (1 + squared, *self.shape, values.shape[1]), self.precision)
        self.fill(values, offset, filled[0])
        if squared:
            np.multiply(filled[0], filled[0], out=filled[1])
        weighted = filled if self.share is None else np.multiply(filled, self.share, out=filled)
        for sigma_um in self.bands:
            kinds = [kind for other, kind in moments if other == sigma_um]
            summed = self.sum(sigma_um, weighted if "sd" in kinds else weighted[:1])
            summed *= self.scale[sigma_um]
            for kind in kinds:
                yield (
                    Moment(sigma_um, kind),
                    summed[0] if kind == "mean" else _standard_deviation(summed[1], summed[0]),
                )

    def mean(self, sigma_um: float, filled: Precise) -> Precise:
        """Return the weighted mean around each wanted patch, ``(n_wanted, n)``; the filled plane is overwritten."""
        if self.share is not None:
            np.multiply(filled, self.share, out=filled)
        return np.asarray(self.sum(sigma_um, filled)[0] * self.scale[sigma_um])

    def sum(self, sigma_um: float, filled: Precise) -> Precise:
        """Return the weighted sum around each wanted patch, ``(n_planes, n_wanted, n)``, of each plane of the lattice."""
        band, (planes, _, _, n) = self.bands[sigma_um], filled.shape
        rows, cols = self.inner
        # A narrower Gaussian than the widest does not reach the outer part of the margin.
        unused = self.margin - band.reach
        reached = filled[:, unused : filled.shape[1] - unused, unused : filled.shape[2] - unused]
        over_rows = _buffer("over_rows", (planes, rows, cols + 2 * band.reach, n), self.precision)
        band.apply(reached, over_rows)
        summed = _buffer("summed", (planes * rows, cols, n), self.precision)
        band.apply(over_rows.reshape(planes * rows, -1, n), summed)
        every = summed.reshape(planes, rows * cols, n)
        return every if self.box is None else every[:, self.box]


@dataclass(frozen=True)
class _Band:
    """A Gaussian along one axis, for the positions of one strip: the same for every strip.

    Parameters
    ----------
    weight
        Of all positions that a strip reaches, ``(_STRIP, _STRIP + 2 * reach)``.
    reach
        Positions to each side.
    """

    weight: Precise
    reach: int

    def apply(self, values: Precise, out: Precise) -> None:
        """Pool ``(m, n_out + 2 * reach, ...)`` along the second axis, into ``(m, n_out, ...)``, which is contiguous."""
        m, n_out, n = *out.shape[:2], math.prod(out.shape[2:])
        # Overlapping strips as one strided view, multiplied in one call: a loop over strips takes Python's lock for each,
        # and threads that predict blocks side by side wait for each other there.
        strips = as_strided(
            values,
            (m, n_out // _STRIP, self.weight.shape[1], n),
            (values.strides[0], _STRIP * values.strides[1], values.strides[1], values.strides[-1]),
            writeable=False,
        )
        np.matmul(self.weight, strips, out=out.reshape(m, n_out // _STRIP, _STRIP, n))


@cache
def _band(sigma: float, precision: Precision) -> _Band:
    """Weight positions by their distance, cut off at `TRUNCATE` sigmas; sigma is in strides of the grid."""
    # The tolerance lets 3 x 56 / 56 be 3 whatever the rounding of the stride.
    reach = int(np.floor(TRUNCATE * sigma + 1e-6))
    step = np.arange(-reach, _STRIP + reach) - np.arange(_STRIP)[:, None]
    weight = np.where(abs(step) <= reach, np.exp(-((step / sigma) ** 2) / 2), 0.0)
    return _Band(weight.astype(precision), reach)


def _whole_strips(n: int) -> int:
    return -(-n // _STRIP) * _STRIP


def _none_if_in_order(positions: Indices, shape: tuple[int, int]) -> Indices | None:
    """Return positions in a rectangle, counted row by row; None where they are all of them, in order."""
    # Copying is cheaper than gathering by index, and a window inside the tissue has no gaps.
    in_order = len(positions) == math.prod(shape) and bool((np.diff(positions) == 1).all())
    return None if in_order else positions


_thread = threading.local()


def _buffer(name: str, shape: tuple[int, ...], precision: Precision = "float32") -> Precise:
    """Return this thread's array of a name, uninitialised: allocating a new one costs as much as a product."""
    held: dict[str, Precise] = _thread.__dict__
    # A fit pools in double precision and predicts in single: an array for each, or both would be allocated in turns.
    name = f"{name} {precision}"
    size = math.prod(shape)
    # One that is far too large is let go, or a thread would hold the largest it ever needed.
    if name not in held or not size <= held[name].size <= 4 * size + _SMALL_BUFFER:
        held[name] = np.empty(size, precision)
    return held[name][:size].reshape(shape)


def _subtract(
    values: NDArray[np.floating],
    offset: Precise,
    precision: Precision,
    out: Precise | None = None,
) -> Precise:
    difference: Precise = np.subtract(values, offset, out=out, dtype=precision, casting="same_kind")
    return difference


def _standard_deviation(mean_square: Precise, mean: Precise) -> Precise:
    precision: Precision = "float32" if mean.dtype == np.float32 else "float64"
    variance = np.multiply(mean, mean, out=_buffer("variance", mean.shape, precision))
    np.subtract(mean_square, variance, out=variance)
    # Rounding leaves a constant feature a tiny spread: standardised to 1, it would dominate every prediction.
    variance[variance <= _ROUNDING * mean_square] = 0
    return np.sqrt(variance, out=variance)
