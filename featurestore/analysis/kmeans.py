"""Clusters of patches over a whole cohort: k-means by passes over the store.

One pass draws a sample. On it k-means++ (Arthur & Vassilvitskii, 2007) and a few Lloyd iterations find the initial
centres. Lloyd passes then read the store until the centres converge, and a last pass counts. The same seed and store
give the same clusters. Memory holds the sample, the centres and a few blocks.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy.sparse import csr_array

from featurestore.analysis.patch_stream import PatchStream
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
    sample = reservoir_sample(stream, max(settings.sample, SAMPLE_PER_CLUSTER * settings.k), rng)
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
    inertia, counts = _assign_and_count(stream, centres, labels)
    return KMeans(centres, inertia, counts, stream.passes - before, converged, stream.encoder)


def nearest_centre(values: NDArray[np.floating], centres: Matrix) -> tuple[NDArray[np.int64], Matrix]:
    """Return the nearest centre of each row and the squared distance to it; ties go to the lower number."""
    rows = values.astype(np.float64)
    # |x - c|^2 without the term |x|^2, which is the same for all centres of a row.
    distances = (centres**2).sum(axis=1) - 2 * (rows @ centres.T)
    label = distances.argmin(axis=1)
    nearest = distances[np.arange(len(rows)), label] + np.einsum("nd,nd->n", rows, rows)
    return label, np.maximum(nearest, 0)  # the difference of two large numbers may come out slightly negative


def reservoir_sample(stream: PatchStream, size: int, rng: np.random.Generator) -> Matrix:
    """Draw up to `size` patches in one pass, each with equal probability: those with the smallest random keys."""
    keys = np.empty(0)
    kept = np.empty((0, stream.dim), np.float32)
    for patches in stream.blocks():
        drawn = rng.random(len(patches.rows))
        worst = (
            keys.max() if len(keys) >= size else np.inf
        )  # once the sample is full, only smaller keys enter
        better = drawn < worst
        if not better.any():
            continue
        keys = np.concatenate([keys, drawn[better]])
        kept = np.concatenate([kept, patches.values[better]])
        if len(keys) > size:
            stay = np.sort(np.argsort(keys, kind="stable")[:size])
            keys, kept = keys[stay], kept[stay]
    return kept.astype(np.float64)


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


def _lloyd_pass(stream: PatchStream, centres: Matrix) -> tuple[Matrix, NDArray[np.int64]]:
    sums, sizes = np.zeros_like(centres), np.zeros(len(centres), np.int64)
    for patches in stream.blocks():
        label, _ = nearest_centre(patches.values, centres)
        of_block, counted = _sums(patches.values, label, len(centres))
        sums += of_block
        sizes += counted
    return _means(sums, sizes, centres), sizes


def _mini_batch_pass(stream: PatchStream, centres: Matrix) -> tuple[Matrix, NDArray[np.int64]]:
    updated, sizes = centres.copy(), np.zeros(len(centres), np.int64)
    for patches in stream.blocks():
        label, _ = nearest_centre(patches.values, updated)
        of_block, counted = _sums(patches.values, label, len(updated))
        sizes += counted
        updated += (of_block - counted[:, None] * updated) / np.maximum(sizes, 1)[:, None]
    return updated, sizes


def _assign_and_count(
    stream: PatchStream, centres: Matrix, labels: Path | None
) -> tuple[float, pl.DataFrame]:
    inertia = 0.0
    frames = []
    for slide, blocks in stream.by_slide():
        counts = np.zeros(len(centres), np.int64)
        placed: list[tuple[NDArray[np.int64], ...]] = []
        for patches in blocks:
            label, distance = nearest_centre(patches.values, centres)
            inertia += float(distance.sum())
            counts += np.bincount(label, minlength=len(centres))
            if labels is not None:
                placed.append((patches.rows, patches.cols, label))
        if labels is not None:
            rows, cols, cluster = _concatenated(placed)
            write_patches(labels, slide, rows, cols, {"cluster": cluster.astype(np.int32)})
        frames.append(_counts_frame(slide.slide_id, counts))
    return inertia, pl.concat(frames)


def _concatenated(parts: list[tuple[NDArray[np.int64], ...]]) -> tuple[NDArray[np.int64], ...]:
    nothing = np.empty(0, np.int64)
    return tuple(np.concatenate([nothing, *(part[i] for part in parts)]) for i in range(3))


def _counts_frame(slide_id: str, counts: NDArray[np.int64]) -> pl.DataFrame:
    total = max(int(counts.sum()), 1)
    return pl.DataFrame(
        {"cluster": np.arange(len(counts)), "patches": counts, "share": counts / total}
    ).select(pl.lit(slide_id).alias("slide"), pl.all())
