"""Embeddings as pictures: their first three principal components as colours, and clusters.

Components and clusters are fitted once on a sample of a few slides, so that a colour means the same on all of them, and are
then applied to the slides that are looked at. For the exact ones of a whole cohort there is `featurestore.analysis`.
"""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2, vq
from scipy.sparse.linalg import svds

from featurestore.blocks import Block
from featurestore.storage.block_array import BlockArray
from featurestore.storage.float16 import nan_rows
from featurestore.storage.layout import embedding_path
from featurestore.storage.store import Store, StoredGrid

SAMPLE_SLIDES = 8
SAMPLE_BLOCKS = 4
"""Of each of these slides, spread over its tissue: 32 blocks are some 100 MB, a second to read from a local disk."""
SAMPLE_PATCHES = 4096
COMPONENTS = 20
N_CLUSTERS = 8
"""As `histosge analyse STORE clusters` has by default."""
SMALL = 256
"""Up to this side an exact decomposition is faster than an iterative one."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pictures:
    """What is shown of a slide's embeddings.

    Parameters
    ----------
    rgba
        Components as colours, ``(n_rows, n_cols, 4)``; the last channel is 0 where there is no embedding.
    clusters
        ``(n_rows, n_cols)``; -1 where there is none.
    """

    rgba: NDArray[np.uint8]
    clusters: NDArray[np.int16]


@dataclass(frozen=True)
class _Fitted:
    mean: Floats
    axes: Floats
    low: Floats
    high: Floats
    centres: Floats

    @classmethod
    def fit(cls, sample: Floats) -> "_Fitted":
        mean = sample.mean(axis=0)
        axes = _principal_axes(sample - mean)
        scores = (sample - mean) @ axes
        # Percentiles, so that single patches do not take the whole range of colours.
        low, high = np.percentile(scores[:, :3], [2, 98], axis=0)
        n = min(N_CLUSTERS, len(np.unique(scores, axis=0)))
        centres, labels = kmeans2(scores, n, minit="++", seed=np.random.default_rng(0))
        # The largest is cluster 0, whatever centres k-means started from.
        order = np.argsort(-np.bincount(labels, minlength=n), kind="stable")
        return cls(mean, axes, low, np.maximum(high, low + 1e-9), centres[order])

    def apply(self, values: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.int16]]:
        """Return colours ``(n, 3)`` and clusters ``(n,)`` of embeddings ``(n, dim)``."""
        scores = (values - self.mean) @ self.axes
        shares = np.zeros((len(values), 3))
        width = len(self.low)
        shares[:, :width] = (scores[:, :width] - self.low) / (self.high - self.low)
        labels, _ = vq(scores, self.centres)
        return np.round(255 * np.clip(shares, 0, 1)).astype(np.uint8), labels.astype(np.int16)


def _principal_axes(centred: Floats) -> Floats:
    """Return the leading axes, ``(dim, k)``; the entry of largest size in each is positive."""
    k = min(COMPONENTS, *centred.shape)
    if min(centred.shape) <= SMALL:
        axes = np.linalg.svd(centred, full_matrices=False)[2][:k].T
    else:
        # A fixed start: the same store gives the same colours.
        start = np.random.default_rng(0).standard_normal(min(centred.shape))
        axes = svds(centred, k, v0=start)[2][::-1].T
    largest = np.take_along_axis(axes, np.abs(axes).argmax(axis=0)[None], axis=0)
    return np.asarray(axes * np.where(largest < 0, -1.0, 1.0))


class EmbeddingPictures:
    """The embeddings of a store, by grid: the first encoder of each is shown.

    Parameters
    ----------
    store
        The feature store.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._fitted: dict[tuple[str, str], _Fitted] = {}

    def encoder(self, slide_id: str, grid_key: str) -> str | None:
        """Return the slug of the encoder whose embeddings are shown; None where there are none."""
        slugs = self._store.encoder_slugs(slide_id, grid_key)
        return sorted(slugs)[0] if slugs else None

    def pictures(self, slide_id: str, grid_key: str) -> Pictures:
        """Compute both pictures of a slide.

        Raises
        ------
        LookupError
            If the store holds no embeddings of this grid.
        """
        slug = self.encoder(slide_id, grid_key)
        if slug is None:
            raise LookupError("the store holds no embeddings of this grid")
        fitted = self._fit(slide_id, grid_key, slug)
        stored, array = self._open(slide_id, grid_key, slug)
        rgba = np.zeros((*stored.grid.shape, 4), np.uint8)
        clusters = np.full(stored.grid.shape, -1, np.int16)
        for block in stored.planned(array.block_shape):
            values, inside = _embedded(array, stored, block)
            if len(values):
                colours, labels = fitted.apply(values)
                rgba[block.slices][inside] = np.concatenate(
                    [colours, np.full((len(colours), 1), 255, np.uint8)], axis=1
                )
                clusters[block.slices][inside] = labels
        return Pictures(rgba, clusters)

    def _open(self, slide_id: str, grid_key: str, slug: str) -> tuple[StoredGrid, BlockArray]:
        return (
            self._store.grid(slide_id, grid_key),
            BlockArray.open(self._store.location, embedding_path(slide_id, grid_key, slug)),
        )

    def _fit(self, slide_id: str, grid_key: str, slug: str) -> _Fitted:
        with self._lock:
            if (grid_key, slug) not in self._fitted:
                self._fitted[grid_key, slug] = _Fitted.fit(self._sample(slide_id, grid_key, slug))
            return self._fitted[grid_key, slug]

    def _sample(self, slide_id: str, grid_key: str, slug: str) -> Floats:
        ids = self._store.slide_ids()
        # Spread over the store, and always with the slide that is looked at, which may be the only one so far.
        chosen = dict.fromkeys([*ids[:: max(1, len(ids) // SAMPLE_SLIDES)][:SAMPLE_SLIDES], slide_id])
        parts = [
            part
            for name in chosen
            if slug in self._store.encoder_slugs(name, grid_key)
            for part in self._sample_slide(name, grid_key, slug)
        ]
        sample = np.concatenate(parts) if parts else np.empty((0, 1), np.float32)
        if len(sample) < COMPONENTS:
            raise LookupError("too few patches are embedded so far")
        picked = np.random.default_rng(0).permutation(len(sample))[:SAMPLE_PATCHES]
        return sample[picked].astype(np.float64)

    def _sample_slide(self, slide_id: str, grid_key: str, slug: str) -> list[NDArray[np.float32]]:
        stored, array = self._open(slide_id, grid_key, slug)
        blocks = stored.planned(array.block_shape)
        spread = blocks[:: max(1, len(blocks) // SAMPLE_BLOCKS)][:SAMPLE_BLOCKS]
        return [_embedded(array, stored, block)[0] for block in spread]


def _embedded(
    array: BlockArray, stored: StoredGrid, block: Block
) -> tuple[NDArray[np.float32], NDArray[Any]]:
    """Return a block's embeddings ``(n, dim)`` of tissue that was read, and which of its patches they are."""
    values = array.read_block(block)
    rows, cols = np.nonzero(stored.is_tissue[block.slices])
    found = np.ascontiguousarray(values[rows, cols])
    known = ~nan_rows(found)
    inside = np.zeros(values.shape[:2], bool)
    inside[rows[known], cols[known]] = True
    return found[known].astype(np.float32), inside
