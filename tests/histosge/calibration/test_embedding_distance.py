"""A slide is as far from the training sections as the mean of its embeddings, in their standard deviations."""

import numpy as np
import pytest
from scipy import sparse

from histosge.calibration.embedding_distance import MAX_PATCHES, EmbeddingReference
from histosge.data.sections import Patches, TrainingSection


def section(shift: float, n: int = 5000) -> TrainingSection:
    rng = np.random.default_rng([round(10 * shift), n])
    embedding = np.array([3, 5]) + np.array([0.1, 7]) * (shift + rng.standard_normal((n, 2)))
    # The third number is constant: no distance in it can be measured.
    embedding = np.column_stack([embedding, np.full(n, 11.0)]).astype(np.float32)
    patches = Patches("S", np.arange(n), np.zeros(n, np.int64), embedding, 50.0, 50.0)
    return TrainingSection(patches, sparse.eye(n, format="csr"), patches.xy_um, np.zeros((n, 1), np.float32))


def test_distances_are_in_standard_deviations_within_training_sections() -> None:
    reference = EmbeddingReference.fit([section(0.0), section(1.0)])
    assert reference.among_sections == pytest.approx(1, abs=0.1)
    assert reference.distance(section(0.5).patches.embedding) == pytest.approx(0, abs=0.1)
    assert reference.distance(section(3.5).patches.embedding) == pytest.approx(3, abs=0.1)


def test_a_lone_section_has_nothing_to_compare_with_and_large_ones_are_thinned_evenly() -> None:
    reference = EmbeddingReference.fit([section(0.0, 10 * MAX_PATCHES)])
    assert reference.among_sections is None
    assert reference.distance(section(2.0).patches.embedding) == pytest.approx(2, abs=0.1)
