import numpy as np
import pytest

from histosge.domains import (
    adjusted_rand_index,
    find_domains,
    normalised_mutual_information,
    score_domains,
)


def quarters(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    row, col = (axis.ravel() for axis in np.indices((23, 19)))
    label = 1 + (row > 11) + 2 * (col > 9)
    expression = rng.standard_normal((4, 31))[label - 1] + noise * rng.standard_normal((len(label), 31))
    return expression, np.stack([col, row], axis=1) * 100.0, label


def test_planted_domains_are_found_and_noise_is_not() -> None:
    expression, xy_um, label = quarters(1.0)
    found = score_domains(expression, xy_um, label)
    assert len(found.ari) == 20
    assert np.median(found.ari) > 0.8
    assert np.median(found.nmi) > 0.8
    # Not 0: any smooth domains share neighbours with smooth labels, so a noise control stands beside each score.
    rng = np.random.default_rng(2)
    noise = [score_domains(rng.standard_normal(expression.shape), xy_um, label, seeds=2) for _ in range(20)]
    assert 0 < np.mean([found.ari for found in noise]) < 0.1


def test_unlabelled_positions_are_dropped_and_not_a_class() -> None:
    expression, xy_um, label = quarters(0.1)
    some = np.where(np.arange(len(label)) % 3 == 0, 0, label)
    np.testing.assert_allclose(np.median(score_domains(expression, xy_um, some).ari), 1, atol=0.15)
    with pytest.raises(ValueError, match="at least 2 labels"):
        score_domains(expression, xy_um, np.where(label == 1, 1, 0))


def test_a_seed_repeats_its_domains() -> None:
    expression, xy_um, _ = quarters(2.0)
    first, again = (find_domains(expression, xy_um, 4, seed=3) for _ in range(2))
    assert (first == again).all()
    assert len(np.unique(first)) == 4


def test_agreement_does_not_depend_on_names_and_is_zero_by_chance() -> None:
    a = np.array([0, 0, 1, 1, 2, 2])
    assert adjusted_rand_index(a, (a + 1) % 3) == pytest.approx(1)
    assert normalised_mutual_information(a, (a + 1) % 3) == pytest.approx(1)
    # Worked by hand: 2 pairs agree of 3 and 6, of 15 in all.
    assert adjusted_rand_index(np.array([0, 0, 1, 1, 2, 2]), np.array([0, 0, 0, 1, 1, 1])) == pytest.approx(
        (2 - 3 * 6 / 15) / (4.5 - 3 * 6 / 15)
    )
    rng = np.random.default_rng(0)
    chance = [adjusted_rand_index(rng.integers(0, 3, 211), rng.integers(0, 5, 211)) for _ in range(50)]
    assert abs(np.mean(chance)) < 0.01


def test_too_few_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot find 5 domains among 3"):
        find_domains(np.ones((3, 7)), np.zeros((3, 2)), 5)
