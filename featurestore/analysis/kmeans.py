"""Clusters of patches over a whole cohort: k-means by passes over the store.

One pass draws a sample. On it k-means++ (Arthur & Vassilvitskii, 2007) and a few Lloyd iterations find the initial
centres. Lloyd passes then read the store until the centres converge, and a last pass counts. The same seed and store
give the same clusters. Memory holds the sample, the centres and a few blocks.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featurestore.analysis.patch_stream import PatchBlock, PatchStream
from featurestore.analysis.patch_tables import check_folder, write_patches
from featurestore.errors import StoreError

Matrix = NDArray[np.float64]
SAMPLE_PER_CLUSTER = 50
"""Fewest patches in the sample per cluster, whatever `KMeansSettings.sample` says."""
SAMPLE_ITERATIONS = 20
"""Lloyd iterations on the sample. It is in memory, so they cost nothing beside a pass over the store."""


@dataclass(frozen=True)
class KMeansSettings:
    """How to cluster.

    Parameters
    ----------
    k
        Number of clusters.
    seed
        Of the sample and of k-means++.
    passes
        Lloyd passes over the store at most; 0 keeps the centres found on the sample.
    tolerance
        The centres have converged when their mean squared step is at most this share of the features' mean variance.
    mini_batch
        Update the centres after each block instead of after each pass (Sculley, 2010). It needs fewer passes; but
        slides are read one after the other, so the last ones have more influence on the centres.
    sample
        Patches in the sample; at least `SAMPLE_PER_CLUSTER` per cluster are drawn.
    """

    k: int = 8
    seed: int = 0
    passes: int = 10
    tolerance: float = 1e-4
    mini_batch: bool = False
    sample: int = 4096

    def __post_init__(self) -> None:
        if self.k < 1 or self.passes < 0:
            raise StoreError(f"k-means needs at least 1 cluster and 0 passes, not {self.k} and {self.passes}")


@dataclass(frozen=True)
class KMeans:
    """Fitted clusters, numbered from 0, the most common in the cohort first (by the counts before the last pass).

    Parameters
    ----------
    centres
        ``(k, dim)``.
    inertia
        Sum over patches of the squared distance to their centre.
    counts
        One row per slide and cluster: `slide`, `cluster`, `patches`, `share` of the slide's patches.
    passes
        How many times the store was read.
    converged
        Whether the last step of the centres was within the tolerance.
    encoder
        Fingerprint of the encoder whose embeddings these are.
    """

    centres: Matrix
    inertia: float
    counts: pl.DataFrame
    passes: int
    converged: bool
    encoder: str

    def assign(self, values: NDArray[np.float32]) -> NDArray[np.int64]:
        """Return each patch's cluster, ``(n, dim) -> (n,)``."""
        return nearest_centre(values, self.centres)[0]


def fit_kmeans(
    stream: PatchStream, settings: KMeansSettings | None = None, labels: Path | None = None
) -> KMeans:
    """Cluster all patches of a stream.

    Parameters
    ----------
    labels
        Folder for one table per slide: `slide`, `row`, `col`, `x_um`, `y_um`, `cluster`. Written in the last pass.

    Raises
    ------
    StoreError
        If there are fewer patches than clusters.
    """
    settings = settings or KMeansSettings()
    if labels is not None:
        check_folder(labels)
    before, rng = stream.passes, np.random.default_rng(settings.seed)
    sample = reservoir_sample(stream, max(settings.sample, SAMPLE_PER_CLUSTER * settings.k), settings.seed)
    if len(sample) < settings.k:
        raise StoreError(
            f"{len(sample)} patches cannot form {settings.k} clusters; give at most {len(sample)} for k"
        )
    scale = float(sample.var(axis=0).mean())  # the tolerance is relative to it, as in scikit-learn
    centres, sizes = _fit_sample(sample, settings, rng)
    converged = False
    for _ in range(settings.passes):
        updated, sizes = (_mini_batch_pass if settings.mini_batch else _lloyd_pass)(stream, centres)
        step = float(((updated - centres) ** 2).mean())
        centres, converged = updated, step <= settings.tolerance * scale
        if converged:
            break
    # Clusters have no order of their own: by size, so that runs and reports agree on the numbers.
    centres = centres[np.argsort(-sizes, kind="stable")]
    inertia, counts = _assign_and_count(stream, centres, labels, _made_by(stream, settings))
    return KMeans(centres, inertia, counts, stream.passes - before, converged, stream.encoder)


