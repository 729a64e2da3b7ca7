"""The count likelihood: right rates whatever the depth, nothing dead, refused where it cannot be had."""

from dataclasses import replace

import numpy as np
import pytest

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import disc_overlap
from histosge.errors import ModelError
from histosge.models.count_loss import CountHead
from histosge.models.dense import DenseModel


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
