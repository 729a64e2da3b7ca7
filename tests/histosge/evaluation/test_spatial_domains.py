import sys
from pathlib import Path

import numpy as np
import pytest

from histosge.errors import HistosgeError
from histosge.evaluation.spatial_domains import (
    SEEDS,
    adjusted_rand,
    find_domains,
    mutual_information,
    score_domains,
)


def test_indices_agree_with_published_values() -> None:
    # Hubert and Arabie's index and NMI of a small table, worked out by hand from pairs and entropies.
    a, b = np.array([0, 0, 1, 1]), np.array([0, 0, 1, 2])
    assert adjusted_rand(a, b) == pytest.approx(4 / 7)
    assert mutual_information(a, b) == pytest.approx(0.8)
    assert adjusted_rand(np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])) == pytest.approx(-0.5)


def test_names_of_classes_do_not_matter_and_equal_labellings_score_one() -> None:
    labels = np.random.default_rng(3).integers(0, 7, 211)
    names = np.array(list("gfedcba"))[labels]
    assert adjusted_rand(labels, names) == pytest.approx(1)
    assert mutual_information(labels, names) == pytest.approx(1)
    other = np.random.default_rng(5).integers(0, 5, 211)
    assert adjusted_rand(labels, other) == pytest.approx(adjusted_rand(other, labels))
    assert mutual_information(labels, other) == pytest.approx(mutual_information(other, labels))


def test_random_labellings_score_zero_by_the_adjusted_index() -> None:
    rng = np.random.default_rng(7)
    scores = [adjusted_rand(rng.integers(0, 7, 997), rng.integers(0, 5, 997)) for _ in range(50)]
    assert abs(np.mean(scores)) < 0.002


def test_one_class_on_both_sides_is_agreement() -> None:
    same = np.zeros(13)
    assert adjusted_rand(same, same) == 1
    assert mutual_information(same, same) == 1
    assert mutual_information(same, np.arange(13)) == 0


def planted(rng: np.random.Generator, n: int = 307, n_genes: int = 31) -> tuple[np.ndarray, np.ndarray]:
    labels = rng.integers(1, 6, n)
    return rng.standard_normal((6, n_genes))[labels] * 2 + rng.standard_normal((n, n_genes)) * 0.5, labels


def test_planted_domains_are_found_by_every_seed_or_nearly() -> None:
    values, labels = planted(np.random.default_rng(1))
    domains = find_domains(values, 5)
    assert domains.shape == (SEEDS, len(labels))
    scores = score_domains(domains, labels)
    assert scores.ari.mean() > 0.9
    assert scores.nmi.mean() > 0.9


def test_noise_has_no_domains() -> None:
    rng = np.random.default_rng(2)
    scores = score_domains(find_domains(rng.standard_normal((307, 31)), 5), rng.integers(0, 5, 307))
    assert abs(scores.ari.mean()) < 0.02


def test_unlabelled_positions_are_dropped_and_counted() -> None:
    values, labels = planted(np.random.default_rng(1))
    hidden = labels.copy()
    hidden[::3] = 0
    domains = find_domains(values, 5)
    scores = score_domains(domains, hidden, unlabelled=0)
    assert (scores.n_labelled, scores.n_unlabelled) == ((hidden > 0).sum(), (hidden == 0).sum())
    kept = hidden > 0
    np.testing.assert_allclose(scores.ari, score_domains(domains[:, kept], labels[kept]).ari)
    # As a class of its own, no label would count against the domains.
    assert score_domains(domains, hidden).ari.mean() < scores.ari.mean() - 0.2


def test_the_same_seeds_give_the_same_domains() -> None:
    values, _ = planted(np.random.default_rng(1))
    np.testing.assert_array_equal(find_domains(values, 3, [4, 9]), find_domains(values, 3, [4, 9]))


@pytest.mark.parametrize(
    ("values", "k"), [(np.zeros((3, 2)), 5), (np.full((9, 2), np.nan), 2), (np.zeros((9, 2)), 0)]
)
def test_what_cannot_be_cut_is_refused(values: np.ndarray, k: int) -> None:
    with pytest.raises(HistosgeError, match="cannot cut"):
        find_domains(values, k)


def test_labels_that_do_not_fit_are_refused() -> None:
    domains = np.zeros((3, 7), dtype=np.int64)
    with pytest.raises(HistosgeError, match="6 labels do not fit 7 positions"):
        score_domains(domains, np.zeros(6))
    with pytest.raises(HistosgeError, match="0 of 7 positions have a label"):
        score_domains(domains, np.zeros(7), unlabelled=0)


@pytest.mark.slow
def test_measured_and_predicted_expression_follow_the_true_tissue_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import json

    import domains

    monkeypatch.setattr(sys, "argv", ["domains.py", "--quick", "--json", str(tmp_path / "out.json")])
    domains.main()
    found = {row["what"]: row["value"] for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert found["measured expression, spots: ARI"] > 0.4
    assert found["dense, predicted map of an unseen section: ARI"] > 0.3
    assert abs(found["random numbers: ARI"]) < 0.03