def nearest_centre(values: NDArray[np.floating], centres: Matrix) -> tuple[NDArray[np.int64], Matrix]:
    """Return the nearest centre of each row and the squared distance to it; ties go to the lower number."""
    rows = values.astype(np.float64)
    # |x - c|^2 without the term |x|^2, which is the same for all centres of a row.
    distances = (centres**2).sum(axis=1) - 2 * (rows @ centres.T)
    label = distances.argmin(axis=1)
    nearest = distances[np.arange(len(rows)), label] + np.einsum("nd,nd->n", rows, rows)
    return label, np.maximum(nearest, 0)  # the difference of two large numbers may come out slightly negative


def reservoir_sample(stream: PatchStream, size: int, seed: int) -> Matrix:
    """Draw up to `size` patches in one pass, each with equal probability: those with the smallest random keys."""
    return stream.fold(partial(_Reservoir, stream.dim, size, seed)).kept.astype(np.float64)


def patch_keys(
    seed: int, slide_id: str, rows: NDArray[np.int64], cols: NDArray[np.int64]
) -> NDArray[np.uint64]:
    """Return a random number for each patch, which depends on the seed and on the patch's place alone.

    So the sample of a cohort is the same however its blocks are shared out among processes. It is the finaliser of
    SplitMix64 (Steele, Lea & Flood, 2014, "Fast splittable pseudorandom number generators"), which maps a counter to
    independent bits.
    """
    digest = hashlib.blake2b(f"{seed}/{slide_id}".encode(), digest_size=8).digest()
    # Rows and columns are below 2**31, see `featurestore.storage.stored_documents`.
    place = (rows.astype(np.uint64) << np.uint64(32)) | cols.astype(np.uint64)
    keys = place * np.uint64(0x9E3779B97F4A7C15) + np.uint64(int.from_bytes(digest, "little"))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    mixed: NDArray[np.uint64] = keys ^ (keys >> np.uint64(31))
    return mixed


class _Reservoir:
    """The patches with the smallest keys among those added so far, in the order of reading."""

    def __init__(self, dim: int, size: int, seed: int) -> None:
        self._size, self._seed = size, seed
        self._keys = np.empty(0, np.uint64)
        self.kept = np.empty((0, dim), np.float32)

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block."""
        keys = patch_keys(self._seed, patches.slide_id, patches.rows, patches.cols)
        if len(self._keys) >= self._size:  # once the sample is full, only smaller keys enter
            better = keys < self._keys.max()
            if better.any():
                self._keep(keys[better], patches.values[better])
        else:
            self._keep(keys, patches.values)

    def merge(self, other: Self) -> None:
        """Add the sample of other blocks."""
        self._keep(other._keys, other.kept)

    def _keep(self, keys: NDArray[np.uint64], values: NDArray[np.float32]) -> None:
        self._keys = np.concatenate([self._keys, keys])
        self.kept = np.concatenate([self.kept, values])
        if len(self._keys) > self._size:
            stay = np.sort(np.argsort(self._keys, kind="stable")[: self._size])
            self._keys, self.kept = self._keys[stay], self.kept[stay]


def plus_plus(sample: Matrix, k: int, rng: np.random.Generator) -> Matrix:
    """Choose `k` rows far apart: each the best of a few that are drawn by their squared distance to the chosen ones."""
    tries = 2 + int(np.log(k))  # greedy k-means++, with as many trials as in scikit-learn
    chosen = [int(rng.integers(len(sample)))]
    distance = ((sample - sample[chosen[0]]) ** 2).sum(axis=1)
    for _ in range(1, k):
        total = distance.sum()
        weights = distance / total if total > 0 else np.full(len(sample), 1 / len(sample))
        drawn = rng.choice(len(sample), size=tries, p=weights)
        kept = [np.minimum(distance, ((sample - sample[i]) ** 2).sum(axis=1)) for i in drawn]
        best = int(np.argmin([d.sum() for d in kept]))
        chosen.append(int(drawn[best]))
        distance = kept[best]
    return sample[chosen]


def _fit_sample(
    sample: Matrix, settings: KMeansSettings, rng: np.random.Generator
) -> tuple[Matrix, NDArray[np.int64]]:
    """Find centres on the sample; an empty cluster is moved to the row that is farthest from its centre."""
    centres = plus_plus(sample, settings.k, rng)
    for _ in range(SAMPLE_ITERATIONS):
        label, distance = nearest_centre(sample, centres)
        sums, sizes = _sums(sample, label, settings.k)
        updated = _means(sums, sizes, centres)
        empty = np.flatnonzero(sizes == 0)
        updated[empty] = sample[np.argsort(-distance, kind="stable")[: len(empty)]]
        if np.array_equal(updated, centres):
            break
        centres = updated
    return centres, np.bincount(nearest_centre(sample, centres)[0], minlength=settings.k)


def _sums(values: NDArray[np.floating], label: NDArray[np.int64], k: int) -> tuple[Matrix, NDArray[np.int64]]:
    # A sparse product, since np.add.at adds row by row.
    one_hot = csr_array((np.ones(len(label)), label, np.arange(len(label) + 1)), shape=(len(label), k))
    return np.asarray(one_hot.T @ values.astype(np.float64)), np.bincount(label, minlength=k)


def _means(sums: Matrix, sizes: NDArray[np.int64], centres: Matrix) -> Matrix:
    """Return the means; a centre without patches keeps its position."""
    return np.where(sizes[:, None] > 0, sums / np.maximum(sizes, 1)[:, None], centres)


class _ClusterSums:
    """Sum and number of the patches nearest to each centre."""

    def __init__(self, centres: Matrix) -> None:
        self._centres = centres
        self.sums, self.sizes = np.zeros_like(centres), np.zeros(len(centres), np.int64)

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block."""
        label, _ = nearest_centre(patches.values, self._centres)
        of_block, counted = _sums(patches.values, label, len(self._centres))
        self.sums += of_block
        self.sizes += counted

    def merge(self, other: Self) -> None:
        """Add the sums of other blocks."""
        self.sums += other.sums
        self.sizes += other.sizes


