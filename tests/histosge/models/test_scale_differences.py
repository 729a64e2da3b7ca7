"""The ridge on differences of scales: its weights fold back, its projection is the same in parts, and stains cancel."""

from collections.abc import Sequence

import numpy as np
import pytest

from histosge.models import scale_differences
from histosge.models.linear_algebra import Floats, Standardiser
from histosge.models.scale_differences import (
    SAMPLED,
    PatchSample,
    ScaleDifferences,
    is_projected,
    sample_patches,
)

N_SCALES, DIM, N_SPOTS = 5, 11, 83


def _inputs(differences: ScaleDifferences, scales: Sequence[Floats]) -> Floats:
    inputs = np.empty((len(scales[0]), differences.n_inputs))
    for i, scale in enumerate(scales):
        differences.add_scale(inputs, i, scale)
    return inputs


def _scales(seed: int = 1, dim: int = DIM) -> list[Floats]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((N_SPOTS, dim)) + 3 for _ in range(N_SCALES)]


@pytest.mark.parametrize("n_projected", [None, 7])
def test_folded_weights_predict_what_those_of_the_differences_do(n_projected: int | None) -> None:
    rng, scales = np.random.default_rng(2), _scales()
    projection = None if n_projected is None else rng.standard_normal((DIM, n_projected))
    differences = ScaleDifferences(N_SCALES, DIM, projection)
    own = [scale if projection is None else scale @ projection for scale in scales]
    inputs = np.hstack([own[0] - own[1], own[1] - own[2], own[2] - own[3], own[3] - own[4], own[4]])
    weight = rng.standard_normal((differences.n_inputs, 3))
    folded = differences.to_scales(weight)
    found = sum(scale @ part for scale, part in zip(scales, folded, strict=True))
    np.testing.assert_allclose(found, inputs @ weight, atol=1e-11)
    np.testing.assert_allclose(_inputs(differences, scales), inputs, atol=1e-12)
    # Sums are of embeddings less a reference: that of the inputs is what the reference itself gives.
    reference = rng.standard_normal(DIM)
    shifted = _inputs(differences, [scale - reference for scale in scales])
    np.testing.assert_allclose(shifted, inputs - differences.reference(reference), atol=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.3, 1.0])
@pytest.mark.parametrize("n_patches", [1, SAMPLED, SAMPLED + 1, 37 * SAMPLED + 3])
def test_a_slide_that_is_read_in_parts_gives_the_same_sample(n_patches: int, share: float) -> None:
    embedding = np.arange(2 * n_patches, dtype=np.float32).reshape(n_patches, 2) % 2039
    rng = np.random.default_rng(3)
    under = np.repeat(np.flatnonzero(rng.random(n_patches) < share), 2)
    whole, parts, start = sample_patches(embedding, under), PatchSample(), 0
    while start < n_patches:
        stop = start + int(rng.integers(0, 700))
        parts.add(embedding[start:stop])
        start = stop
    np.testing.assert_array_equal(parts.rows(2, under), whole)
    assert min(len(set(under.tolist())) // 8, SAMPLED // 2) <= len(whole) <= SAMPLED
    # Of patches under spots alone, and of those evenly.
    other = embedding.copy()
    other[np.setdiff1d(np.arange(n_patches), under)] = -1
    np.testing.assert_array_equal(sample_patches(other, under), whole)


def test_components_are_those_of_standardised_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_differences, "MAX_DIM", 10)
    monkeypatch.setattr(scale_differences, "N_COMPONENTS", 4)
    rng = np.random.default_rng(4)
    samples = [
        rng.standard_normal((97, 4)) @ rng.standard_normal((4, DIM)) * np.arange(DIM) + 50 for _ in range(3)
    ]
    found = ScaleDifferences.fit(N_SCALES, DIM, samples)
    assert found is not None
    assert is_projected(DIM)
    assert found.projection is not None
    rows = np.vstack(samples)
    sd = rows.std(axis=0)
    # The first number is constant: it has no part in any component.
    assert sd[0] == 0
    np.testing.assert_allclose(found.projection[0], 0)
    z = (rows - rows.mean(axis=0))[:, 1:] / sd[1:]
    axes = np.linalg.svd(z, full_matrices=False)[2][:4].T
    theirs = found.projection[1:] * sd[1:, None]
    np.testing.assert_allclose(theirs @ theirs.T, axes @ axes.T, atol=1e-9)
    # Fewer directions than components: what is left is rounding, and no direction.
    flat = ScaleDifferences.fit(N_SCALES, DIM, [np.outer(rng.standard_normal(41), np.ones(DIM))])
    assert flat is not None
    assert flat.n_inputs == N_SCALES
    for nothing in (np.zeros((0, DIM)), np.ones((3, DIM))):
        assert ScaleDifferences.fit(N_SCALES, DIM, [nothing]) is None


def test_rounding_of_a_constant_number_is_no_input() -> None:
    rng, scales = np.random.default_rng(5), _scales()
    for scale in scales:
        scale[:, 2] = 700 * (1 + 1e-8 * rng.standard_normal(N_SPOTS))
    differences = ScaleDifferences(N_SCALES, DIM, None)
    inputs = _inputs(differences, scales)
    found = differences.standardiser(Standardiser.fit(inputs), [scale.mean(axis=0) for scale in scales])
    is_constant = np.isinf(found.scale).reshape(N_SCALES, DIM)
    assert is_constant[:, 2].all()
    assert is_constant.sum() == N_SCALES


def test_small_components_stay_small() -> None:
    differences = ScaleDifferences(N_SCALES, DIM, np.eye(DIM)[:, :2] * [1.0, 0.01])
    inputs = _inputs(differences, _scales())
    found = differences.standardiser(Standardiser.fit(inputs), [])
    spread = found.apply(inputs).std(axis=0).reshape(N_SCALES, 2)
    np.testing.assert_allclose((spread**2).mean(axis=1), 1)
    np.testing.assert_allclose(spread[:, 1] / spread[:, 0], 0.01, rtol=0.3)


@pytest.mark.parametrize("n_projected", [None, 7])
def test_a_stain_leaves_the_differences_between_means(n_projected: int | None) -> None:
    """Against the shifts of the inputs themselves: a patch shifts by its own, all means around it as the slide does."""
    rng = np.random.default_rng(6)
    projection = None if n_projected is None else rng.standard_normal((DIM, n_projected))
    differences = ScaleDifferences(N_SCALES, DIM, projection)
    around = np.repeat(rng.standard_normal((3, DIM)), 40, axis=0)
    relative = rng.standard_normal((3, 40, DIM))
    relative = (relative - relative.mean(axis=1, keepdims=True)).reshape(-1, DIM)
    shifts = _inputs(differences, [around + relative, *[around] * 4])
    found = differences.stain_covariance(
        relative.T @ relative / len(relative), around.T @ around / len(around)
    )
    np.testing.assert_allclose(found, shifts.T @ shifts / len(shifts), atol=1e-12)
