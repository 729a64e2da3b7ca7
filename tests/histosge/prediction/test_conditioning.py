"""Measured spots: interpolated between, reproduced under their discs, and without effect on unmeasured genes."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from histosge.data.gaussian_pooling import gaussian_pool
from histosge.data.genes import SCALE, library_size
from histosge.data.sections import Patches, Section, Spots
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.errors import ModelError
from histosge.models.empirical_bayes import dispersion, posterior_rates
from histosge.models.presets.mean import MeanModel
from histosge.models.residual_kriging import choose_blend
from histosge.prediction.conditioning import ConditionedModel, CoveredPatches
from histosge.prediction.spot_rescaling import RateFactors
from histosge.training.model_card import ModelCard
from histosge.training.saved_model import SavedModel

GENES = tuple(f"G{i}" for i in range(7))


def _section(depth: float = 20_000, side: int = 30, seed: int = 1) -> tuple[Section, np.ndarray]:
    """Rates vary smoothly in space; embeddings are noise. Returns the section and true log1p rates."""
    rng = np.random.default_rng(seed)
    rows, cols = (a.ravel() for a in np.mgrid[:side, :side])
    blank = Patches("S", rows, cols, rng.standard_normal((len(rows), 4)).astype(np.float32), 50.0, 100.0)
    smooth = gaussian_pool(blank, 200.0, ("mean",))
    smooth = (smooth - smooth.mean(axis=0)) / smooth.std(axis=0)
    logs = 4 + 0.25 * smooth @ np.random.default_rng(9).standard_normal((4, len(GENES)))
    patches = blank.with_embedding(rng.standard_normal((len(rows), 4)).astype(np.float32))
    x, y = (a.ravel() for a in np.meshgrid(*[np.arange(150.0, side * 50, 100.0)] * 2))
    xy_um = np.stack([x, y], axis=1)
    overlap = disc_overlap(xy_um, 55.0, patches)
    rate = np.expm1(spots_from_patches(overlap, logs).astype(float))
    counts = rng.poisson(rate * depth / SCALE)
    rest = np.maximum(depth - counts.sum(axis=1, keepdims=True), 0)
    table = sparse.csr_matrix(np.hstack([counts, rest]).astype(np.float32))
    spots = Spots("S", "D", np.arange(len(xy_um)).astype(str), xy_um, 55.0, table, (*GENES, "REST"))
    return Section(patches, spots, overlap, np.zeros((side, side, 3), np.uint8)), logs


def _saved(genes: tuple[str, ...] = GENES) -> SavedModel:
    card = ModelCard("mean", genes, {}, {}, {}, (), 0)
    return SavedModel(MeanModel(np.full(len(genes), 3.7, np.float32)), card, "0")


def _some(section: Section, keep: np.ndarray) -> Section:
    spots = section.spots
    fewer = replace(spots, barcodes=spots.barcodes[keep], xy_um=spots.xy_um[keep], counts=spots.counts[keep])
    return replace(section, spots=fewer, overlap=section.overlap[keep])


def test_spots_that_were_kept_back_are_predicted_from_the_others() -> None:
    section, logs = _section()
    keep = np.random.default_rng(3).random(len(section.spots)) < 0.5
    model = ConditionedModel.fit(_saved(), _some(section, keep))
    guess = spots_from_patches(section.overlap[~keep], model.predict(section.patches))
    truth = spots_from_patches(section.overlap[~keep], logs)
    for gene in range(len(GENES)):
        assert np.corrcoef(guess[:, gene], truth[:, gene])[0, 1] > 0.7


def test_a_spot_with_few_counts_is_shrunk_to_its_neighbours_not_to_the_model_s_mean() -> None:
    section, logs = _section(depth=2_000)
    true = np.expm1(spots_from_patches(section.overlap, logs).astype(float))
    counts, exposure = section.spots.counts.toarray()[:, : len(GENES)], library_size(section.spots) / SCALE
    mean_alone = posterior_rates(counts.astype(float), exposure, np.full(counts.shape, np.expm1(3.7)))
    found = ConditionedModel.fit(_saved(), section).spot_rates

    def off(rates: np.ndarray) -> float:
        return float(np.abs(np.log(rates / true)).mean())

    assert off(found) < 0.7 * off(mean_alone)


def test_under_a_disc_with_many_counts_the_map_has_the_measured_rate() -> None:
    section, _ = _section(depth=5_000_000)
    model = ConditionedModel.fit(_saved(), section)
    guess = np.expm1(spots_from_patches(section.overlap, model.predict(section.patches)).astype(float))
    counts = section.spots.counts.toarray()[:, : len(GENES)]
    measured = counts * SCALE / library_size(section.spots)[:, None]
    # A spot at the rim may be further from its interpolated rate than the gene's dispersion allows for.
    off = np.abs(guess / measured - 1)
    assert np.quantile(off, 0.95) < 0.02
    assert off.max() < 0.1


def test_a_gene_that_was_not_measured_stays_as_the_model_predicts_it() -> None:
    section, _ = _section()
    model = ConditionedModel.fit(_saved(("ELSE", *GENES)), section)
    predicted = model.predict(section.patches)
    assert (predicted[:, 0] == np.float32(3.7)).all()
    assert (predicted[:, 1:].std(axis=0) > 0.05).all()


def test_spots_of_other_genes_or_too_few_are_refused_in_one_line() -> None:
    section, _ = _section()
    with pytest.raises(ModelError, match="none of the model's 1 genes") as refused:
        ConditionedModel.fit(_saved(("ENSG1",)), section)
    assert "\n" not in str(refused.value)
    few = _some(section, np.arange(len(section.spots)) < 19)
    with pytest.raises(ModelError, match="19 usable spots"):
        ConditionedModel.fit(_saved(), few)


def test_noise_at_the_spots_is_not_blended_in() -> None:
    rng = np.random.default_rng(7)
    truth = rng.standard_normal((500, 3))
    unseen = np.stack([0.5 * truth[:, 0], -truth[:, 1], rng.standard_normal(500)], axis=1)
    blend = choose_blend(truth, unseen)
    assert blend[0] == 1
    assert blend[1] == 0
    assert blend[2] < 0.15


def test_few_counts_are_shrunk_to_the_prediction_and_many_hardly_at_all() -> None:
    rng = np.random.default_rng(5)
    exposure = np.repeat([0.01, 100.0], 400)
    rate = np.full((800, 2), 11.0)
    true = rate * np.exp(0.5 * rng.standard_normal((800, 2)) * [1, 0])
    counts = rng.poisson(true * exposure[:, None]).astype(float)
    spread = dispersion(counts, exposure, rate)
    assert spread[0] > 0.15 > 0.01 > spread[1]
    found = posterior_rates(counts, exposure, rate)
    assert np.abs(found[400:, 0] / true[400:, 0] - 1).max() < 0.15
    assert np.abs(found[:400, 0] / 11 - 1).mean() < 0.3
    assert np.abs(found[:, 1] / 11 - 1).max() < 0.05


def test_factors_change_only_patches_under_discs_and_give_each_disc_its_rate() -> None:
    section, logs = _section()
    wanted = np.random.default_rng(2).uniform(3, 50, (len(section.spots), len(GENES)))
    under = np.unique(section.overlap.indices)
    log32 = logs.astype(np.float32)
    rescaled = RateFactors.solve(section.patches, section.overlap, log32[under], wanted).apply(
        section.patches, log32
    )
    rates = np.expm1(spots_from_patches(section.overlap, rescaled).astype(float))
    assert np.abs(rates / wanted - 1).max() < 0.01
    outside = np.setdiff1d(np.arange(len(logs)), under)
    np.testing.assert_array_equal(rescaled[outside], log32[outside])


def test_patches_under_discs_are_predicted_the_same_in_bands_and_at_once() -> None:
    section, _ = _section()
    covered = CoveredPatches.from_overlap(section.patches, section.overlap)

    def pooled(patches: Patches) -> np.ndarray:
        return gaussian_pool(patches, 80.0, ("mean",))

    expected = pooled(section.patches)[covered.index]
    np.testing.assert_allclose(covered.predict(pooled, 240.0), expected, atol=1e-6)
