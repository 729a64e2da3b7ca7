"""The count likelihood: right rates whatever the depth, nothing dead, refused where it cannot be had."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize
from sklearn.linear_model import PoissonRegressor

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap
from histosge.errors import ModelError
from histosge.models.count_loss import CountHead
from histosge.models.dense import DenseModel, LinearFit


def _section(depth: float, seed: int) -> tuple[TrainingSection, np.ndarray, np.ndarray]:
    """Three patterns make seven genes' rates, counted at a median depth; returns patterns and true rates too."""
    rng, shared = np.random.default_rng(seed), np.random.default_rng(99)
    rows, cols = (a.ravel() for a in np.mgrid[:20, :20])
    patterns = rng.standard_normal((400, 3))
    rates = np.exp(3 + 0.5 * patterns @ shared.standard_normal((3, 7)))
    patches = Patches(f"S{seed}", rows, cols, patterns.astype(np.float32), 100.0, 100.0)
    library = depth * np.exp(0.5 * rng.standard_normal(400))
    counts = rng.poisson(rates * library[:, None] / 1e4)
    target = np.log1p(counts * 1e4 / library[:, None]).astype(np.float32)
    overlap = disc_overlap(patches.xy_um, 55.0, patches)
    return TrainingSection(patches, overlap, patches.xy_um, target, library), patterns, rates


@pytest.mark.parametrize("loss", ["poisson", "nb"])
def test_rates_come_back_also_from_few_counts(loss: str) -> None:
    section, patterns, _ = _section(3000, 1)
    head = CountHead.fit(loss, [section], [patterns])
    _, others, expected = _section(3000, 2)
    assert np.abs(np.expm1(head(others)) / expected - 1).mean() < 0.15


def _offsets(sections: list[TrainingSection]) -> tuple[np.ndarray, np.ndarray]:
    """Return counts, and expected counts by library size and the section's own level alone, ``(n_spots, n_genes)``."""
    counts, exposure = [], []
    for section in sections:
        assert section.library is not None
        exposure.append(np.repeat(section.library[:, None] / 1e4, section.target.shape[1], axis=1))
        counts.append(np.round(np.expm1(section.target.astype(np.float64)) * exposure[-1]))
    pooled = np.concatenate(counts).sum(axis=0) / np.concatenate(exposure).sum(axis=0) + 0.01
    levels = [(n.sum(axis=0) / e.sum(axis=0) + 0.01) / pooled for n, e in zip(counts, exposure, strict=True)]
    return np.concatenate(counts), np.concatenate(
        [e * level for e, level in zip(exposure, levels, strict=True)]
    )


def _sections_of_other_depths() -> tuple[list[TrainingSection], list[np.ndarray]]:
    made = [_section(depth, seed) for depth, seed in ((3000, 1), (700, 2), (20_000, 3))]
    # Predicted with an error, so that counts vary by more than Poisson around what follows from the patterns.
    rng = np.random.default_rng(4)
    noisy = [patterns + 0.4 * rng.standard_normal(patterns.shape) for _, patterns, _ in made]
    return [section for section, _, _ in made], noisy


def test_poisson_is_that_of_scikit_learn() -> None:
    sections, patterns = _sections_of_other_depths()
    head = CountHead.fit("poisson", sections, patterns)
    counts, offset = _offsets(sections)
    for gene in range(7):
        # A rate with the offset as weight is a count with the offset as factor; its penalty is a share of the weights.
        own = offset[:, gene]
        oracle = PoissonRegressor(alpha=1 / own.sum(), solver="newton-cholesky", tol=1e-12, max_iter=100)
        oracle.fit(np.concatenate(patterns), counts[:, gene] / own, sample_weight=own)
        np.testing.assert_allclose(head.weight[:, gene], oracle.coef_, atol=1e-6)
        np.testing.assert_allclose(head.offset[gene], oracle.intercept_, atol=1e-6)


