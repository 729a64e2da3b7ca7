"""How many independent spots a correlation of two maps is worth, and its lower confidence limit.

Spots are not independent: a gene and its prediction are both smooth in space, so neighbours repeat each other. Two maps
that have nothing to do with each other then correlate far more often than as many independent spots would. The variance
of their correlation follows from the autocorrelation of both (Clifford, Richardson and Hemon, 1989; Dutilleul, 1993):

    var(r) = sum over pairs i, j of rho_a(d_ij) rho_b(d_ij) / n**2,    n_effective = 1 + 1 / var(r)

Arithmetic only.

Terms
    label   spots of one label are comparable (a section as one fold holds it out): means and pairs are taken within it
    class   pairs of spots whose distance is about the same
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse, stats
from scipy.spatial.distance import pdist, squareform

from histosge.calibration.values_on_disk import ValuesOnDisk
from histosge.heldout.metrics import correlate, within_sections
from histosge.heldout.smooth_fields import spot_pitch_um
from histosge.threads import prefetch

Floats = NDArray[np.float64]

CONFIDENCE = 0.99
MAX_PAIRS = 4_000_000
"""Pairs that autocorrelation is estimated from, about: spots are drawn at random where there are more. Of 200 spots a
section in 100 sections, an autocorrelation has an error of a few thousandths."""
_LEAST_SPOTS_OF_LABEL = 100
_VALUES_AT_ONCE = 1 << 22
"""Values in double precision that are worked on together: 32 MB, whatever the number of spots and genes."""


@dataclass(frozen=True)
class SpotPairs:
    """Pairs of spots of one label by distance, each pair in both orders, a spot and itself left out.

    Parameters
    ----------
    labels
        Of all spots, ``(n_spots,)``.
    classes
        Per label: the spots that pairs are of, and for each class of distance the sparse ``(n, n)`` matrix of its pairs.
    weights
        Per label: how many pairs one of these stands for.
    """

    labels: NDArray[np.generic]
    classes: Sequence[tuple[NDArray[np.int64], Sequence[sparse.csr_array]]]
    weights: Sequence[float]

    @classmethod
    def from_positions(cls, xy_um: NDArray[np.floating], labels: NDArray[np.generic]) -> "SpotPairs":
        """Sort the pairs of each label into classes one spot pitch wide.

        Parameters
        ----------
        xy_um
            ``(n_spots, 2)`` microns; only distances within a label count.
        """
        # Any seed will do; a fixed one, so that the same spots give the same trust.
        rng = np.random.default_rng(0)
        names = np.unique(labels)
        most = max(_LEAST_SPOTS_OF_LABEL, int(np.sqrt(MAX_PAIRS / max(len(names), 1))))
        classes, weights = [], []
        for label in names:
            here = np.flatnonzero(labels == label)
            drawn = here if len(here) <= most else np.sort(rng.choice(here, most, replace=False))
            if len(drawn) < 2:
                continue
            # The pitch of all spots: those that are drawn lie further apart.
            pitch = max(spot_pitch_um(xy_um[here]), 1e-6)
            # Class 1 is centred on the distance of neighbours. Nearer than that there are few pairs, if any.
            of_pair = np.maximum(np.rint(squareform(pdist(xy_um[drawn])) / pitch).astype(np.int64), 1)
            np.fill_diagonal(of_pair, 0)
            pairs = [
                sparse.csr_array((of_pair == k).astype(np.float64)) for k in range(1, int(of_pair.max()) + 1)
            ]
            classes.append((drawn, pairs))
            weights.append(len(here) * (len(here) - 1) / (len(drawn) * (len(drawn) - 1)))
        return cls(labels, classes, weights)

    @property
    def n_classes(self) -> int:
        """Return the number of classes of distance."""
        return max((len(pairs) for _, pairs in self.classes), default=0)

    def counts(self) -> Floats:
        """Return how many pairs each class stands for, ``(n_classes,)``."""
        found = np.zeros(self.n_classes)
        for (_, pairs), weight in zip(self.classes, self.weights, strict=True):
            found[: len(pairs)] += [weight * part.nnz for part in pairs]
        return found

    def products(self, values: Floats) -> Floats:
        """Return the sum over each class's pairs of the product of their values, ``(n_classes, n_genes)``."""
        found = np.zeros((self.n_classes, values.shape[1]))
        for (spots, pairs), weight in zip(self.classes, self.weights, strict=True):
            here = np.ascontiguousarray(values[spots])
            for k, part in enumerate(pairs):
                found[k] += weight * (here * (part @ here)).sum(axis=0)
        return found


