"""Spatial domains from expression, measured or predicted, by one fixed rule; and how well they fit known labels.

The rule: principal components of log1p(CP10k), k-means, 20 seeds, all of them counted. It never sees a label:
the number of domains is given, no seed is picked by its score, and positions without a label are dropped before
scoring, not made a class of their own.

Terms
    label  what an annotator, or a synthetic truth, says of a position; one value means unlabelled
    ARI    adjusted Rand index: pairs of positions that both ways put together, 0 by chance, 1 if equal
    NMI    normalised mutual information, by the mean of both entropies: 0 to 1
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurestore.analysis.kmeans import nearest_centre, plus_plus
from histosge.errors import HistosgeError
from histosge.models.linear_algebra import principal_axes

COMPONENTS = 20
SEEDS = 20
N_DOMAINS = 7
"""As in the published comparison."""
ITERATIONS = 100

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class DomainScores:
    """How well domains of all seeds fit labels.

    Parameters
    ----------
    ari, nmi
        One value per seed.
    n_labelled, n_unlabelled
        Positions scored, and dropped.
    """

    ari: NDArray[np.float64]
    nmi: NDArray[np.float64]
    n_labelled: int
    n_unlabelled: int


def find_domains(
    expression: NDArray[np.floating], n_domains: int = N_DOMAINS, seeds: Sequence[int] = range(SEEDS)
) -> Labels:
    """Cut positions into domains, once per seed.

    Parameters
    ----------
    expression
        log1p(CP10k), measured or predicted, ``(n_positions, n_genes)``.
    n_domains
        Given, not found.
    seeds
        Of k-means.

    Returns
    -------
    numpy.ndarray
        Domain 0 .. n_domains - 1 of every position, ``(n_seeds, n_positions)``.

    Raises
    ------
    HistosgeError
        If there are fewer positions than domains, or a value is not finite.
    """
    values = np.asarray(expression, np.float64)
    if n_domains < 1 or len(values) < n_domains or not np.isfinite(values).all():
        raise HistosgeError(
            f"cannot cut {len(values)} positions into {n_domains} domains: give finite values, and at least as many"
            " positions as domains"
        )
    centred = values - values.mean(axis=0)
    scores = centred @ principal_axes(values, min(COMPONENTS, *values.shape))
    return np.stack([_kmeans(scores, n_domains, np.random.default_rng(seed)) for seed in seeds])


def score_domains(
    domains: Labels, labels: NDArray[np.generic], unlabelled: str | float | None = None
) -> DomainScores:
    """Compare the domains of every seed with labels.

    Parameters
    ----------
    domains
        From `find_domains`, ``(n_seeds, n_positions)``.
    labels
        ``(n_positions,)``.
    unlabelled
        The value that means no label; such positions are dropped. None: every position has one.

    Raises
    ------
    HistosgeError
        If fewer than 2 positions have a label, or the lengths differ.
    """
    if labels.shape != domains.shape[1:]:
        raise HistosgeError(
            f"{labels.shape[0]} labels do not fit {domains.shape[1]} positions: give one each"
        )
    known = np.ones(len(labels), dtype=bool) if unlabelled is None else labels != unlabelled
    if known.sum() < 2:
        raise HistosgeError(
            f"{int(known.sum())} of {len(labels)} positions have a label: nothing to compare with"
        )
    ari = [adjusted_rand(found[known], labels[known]) for found in domains]
    nmi = [mutual_information(found[known], labels[known]) for found in domains]
    return DomainScores(np.array(ari), np.array(nmi), int(known.sum()), int((~known).sum()))


def adjusted_rand(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Return the adjusted Rand index of two labellings (Hubert and Arabie, 1985); 1 where both are one class."""
    table = _contingency(a, b)

    def pairs(counts: NDArray[np.float64]) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, in_a, in_b = pairs(table), pairs(table.sum(axis=1)), pairs(table.sum(axis=0))
    by_chance = in_a * in_b / pairs(np.array([table.sum()]))
    most = (in_a + in_b) / 2
    return 1.0 if most == by_chance else (together - by_chance) / (most - by_chance)


def mutual_information(a: NDArray[np.generic], b: NDArray[np.generic]) -> float:
    """Return the mutual information of two labellings over the mean of their entropies; 1 where both are one class."""
    share = _contingency(a, b)
    share = share / share.sum()
    in_a, in_b = share.sum(axis=1), share.sum(axis=0)
    entropy = (_entropy(in_a) + _entropy(in_b)) / 2
    if entropy <= 0:
        return 1.0
    return max(0.0, (_entropy(in_a) + _entropy(in_b) - _entropy(share.ravel())) / entropy)


def _contingency(a: NDArray[np.generic], b: NDArray[np.generic]) -> NDArray[np.float64]:
    _, left = np.unique(a, return_inverse=True)
    _, right = np.unique(b, return_inverse=True)
    table = np.zeros((int(left.max()) + 1, int(right.max()) + 1))
    np.add.at(table, (left.ravel(), right.ravel()), 1.0)
    return table


def _entropy(share: NDArray[np.float64]) -> float:
    some = share[share > 0]
    return float(-(some * np.log(some)).sum())


def _kmeans(values: NDArray[np.float64], k: int, rng: np.random.Generator) -> Labels:
    """Lloyd's iterations from centres chosen far apart; a centre that loses all its positions stays where it is."""
    centres = plus_plus(values, k, rng)
    label = np.full(len(values), -1, dtype=np.int64)
    for _ in range(ITERATIONS):
        nearest, _distance = nearest_centre(values, centres)
        if np.array_equal(nearest, label):
            break
        label = nearest
        for domain in np.unique(label):
            centres[domain] = values[label == domain].mean(axis=0)
    return label