def test_negative_binomial_is_the_maximum_that_scipy_finds() -> None:
    sections, patterns = _sections_of_other_depths()
    head, poisson = (CountHead.fit(loss, sections, patterns) for loss in ("nb", "poisson"))
    counts, offset = _offsets(sections)
    Z = np.concatenate(patterns)
    for gene in (0, 4):
        n, own = counts[:, gene], offset[:, gene]
        expected = own * np.exp(Z @ poisson.weight[:, gene] + poisson.offset[gene])
        spread = max(((n - expected) ** 2 - expected).sum(), 0) / (expected**2).sum()
        assert spread > 0

        def loss(beta: np.ndarray, n=n, own=own, spread=spread) -> tuple[float, np.ndarray]:  # type: ignore[no-untyped-def]
            mean = own * np.exp(beta[0] + Z @ beta[1:])
            likelihood = n * np.log(mean) - (n + 1 / spread) * np.log1p(spread * mean)
            slope = (n - mean) / (1 + spread * mean)
            gradient = np.append(slope.sum(), slope @ Z - beta[1:])
            return float(-likelihood.sum() + (beta[1:] ** 2).sum() / 2), -gradient

        found = minimize(loss, np.append(poisson.offset[gene], poisson.weight[:, gene]), jac=True, tol=1e-12)
        np.testing.assert_allclose(head.weight[:, gene], found.x[1:], atol=1e-6)
        np.testing.assert_allclose(head.offset[gene], found.x[0], atol=1e-6)


def test_a_section_s_own_level_does_not_pass_for_a_pattern() -> None:
    (one, z1, _), (two, z2, _) = _section(20_000, 1), _section(20_000, 2)
    twice = replace(two, target=np.log1p(3 * np.expm1(two.target)))
    alone = CountHead.fit("poisson", [one], [z1])
    both = CountHead.fit("poisson", [one, twice], [z1, z2])
    np.testing.assert_allclose(both.weight, alone.weight, atol=0.1)


@pytest.mark.parametrize("loss", ["poisson", "nb"])
def test_dense_learns_by_counts_and_rebuilds_bit_equal(loss: str) -> None:
    section, _, rates = _section(20_000, 1)
    model = DenseModel.fit([section], loss=loss)
    predicted = model.predict(section.patches)
    assert np.isfinite(predicted).all()
    assert (predicted > 0).all()
    for gene in range(7):
        assert np.corrcoef(predicted[:, gene], np.log1p(rates[:, gene]))[0, 1] > 0.9
    again = DenseModel.from_state(model.config(), model.state())
    np.testing.assert_array_equal(again.predict(section.patches), predicted)


def test_counts_of_several_sections_are_fitted_to_patterns_of_fits_without_the_section() -> None:
    sections = [_section(20_000, seed)[0] for seed in range(1, 5)]
    rng = np.random.default_rng(3)
    noise = [replace(s, target=rng.random(s.target.shape).astype(np.float32)) for s in sections]
    linear = LinearFit.fit(noise)
    assert linear.out_of_fold is not None
    for measured, predicted in zip(
        *map(linear.by_section, (linear.patterns, linear.out_of_fold)), strict=True
    ):
        np.testing.assert_allclose(predicted.mean(axis=0), 0, atol=1e-9)
        assert abs(np.corrcoef(measured[:, 0], predicted[:, 0])[0, 1]) < 0.15
    heads = [DenseModel.fit(noise, loss="poisson", seed=seed).count_head for seed in (0, 1)]
    # No spots are drawn.
    assert heads[0] is not None
    assert heads[1] is not None
    np.testing.assert_array_equal(heads[0].weight, heads[1].weight)


def test_a_gene_without_a_single_count_stays_near_zero() -> None:
    section, patterns, _ = _section(20_000, 1)
    target = section.target.copy()
    target[:, 4] = 0
    head = CountHead.fit("nb", [replace(section, target=target)], [patterns])
    assert (head(patterns)[:, 4] < 0.05).all()


def test_a_loss_that_cannot_be_had_is_refused() -> None:
    section, patterns, _ = _section(3000, 1)
    with pytest.raises(ModelError, match="total counts"):
        CountHead.fit("nb", [replace(section, library=None)], [patterns])
