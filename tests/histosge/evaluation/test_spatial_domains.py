import sys
from pathlib import Path

import numpy as np
import pytest

from histosge.errors import HistosgeError
from histosge.evaluation.spatial_domains import SEEDS, find_domains, score_domains


def test_indices_agree_with_published_values() -> None:
    # Hubert and Arabie's index and NMI of a small table, worked out by hand from pairs and entropies.
    domains = np.array([[0, 0, 1, 1], [0, 1, 0, 1]])
    scores = score_domains(domains, np.array(["x", "x", "y", "z"]))
    assert scores.ari[0] == pytest.approx(4 / 7)
    assert scores.nmi[0] == pytest.approx(0.8)
    assert score_domains(domains, np.array([0, 0, 1, 1])).ari[1] == pytest.approx(-0.5)


def test_one_class_on_both_sides_is_agreement() -> None:
    same = score_domains(np.zeros((1, 13), np.int64), np.zeros(13))
    assert (same.ari[0], same.nmi[0]) == (1, 1)


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


def test_domains_are_those_of_scikit_learn_on_twenty_components() -> None:
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    # Noise: where nothing is planted, every component decides.
    values = np.random.default_rng(1).standard_normal((307, 31))
    components = PCA(20, svd_solver="full").fit_transform(values)
    (found,) = find_domains(values, 5, [3])
    theirs = KMeans(5, n_init=1, random_state=3).fit_predict(components)
    # The sign of a component is anybody's choice; distances do not depend on it.
    assert score_domains(found[None], theirs).ari[0] == 1


def test_equal_positions_make_fewer_domains_without_a_warning() -> None:
    values = np.repeat(np.eye(2, 11), 7, axis=0)
    (found,) = find_domains(values, 5, [0])
    assert len(np.unique(found)) == 2


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
