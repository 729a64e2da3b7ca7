"""Spatial domains from expression, measured or predicted, by one fixed rule; and how well they agree with labels.

The rule: principal components of log1p(CP10k), then k-means, once for each of 20 seeds. It never sees a label: the
number of domains is given, all seeds are reported, and positions without a label are dropped before scoring. k-means
and both indices are scikit-learn's.

Terms
    label  the class of a position, by an annotator or a synthetic truth; one value means unlabelled
    ARI    adjusted Rand index: 0 by chance, 1 if both partitions are equal
    NMI    normalised mutual information, by the arithmetic mean of both entropies: 0 to 1
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosge.errors import HistosgeError
from histosge.models.linear_algebra import principal_axes

COMPONENTS = 20
SEEDS = 20
N_DOMAINS = 7
"""As in the published comparison."""

Labels = NDArray[np.int64]


@dataclass(frozen=True)
class DomainScores:
    """How well domains of all seeds agree with labels.

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
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    values = np.asarray(expression, np.float64)
    if n_domains < 1 or len(values) < n_domains or not np.isfinite(values).all():
        raise HistosgeError(
            f"cannot cut {len(values)} positions into {n_domains} domains: give finite values, and at least as many"
            " positions as domains"
        )
    centred = values - values.mean(axis=0)
    scores = centred @ principal_axes(values, min(COMPONENTS, *values.shape))
    with warnings.catch_warnings():
        # Fewer distinct positions than domains: some domains stay empty, which the scores show.
        warnings.simplefilter("ignore", ConvergenceWarning)
        # One start a seed: picking the best of several would hide how much domains depend on it.
        found = [KMeans(n_domains, n_init=1, random_state=seed).fit_predict(scores) for seed in seeds]
    return np.stack(found).astype(np.int64)


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
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    if labels.shape != domains.shape[1:]:
        raise HistosgeError(
            f"{labels.shape[0]} labels do not fit {domains.shape[1]} positions: give one each"
        )
    known = np.ones(len(labels), dtype=bool) if unlabelled is None else labels != unlabelled
    if known.sum() < 2:
        raise HistosgeError(
            f"{int(known.sum())} of {len(labels)} positions have a label: nothing to compare with"
        )
    with warnings.catch_warnings():
        # scikit-learn 1.6 and later warn where a partition has a class for every other position.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        ari = [adjusted_rand_score(labels[known], found[known]) for found in domains]
        nmi = [normalized_mutual_info_score(labels[known], found[known]) for found in domains]
    return DomainScores(np.array(ari), np.array(nmi), int(known.sum()), int((~known).sum()))
