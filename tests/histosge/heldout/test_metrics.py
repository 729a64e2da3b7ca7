import numpy as np
import pytest

from histosge.errors import HistosgeError
from histosge.heldout.metric_registry import METRICS, Metric, ScoredSpots
from histosge.heldout.metrics import GeneScores, pearson_all_spots, score_genes, top_by_variance

N_SPOTS, N_GENES = 211, 23


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def one_section(n_spots: int = N_SPOTS) -> np.ndarray:
    return np.full(n_spots, "A")


def equal_depth(n_spots: int = N_SPOTS) -> np.ndarray:
    return np.full(n_spots, 1009)


def scored(truth: np.ndarray, predicted: np.ndarray, depth: np.ndarray, section: np.ndarray) -> GeneScores:
    """Score by all of our metrics, spots in a row."""
    xy_um = np.stack([np.arange(len(section)) * 100.0, np.zeros(len(section))], axis=1)
    return score_genes(truth, predicted, ScoredSpots(depth, section, xy_um), METRICS.records())


def test_pearson_and_spearman_agree_with_scipy_gene_by_gene(rng: np.random.Generator) -> None:
    from scipy.stats import pearsonr, spearmanr

    truth = rng.poisson(1.5, (N_SPOTS, N_GENES)).astype(np.float32)
    predicted = truth * 0.3 + rng.standard_normal((N_SPOTS, N_GENES))
    scores = scored(truth, predicted, rng.integers(101, 997, N_SPOTS), one_section())
    for gene in range(N_GENES):
        assert scores.pearson[gene] == pytest.approx(pearsonr(truth[:, gene], predicted[:, gene])[0])
        assert scores["spearman"][gene] == pytest.approx(spearmanr(truth[:, gene], predicted[:, gene])[0])


def test_errors_are_averaged_over_all_spots_and_a_perfect_prediction_explains_everything(
    rng: np.random.Generator,
) -> None:
    truth = rng.standard_normal((N_SPOTS, N_GENES))
    shifted = scored(truth, truth + 2, equal_depth(), one_section())
    np.testing.assert_allclose(shifted["mse"], 4)
    np.testing.assert_allclose(shifted["mae"], 2)
    perfect = scored(truth, truth, equal_depth(), one_section())
    np.testing.assert_allclose([perfect["r2"], perfect.pearson], 1)
    means = np.broadcast_to(truth.mean(axis=0), truth.shape)
    np.testing.assert_allclose(scored(truth, means, equal_depth(), one_section())["r2"], 0, atol=1e-12)


def test_a_gene_without_a_correlation_counts_as_zero_and_is_counted(rng: np.random.Generator) -> None:
    truth = rng.standard_normal((N_SPOTS, N_GENES))
    predicted = truth.copy()
    truth[:, 3] = 0.7
    predicted[:, 5] = 0.1
    scores = scored(truth, predicted, equal_depth(), one_section())
    summary = scores.summary(np.ones(N_GENES, dtype=bool))
    assert np.flatnonzero(scores.undefined).tolist() == [3, 5]
    assert summary["n_nan_genes"] == 2
    assert summary["n_genes"] == N_GENES
    assert summary["pearson_mean"] == pytest.approx((N_GENES - 2) / N_GENES)
    assert scores["spearman"][[3, 5]].tolist() == [0, 0]


def test_the_rounding_of_a_constant_prediction_earns_no_correlation(rng: np.random.Generator) -> None:
    truth = rng.standard_normal((N_SPOTS, N_GENES))
    jitter = rng.choice([-1, 0, 1], (N_SPOTS, N_GENES)) * np.spacing(np.float32(1.7))
    scores = scored(truth, np.float32(1.7) + jitter, equal_depth(), one_section())
    assert scores.undefined.all()
    assert not scores.pearson.any()
    assert not scores["spearman"].any()


def test_depth_adjustment_leaves_nothing_of_a_prediction_that_is_only_depth(rng: np.random.Generator) -> None:
    depth = rng.lognormal(7, 0.8, N_SPOTS).astype(int) + 1
    log_depth = np.log(depth)[:, None]
    truth = 0.9 * log_depth + rng.standard_normal((N_SPOTS, N_GENES))
    predicted = (0.8 * log_depth - 0.03 * log_depth**2).astype(np.float32).repeat(N_GENES, axis=1)
    scores = scored(truth, predicted, depth, one_section())
    assert scores.pearson.mean() > 0.3
    assert np.abs(scores.pearson_depth_adjusted).max() < 1e-6


def test_depth_adjustment_keeps_what_is_not_depth(rng: np.random.Generator) -> None:
    depth = rng.lognormal(7, 0.8, N_SPOTS)
    signal = rng.standard_normal((N_SPOTS, N_GENES))
    truth = 5 * np.log(depth)[:, None] + signal
    scores = scored(truth, signal, depth, one_section())
    assert scores.pearson.mean() < 0.5
    assert scores.pearson_depth_adjusted.min() > 0.99


def test_equal_depth_everywhere_adjusts_nothing(rng: np.random.Generator) -> None:
    truth, predicted = rng.standard_normal((2, N_SPOTS, N_GENES))
    scores = scored(truth, predicted, equal_depth(), one_section())
    np.testing.assert_allclose(scores.pearson_depth_adjusted, scores.pearson)