def effective_spots(a: Floats, b: Floats, pairs: SpotPairs) -> Floats:
    """Return per gene the number of independent spots with the same variance of a correlation, ``(n_genes,)``.

    It is at least 1, and no more than there are spots less one for each label's mean but the first.

    Parameters
    ----------
    a, b
        ``(n_spots, n_genes)``; each label's mean is removed here.
    """
    left, right = within_sections(a, pairs.labels), within_sections(b, pairs.labels)
    square = (left**2).sum(axis=0) * (right**2).sum(axis=0)
    # Pairs of a spot and itself have correlation 1: they are the 1 / n of independent spots.
    variance = np.full(a.shape[1], 1 / len(a))
    counts = pairs.counts()
    used = counts > 0
    shared = (pairs.products(left)[used] * pairs.products(right)[used] / counts[used, None]).sum(axis=0)
    variance += np.divide(shared, square, out=np.zeros_like(square), where=square > 0)
    most = max(len(a) - len(np.unique(pairs.labels)) + 1, 1)
    # Opposite autocorrelations make the sum smaller, and it may turn negative: no more is claimed than independent spots
    # would give.
    return np.asarray(np.clip(1 + 1 / np.maximum(variance, 1 / most), 1.0, most))


def lower_limit(pearson: Floats, effective: Floats) -> Floats:
    """Return lower confidence limits of correlations, at least 0, ``(n_genes,)``.

    By Fisher's transform, with the quantile of Student's t: the effective number is itself an estimate, and where it is
    small the normal quantile called three times as many smooth fields trusted.
    """
    # Fisher's variance is 1 / (n - 3); with three effective spots or fewer nothing can be said.
    freedom = np.maximum(effective - 3, 1e-9)
    quantile = stats.t.ppf(CONFIDENCE, np.maximum(effective - 2, 1))
    # arctanh(1) is infinite.
    z = np.arctanh(np.clip(pearson, -0.999999, 0.999999))
    limit = np.where(effective > 3, np.tanh(z - quantile / np.sqrt(freedom)), 0.0)
    return np.asarray(np.maximum(limit, 0.0))


def pearson_lower_limit(
    truth: NDArray[np.floating] | ValuesOnDisk,
    predicted: NDArray[np.floating] | ValuesOnDisk,
    xy_um: NDArray[np.floating],
    labels: NDArray[np.generic],
    *,
    threads: int = 1,
) -> NDArray[np.float32]:
    """Return per gene a lower confidence limit (99 %) of the Pearson within labels, at least 0, ``(n_genes,)``.

    Parameters
    ----------
    truth, predicted
        ``(n_spots, n_genes)``.
    xy_um, labels
        Position of each spot, ``(n_spots, 2)`` microns, and its label, ``(n_spots,)``.
    threads
        That work on genes side by side.
    """
    pairs = SpotPairs.from_positions(xy_um, labels)
    step = max(1, _VALUES_AT_ONCE // max(len(truth), 1))

    def of_genes(start: int) -> Floats:
        some = slice(start, start + step)
        a, b = truth[:, some].astype(np.float64), predicted[:, some].astype(np.float64)
        pearson, _ = correlate(a, b, labels)
        return lower_limit(pearson, effective_spots(a, b, pairs))

    limits = list(prefetch(of_genes, range(0, truth.shape[1], step), threads))
    return np.concatenate([np.zeros(0), *limits]).astype(np.float32)
