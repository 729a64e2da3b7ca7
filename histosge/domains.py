"""Spatial domains by one fixed rule, and how well they agree with labels that the rule never sees.

The rule: standardise genes, keep `N_COMPONENTS` principal components, replace each position by the mean of itself
and its nearest positions, k-means from k-means++ starts. All seeds are reported; none is chosen.

Terms
    domain      a group of positions with similar expression
    unlabelled  a label of 0, empty or None: dropped before scoring, not counted as a class
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans2
from scipy.spatial import cKDTree

from histosge.models.linear import Standardiser, principal_axes

N_COMPONENTS = 15
NEIGHBOURS = 6
SEEDS = 20
ITERATIONS = 30

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class DomainScores:
    """Agreement of each seed's domains with the labels, ``(n_seeds,)`` each."""

    ari: NDArray[np.float64]
    nmi: NDArray[np.float64]


def find_domains(
    expression: NDArray[np.floating], xy_um: NDArray[np.float64], n_domains: int, *, seed: int = 0
) -> Labels:
    """Group positions into domains.

    Parameters
    ----------
    expression
        log1p(CP10k), measured or predicted, ``(n, n_genes)``.
    xy_um
        Centres ``(x, y)`` in microns, ``(n, 2)``.
    n_domains
        How many to look for, at least 2 and at most n.

    Returns
    -------
    numpy.ndarray
        A number 0 .. n_domains - 1 for each position, ``(n,)``.

    Raises
    ------
    ValueError
        If there are fewer positions than domains, or values are not finite.
    """
    return _cluster(_features(expression, xy_um, n_domains), n_domains, seed)


def score_domains(
    expression: NDArray[np.floating],
    xy_um: NDArray[np.float64],
    truth: NDArray[np.generic],
    *,
    seeds: int = SEEDS,
) -> DomainScores:
    """Find as many domains as there are labels, once per seed, and compare.

    Parameters
    ----------
    truth
        A label per position, ``(n,)``; unlabelled positions take part in the grouping, not in the score.

    Raises
    ------
    ValueError
        If fewer than 2 labels are left.
    """
    labelled = np.array([bool(value) for value in truth.tolist()])
    names, codes = np.unique(truth[labelled], return_inverse=True)
    if len(names) < 2:
        raise ValueError(f"domains need at least 2 labels to be compared with, not {len(names)}")
    features = _features(expression, xy_um, len(names))
    found = [_cluster(features, len(names), seed)[labelled] for seed in range(seeds)]
    return DomainScores(
        np.array([adjusted_rand_index(codes, domains) for domains in found]),
        np.array([normalised_mutual_information(codes, domains) for domains in found]),
    )


def adjusted_rand_index(a: Labels, b: Labels) -> float:
    """Return the Rand index corrected for chance (Hubert and Arabie 1985): 1 = equal, 0 = chance."""
    table = _contingency(a, b)
    both, rows, cols = (_pairs(part) for part in (table, table.sum(axis=1), table.sum(axis=0)))
    every = _pairs(np.array([table.sum()]))
    expected, best = rows * cols / max(every, 1.0), (rows + cols) / 2
    return float((both - expected) / (best - expected)) if best != expected else 1.0


def normalised_mutual_information(a: Labels, b: Labels) -> float:
    """Return mutual information over the mean of both entropies: 1 = equal, 0 = independent."""
    share = _contingency(a, b) / len(a)
    rows, cols = share.sum(axis=1, keepdims=True), share.sum(axis=0, keepdims=True)
    some = share > 0
    mutual = float((share[some] * np.log(share[some] / (rows * cols)[some])).sum())
    entropy = (_entropy(rows) + _entropy(cols)) / 2
    return mutual / entropy if entropy > 0 else 1.0


def _features(
    expression: NDArray[np.floating], xy_um: NDArray[np.float64], n_domains: int
) -> NDArray[np.float64]:
    values = np.asarray(expression, np.float64)
    if not 2 <= n_domains <= len(values) or not np.isfinite(values).all():
        raise ValueError(f"cannot find {n_domains} domains among {len(values)} positions with finite values")
    values = Standardiser.of(values).apply(values)
    components = values @ principal_axes(values, min(N_COMPONENTS, *values.shape))
    k = min(NEIGHBOURS + 1, len(values))
    nearest = cKDTree(xy_um).query(xy_um, k=list(range(1, k + 1)))[1]
    return np.asarray(components[nearest].mean(axis=1))


def _cluster(features: NDArray[np.float64], n_domains: int, seed: int) -> Labels:
    rng = np.random.default_rng(seed)
    start = _spread_out(features, n_domains, rng)
    _, label = kmeans2(features, start, iter=ITERATIONS, minit="matrix", missing="raise", rng=rng)
    return np.asarray(label, dtype=np.int64)


def _spread_out(features: NDArray[np.float64], k: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Draw k-means++ starts: each next one with a chance that grows with its squared distance to the others."""
    chosen = [features[rng.integers(len(features))]]
    distance = ((features - chosen[0]) ** 2).sum(axis=1)
    while len(chosen) < k:
        total = distance.sum()
        chance = distance / total if total > 0 else None
        chosen.append(features[rng.choice(len(features), p=chance)])
        distance = np.minimum(distance, ((features - chosen[-1]) ** 2).sum(axis=1))
    return np.stack(chosen)


def _contingency(a: Labels, b: Labels) -> NDArray[np.float64]:
    _, i = np.unique(a, return_inverse=True)
    _, j = np.unique(b, return_inverse=True)
    table = np.zeros((i.max() + 1, j.max() + 1))
    np.add.at(table, (i, j), 1)
    return table


def _pairs(counts: NDArray[np.float64]) -> float:
    return float((counts * (counts - 1) / 2).sum())


def _entropy(share: NDArray[np.float64]) -> float:
    positive = share[share > 0]
    return float(-(positive * np.log(positive)).sum())