def test_knowing_only_the_section_earns_no_correlation(rng: np.random.Generator) -> None:
    section = np.where(np.arange(N_SPOTS) < 83, "A", "B")
    offset = np.where(section == "A", 0.0, 3.0)[:, None]
    truth = offset + rng.standard_normal((N_SPOTS, N_GENES))
    predicted = offset + 1e-3 * rng.standard_normal((N_SPOTS, N_GENES))
    scores = scored(truth, predicted, rng.integers(101, 997, N_SPOTS), section)
    assert abs(scores.pearson.mean()) < 0.05
    assert abs(scores["spearman"].mean()) < 0.05
    assert abs(scores.pearson_depth_adjusted.mean()) < 0.05


def test_memorising_noise_scores_only_in_the_figure_over_all_spots(rng: np.random.Generator) -> None:
    truth = rng.standard_normal((2 * N_SPOTS, N_GENES))
    held_out = np.arange(2 * N_SPOTS) < N_SPOTS
    memory = np.where(held_out[:, None], rng.standard_normal(truth.shape), truth)
    honest = scored(truth[held_out], memory[held_out], equal_depth(), one_section())
    assert abs(honest.pearson.mean()) < 0.05
    assert pearson_all_spots(truth, memory, one_section(2 * N_SPOTS)) > 0.3


def test_the_top_genes_are_those_that_vary_most_in_training(rng: np.random.Generator) -> None:
    target = rng.standard_normal((N_SPOTS, N_GENES)) * np.arange(N_GENES)
    assert np.flatnonzero(top_by_variance(target, 5)).tolist() == [18, 19, 20, 21, 22]
    assert top_by_variance(target).all()


def test_the_top_score_is_the_mean_over_the_marked_genes_alone(rng: np.random.Generator) -> None:
    truth, predicted = rng.standard_normal((2, N_SPOTS, N_GENES))
    predicted[:, 2] = truth[:, 2]
    scores = scored(truth, predicted, equal_depth(), one_section())
    assert scores.summary(np.arange(N_GENES) == 2)["pearson_top50"] == pytest.approx(1)


def test_top_genes_picked_on_the_training_part_do_not_lift_noise(rng: np.random.Generator) -> None:
    truth, predicted = rng.standard_normal((2, N_SPOTS, 503))
    scores = scored(truth, predicted, equal_depth(), one_section())
    honest = scores.summary(top_by_variance(rng.standard_normal((N_SPOTS, 503))))["pearson_top50"]
    picked_on_test = np.sort(scores.pearson)[-50:].mean()
    assert abs(honest) < 0.03 < 0.1 < picked_on_test


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predicted": np.zeros((5, 2))}, "do not fit"),
        ({"depth": np.array([3, 3, 0, 3, 3])}, "no counts"),
        ({"predicted": np.full((5, 3), np.nan)}, "15 values are not finite"),
    ],
)
def test_what_cannot_be_scored_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    values = {"truth": np.ones((5, 3)), "predicted": np.ones((5, 3)), "depth": np.full(5, 7)} | change
    with pytest.raises(ValueError, match=message):
        scored(values["truth"], values["predicted"], values["depth"], one_section(5))


def test_a_single_spot_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        scored(np.ones((1, 3)), np.ones((1, 3)), np.ones(1), one_section(1))


def test_every_metric_gives_a_finite_value_also_for_what_does_not_vary(rng: np.random.Generator) -> None:
    truth = rng.standard_normal((N_SPOTS, N_GENES))
    truth[:, 3] = 0.7
    scores = scored(truth, np.full_like(truth, 0.2), equal_depth(), one_section())
    assert {metric.name for metric in scores.values} >= {"mse", "mae", "r2", "spearman", "ssim"}
    assert np.isfinite(list(scores.values.values())).all()


def test_a_metric_of_somebody_else_is_scored_and_summed_up_under_its_name(rng: np.random.Generator) -> None:
    truth, predicted = rng.standard_normal((2, N_SPOTS, N_GENES))
    worst = Metric("worst", "Largest error.", lambda t, p, spots: np.abs(t - p).max(axis=0))
    spots = ScoredSpots(equal_depth(), one_section(), np.zeros((N_SPOTS, 2)))
    scores = score_genes(truth, predicted, spots, [worst])
    np.testing.assert_array_equal(scores["worst"], np.abs(truth - predicted).max(axis=0))
    assert scores.summary(np.ones(N_GENES, bool))["worst_mean"] == pytest.approx(scores["worst"].mean())


@pytest.mark.parametrize("found", [np.zeros(N_SPOTS), np.float64(0.5), np.full(N_GENES, np.nan)])
def test_a_metric_that_gives_no_finite_value_per_gene_is_refused(found: np.ndarray) -> None:
    spots = ScoredSpots(equal_depth(), one_section(), np.zeros((N_SPOTS, 2)))
    values = np.ones((N_SPOTS, N_GENES))
    bad = Metric("bad", "", lambda truth, predicted, spots: found)
    with pytest.raises(HistosgeError, match="metric 'bad' returned shape"):
        score_genes(values, values, spots, [bad])
