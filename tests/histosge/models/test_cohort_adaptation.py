"""Adapting from sums: loadings and patterns are those that scikit-learn finds on the rows."""

import numpy as np
from scipy import sparse
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression, Ridge
from sklearn.preprocessing import StandardScaler

from histosge.models.adaptation import KEEP, LOADING_PENALTIES, adapt_loadings
from histosge.models.cohort_adaptation import AdaptedBasis, pattern_sums
from histosge.models.linear_algebra import Affine
from histosge.models.ridge_sums import RidgeSums
from histosge.models.target_sums import gene_products

GENES, BASIS = 31, np.arange(3, 29)


def test_loadings_and_patterns_of_residuals_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(2)
    axes, change, beside = (rng.standard_normal(shape) for shape in ((GENES, 4), (GENES, 4), (12, GENES)))
    sections = []
    for n in (151, 97, 199):
        patterns, further = rng.standard_normal((n, 4)), rng.standard_normal((n, 12))
        patterns -= patterns.mean(axis=0)
        truth = patterns @ (axes + change).T + further @ beside
        target = np.maximum(truth + rng.standard_normal(truth.shape), 0).astype(np.float32)
        sections.append((sparse.csr_matrix(target), patterns))
    groups = [pattern_sums(*section) for section in sections]
    products = np.sum([gene_products(target, BASIS) for target, _ in sections], axis=0)
    found = AdaptedBasis.fit(groups, products, BASIS, axes)

    rows = np.vstack([StandardScaler().fit_transform(t.toarray().astype(np.float64)) for t, _ in sections])
    inputs = np.vstack([patterns for _, patterns in sections])
    old = inputs @ axes.T
    slope = (old * rows).sum() / (old**2).sum()
    _, penalty = adapt_loadings(groups, axes)
    assert penalty in LOADING_PENALTIES
    assert penalty != KEEP
    alpha = penalty * (inputs**2).sum() / len(inputs)
    loadings = slope * axes + Ridge(alpha).fit(inputs, rows - slope * old).coef_
    np.testing.assert_allclose(found.loadings, loadings, atol=1e-9)

    residual = rows - inputs @ loadings.T
    components = PCA(10, svd_solver="full").fit(residual[:, BASIS]).components_.T
    np.testing.assert_allclose(np.abs(found.residual.axes.T @ components), np.eye(10), atol=1e-9)
    anew = PCA(10, svd_solver="full").fit(rows[:, BASIS]).components_.T
    np.testing.assert_allclose(np.abs(found.anew.axes.T @ anew), np.eye(10), atol=1e-9)
    own = [found.residual_patterns(target, patterns) for target, patterns in sections]
    np.testing.assert_allclose(np.vstack(own), residual[:, BASIS] @ found.residual.axes, atol=1e-9)
    # Genes outside of the basis follow by a regression on the patterns.
    parts = [
        found.residual_products(target, patterns, q)
        for (target, patterns), q in zip(sections, own, strict=True)
    ]
    all_axes = found.residual_axes((np.sum(parts, axis=0), (np.vstack(own) ** 2).sum(axis=0)))
    wanted = LinearRegression().fit(np.vstack(own), residual).coef_
    np.testing.assert_allclose(all_axes, wanted, atol=1e-9)


def test_sums_of_residuals_are_those_of_the_rows() -> None:
    rng = np.random.default_rng(3)
    X, Y, W, b = (rng.standard_normal(shape) for shape in ((23, 5), (23, 3), (5, 3), (3,)))

    found = RidgeSums.from_rows(X, Y).residual(Affine(W, b)).arrays()
    wanted = RidgeSums.from_rows(X, Y - X @ W - b).arrays()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-9)
