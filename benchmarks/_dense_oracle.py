"""What `dense` must give, written down anew in plain float64: scipy's filters, scikit-learn's PCA and ridges, all in memory.

It shares no arithmetic with the models: only sections as they are loaded. For a handful of small sections.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import correlate1d
from scipy.optimize import minimize
from sklearn.decomposition import PCA
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler

from histosge.data.sections import Patches, TrainingSection

Floats = NDArray[np.float64]
SIGMAS_UM = (0.0, 40.0, 80.0, 160.0, 320.0)
PENALTIES = 10.0 ** np.arange(-2, 3.01, 0.5)
N_PATTERNS, N_GROUPS, PULL = 10, 8, 0.05


def pool(patches: Patches, sigma_um: float) -> Floats:
    """Return the Gaussian-weighted mean around every patch, cut off at three sigmas, ``(n_patches, dim)``."""
    embedding = patches.embedding.astype(np.float64)
    if sigma_um == 0:
        return embedding
    share = np.ones(len(patches)) if patches.tissue_share is None else patches.tissue_share.astype(np.float64)
    shape = int(patches.rows.max()) + 1, int(patches.cols.max()) + 1
    weighted, weight = np.zeros((*shape, embedding.shape[1])), np.zeros(shape)
    weighted[patches.rows, patches.cols] = embedding * share[:, None]
    weight[patches.rows, patches.cols] = share
    sigma = sigma_um / patches.stride_um
    reach = int(3 * sigma + 1e-6)
    kernel = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        weighted = correlate1d(weighted, kernel, axis, mode="constant")
        weight = correlate1d(weight, kernel, axis, mode="constant")
    at = patches.rows, patches.cols
    return np.asarray(weighted[at] / weight[at][:, None])


MAX_DIM, N_COMPONENTS, SAMPLED, CANDIDATES = 256, 64, 512, 4096


def project(sections: Sequence[TrainingSection]) -> Floats | None:
    """Return the leading components of standardised patches under spots, ``(dim, N_COMPONENTS)``, or None."""
    if sections[0].patches.embedding.shape[1] <= MAX_DIM:
        return None
    sample = []
    for section in sections:
        places = np.arange(0, len(section.patches), thinning(len(section.patches), CANDIDATES))
        places = places[np.asarray(section.overlap.sum(axis=0)).ravel()[places] > 0]
        places = places[:: thinning(len(places), SAMPLED)]
        sample.append(section.patches.embedding[places].astype(np.float64))
    scaler = StandardScaler().fit(np.vstack(sample))
    rows = scaler.transform(np.vstack(sample))
    found = PCA(N_COMPONENTS, svd_solver="full").fit(rows)
    return np.asarray(found.components_.T / scaler.scale_[:, None])


def thinning(n: int, most: int) -> int:
    """Return which power of 2 leaves at most so many of n."""
    return int(2 ** np.ceil(np.log2(max(n / most, 1))))


def all_scales(scales: Sequence[Floats], projection: Floats | None) -> Floats:
    """Return each scale less the next wider one, and the widest, side by side."""
    own = [scale if projection is None else scale @ projection for scale in scales]
    return np.hstack([*(one - wider for one, wider in pairwise(own)), own[-1]])


def scaler_of_all(X: Floats, projection: Floats | None) -> StandardScaler:
    """Return a scaler of each input, or with a projection one for the components of each scale together."""
    scaler = StandardScaler().fit(X)
    if projection is not None:
        of_scale = np.sqrt(X.var(axis=0).reshape(len(SIGMAS_UM), -1).mean(axis=1))
        scaler.scale_ = np.repeat(of_scale, projection.shape[1])
    return scaler


@dataclass(frozen=True)
class DenseOracle:
    """A fitted `dense`.

    Parameters
    ----------
    scales
        Per scale, and last for all scales: scaler and ridge from pooled embeddings to patterns.
    weights
        Of these ridges.
    projection
        Of embeddings for the last ridge, or None.
    mean, sd, axes
        From patterns to genes.
    """

    scales: list[tuple[StandardScaler, Ridge]]
    weights: Floats
    mean: Floats
    sd: Floats
    axes: Floats
    projection: Floats | None = None

    @classmethod
    def fit(
        cls,
        sections: Sequence[TrainingSection],
        axes: Floats | None = None,
        weights: Floats | None = None,
        projected: Sequence[TrainingSection] | None = None,
    ) -> "DenseOracle":
        """Fit to at least two sections in memory; with patterns of genes and weights of ridges, if they are given.

        The projection of long embeddings is of the sections `projected`, or of all.
        """
        targets = [s.target.astype(np.float64) for s in sections]
        rows = np.vstack([StandardScaler().fit_transform(t) for t in targets])
        if axes is None:
            axes = PCA(N_PATTERNS, svd_solver="full").fit(rows).components_.T
        counts = np.array([len(t) for t in targets])
        mean = np.average([t.mean(axis=0) for t in targets], axis=0, weights=counts)
        sd = np.sqrt(np.average([t.var(axis=0) for t in targets], axis=0, weights=counts))
        Y, group = rows @ axes, np.repeat(np.arange(len(sections)) % N_GROUPS, counts)
        scales, held_out = [], []
        pooled = [np.vstack([s.overlap @ pool(s.patches, um) for s in sections]) for um in SIGMAS_UM]
        projection = project(sections if projected is None else projected)
        every = [(X, StandardScaler().fit(X)) for X in pooled]
        if weights is None or len(weights) > len(SIGMAS_UM):
            X = all_scales(pooled, projection)
            every.append((X, scaler_of_all(X, projection)))
        for X, scaler in every:
            X = scaler.transform(X)
            errors, predictions = [], []
            for penalty in PENALTIES:
                predicted = np.empty_like(Y)
                for g in np.unique(group):
                    out = group == g
                    predicted[out] = ridge(X[~out], Y[~out], penalty).predict(X[out])
                errors.append((centre(predicted - Y, group) ** 2).sum())
                predictions.append(predicted)
            best = int(np.argmin(errors))
            scales.append((scaler, ridge(X, Y, PENALTIES[best])))
            held_out.append(centre(predictions[best], group))
        if weights is None:
            weights = stacking(held_out, centre(Y, group), float((Y**2).sum()))
        return cls(scales, weights, mean, sd, axes, projection)

    def predict(self, patches: Patches) -> Floats:
        """Return log1p(CP10k) of every patch before its floor and ceiling, ``(n_patches, n_genes)``."""
        patterns = np.zeros((len(patches), N_PATTERNS))
        pooled = [pool(patches, sigma_um) for sigma_um in SIGMAS_UM]
        inputs = [*pooled, all_scales(pooled, self.projection)][: len(self.scales)]
        for (scaler, ridge), weight, X in zip(self.scales, self.weights, inputs, strict=True):
            patterns += weight * ridge.predict(scaler.transform(X))
        return self.mean + patterns @ self.axes.T * self.sd


def ridge(X: Floats, Y: Floats, penalty: float) -> Ridge:
    # The penalty is relative to the mean squared length of the centred inputs.
    length = float(X.var(axis=0).sum())
    return Ridge(alpha=penalty * length, solver="cholesky").fit(X, Y)


def centre(values: Floats, group: NDArray[np.int64]) -> Floats:
    found = values.copy()
    for g in np.unique(group):
        found[group == g] -= found[group == g].mean(axis=0)
    return found


def stacking(held_out: Sequence[Floats], Y: Floats, size: float) -> Floats:
    """Return weights of the ridges by constrained least squares: none negative, summing to 1, pulled to equal ones."""
    n = len(held_out)
    columns = np.stack([values.ravel() for values in held_out], axis=1)
    products, wanted = columns.T @ columns / size, columns.T @ Y.ravel() / size

    def loss(w: Floats) -> tuple[float, Floats]:
        away = w - 1 / n
        value = w @ products @ w - 2 * w @ wanted + PULL * away @ away
        return float(value), 2 * (products @ w - wanted + PULL * away)

    found = minimize(
        loss,
        np.full(n, 1 / n),
        jac=True,
        method="SLSQP",
        bounds=[(0, None)] * n,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(n)},
        options={"ftol": 1e-16, "maxiter": 1000},
    )
    # The search stops at a tolerance: the weights that are not 0 are solved for exactly.
    used = found.x > 1e-6
    k = int(used.sum())
    system = np.block(
        [[products[np.ix_(used, used)] + PULL * np.eye(k), np.ones((k, 1))], [np.ones((1, k)), 0]]
    )
    weights = np.zeros(n)
    weights[used] = np.linalg.solve(system, np.append(wanted[used] + PULL / n, 1.0))[:k]
    return weights


def predict_exactly(state: dict[str, NDArray[np.float64]], patches: Patches) -> Floats:
    """Return what a saved `dense` predicts before floor and ceiling, from its arrays and in float64."""
    weight, offset, axes = state["scales.weight"], state["scales.offset"], state["targets.axes"]
    n = len(offset)
    outputs = offset + np.zeros((len(patches), n))
    for i, sigma_um in enumerate(SIGMAS_UM):
        outputs += pool(patches, sigma_um) @ weight[:, i * n : (i + 1) * n]
    return np.asarray(state["targets.mean"] + outputs[:, : axes.shape[1]] @ axes.T * state["targets.sd"])