def _lloyd_pass(stream: PatchStream, centres: Matrix) -> tuple[Matrix, NDArray[np.int64]]:
    summed = stream.fold(partial(_ClusterSums, centres))
    return _means(summed.sums, summed.sizes, centres), summed.sizes


def _mini_batch_pass(stream: PatchStream, centres: Matrix) -> tuple[Matrix, NDArray[np.int64]]:
    updated, sizes = centres.copy(), np.zeros(len(centres), np.int64)
    for patches in stream.blocks():
        label, _ = nearest_centre(patches.values, updated)
        of_block, counted = _sums(patches.values, label, len(updated))
        sizes += counted
        updated += (of_block - counted[:, None] * updated) / np.maximum(sizes, 1)[:, None]
    return updated, sizes


class _Labels:
    """Number of patches of each cluster, the squared distances to the centres, and, if kept, each patch's cluster."""

    def __init__(self, centres: Matrix, *, keep: bool) -> None:
        self._centres, self._keep = centres, keep
        self.counts = np.zeros(len(centres), np.int64)
        self.distances: list[float] = []
        self.placed: list[tuple[NDArray[np.int64], ...]] = []

    def __getstate__(self) -> dict[str, object]:
        # Labels travel to the process that writes them, without the centres.
        return {**self.__dict__, "_centres": self._centres[:0]}

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block."""
        label, distance = nearest_centre(patches.values, self._centres)
        # Block by block, so that the sum over the cohort is added in one order, whoever read the blocks.
        self.distances.append(float(distance.sum()))
        self.counts += np.bincount(label, minlength=len(self._centres))
        if self._keep:
            self.placed.append((patches.rows, patches.cols, label))

    def merge(self, other: Self) -> None:
        """Add the labels of other blocks."""
        self.distances += other.distances
        self.counts += other.counts
        self.placed += other.placed


def _made_by(stream: PatchStream, settings: KMeansSettings) -> str:
    """Say how labels were made, for whoever shows them."""
    # A few digits tell two of them apart. Of maps it is a list: that of the model comes first.
    digits = re.findall("[0-9a-f]{8,}", stream.encoder)
    made_with = digits[0][:16] if digits else stream.encoder[:16]
    if stream.columns is None:
        what = f"the embeddings of encoder {made_with}"
    else:
        what = f"the expression of {stream.dim} genes that model {made_with} predicts"
    return f"k-means with {settings.k} clusters and seed {settings.seed} on {what}"


def _assign_and_count(
    stream: PatchStream, centres: Matrix, labels: Path | None, made_by: str
) -> tuple[float, pl.DataFrame]:
    inertia = 0.0
    frames = []
    for slide, found in stream.fold_slides(partial(_Labels, centres, keep=labels is not None)):
        for distance in found.distances:
            inertia += distance
        if labels is not None:
            rows, cols, cluster = _concatenated(found.placed)
            write_patches(labels, slide, rows, cols, {"cluster": cluster.astype(np.int32)}, made_by)
        frames.append(_counts_frame(slide.slide_id, found.counts))
    return inertia, pl.concat(frames)


def _concatenated(parts: list[tuple[NDArray[np.int64], ...]]) -> tuple[NDArray[np.int64], ...]:
    nothing = np.empty(0, np.int64)
    return tuple(np.concatenate([nothing, *(part[i] for part in parts)]) for i in range(3))


def _counts_frame(slide_id: str, counts: NDArray[np.int64]) -> pl.DataFrame:
    total = max(int(counts.sum()), 1)
    return pl.DataFrame(
        {"cluster": np.arange(len(counts)), "patches": counts, "share": counts / total}
    ).select(pl.lit(slide_id).alias("slide"), pl.all())
