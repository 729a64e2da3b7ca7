"""The preset `attention`: exact where it must be, and kept only where held-out sections gain."""

from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_blocks import SectionBlocks
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.errors import ModelError
from histosge.models.adaptation import adapt_dense
from histosge.models.attention_folds import donor_groups, out_of_fold
from histosge.models.attention_state import network_with_genes
from histosge.models.block_attention import AttentionModel
from histosge.models.block_network import BlockNetwork, NetworkShape, plan_layers, spot_prediction
from histosge.models.block_training import AttentionSettings, DensePatches, split_sections
from histosge.models.checkpoint import Checkpoint
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import Standardiser
from histosge.models.low_rank_targets import MAX_LOG
from histosge.models.whitening import SHRINKAGE, Whitening

GENES, DIM, SIDE, STRIDE = 7, 5, 18, 56.0
# Two small layers: the tests are about exactness.
SMALL = AttentionSettings(radii_um=(120.0, 120.0), width=16, heads=2, learning_rate=1e-2, batch=1)


@cache
def _section(seed: int, curved: float = 0.8, donor: str = "") -> TrainingSection:
    """Genes follow the first number of the embedding, in a line and, so much, in a curve that no line can follow."""
    rng = np.random.default_rng(seed)
    rows, cols = np.nonzero(rng.random((SIDE, SIDE)) > 0.05)
    z = rng.standard_normal((len(rows), DIM)).astype(np.float32)
    first = z[:, :1].astype(float)
    logs = 5 + (0.3 * first + curved * ((np.abs(first) < 0.7) - 0.5)) * np.linspace(0.5, 1.5, GENES)
    patches = Patches(f"S{seed}", rows, cols, z, STRIDE, STRIDE)
    along = np.arange(60, SIDE * STRIDE - 50, 90.0)
    xy = np.stack([axis.ravel() for axis in np.meshgrid(along, along)], axis=1)
    overlap = disc_overlap(xy, 55.0, patches)
    keep = np.asarray(overlap.sum(axis=1)).ravel() > 0
    target = spots_from_patches(overlap[keep], logs)
    target += (0.2 * rng.standard_normal(target.shape)).astype(np.float32)
    library = np.exp(8 + 0.1 * rng.standard_normal(len(target)))
    return TrainingSection(patches, overlap[keep], xy[keep], target, library, donor=donor)


@cache
def _kept() -> AttentionModel:
    return AttentionModel.fit([_section(seed) for seed in range(9)], epochs=14, settings=SMALL)


def _network(seed: int = 0, *, radii_um: tuple[float, ...] = (120.0, 170.0)) -> BlockNetwork:
    """A network that is not at its start: it adds something."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    shape = NetworkShape(DIM, GENES, 3, 16, 4, radii_um)
    network = BlockNetwork(shape, rng.standard_normal((GENES, 3)), np.ones(GENES)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def _added(network: BlockNetwork, patches: Patches, of: NDArray[np.int64], *, pairs: bool) -> torch.Tensor:
    plan = plan_layers(patches.rows, patches.cols, patches.stride_um, network.shape.radii_um, of)
    added: torch.Tensor = network(torch.from_numpy(patches.embedding[plan.needed]), plan, pairs=pairs)
    return added


def test_an_untrained_network_gives_dense_to_the_bit() -> None:
    section = _section(1)
    dense = DenseModel.fit([section, _section(2)])
    torch.manual_seed(3)
    network = BlockNetwork(NetworkShape(DIM, GENES, 7), dense.targets.axes, dense.targets.sd).eval()
    standardiser = Standardiser.fit(section.patches.embedding.astype(float))
    model, patches = AttentionModel(dense, standardiser, network), section.patches
    np.testing.assert_array_equal(model.predict(patches), dense.predict(patches))
    pairs = section.overlap.tocoo()
    overlap = tuple(torch.from_numpy(np.asarray(a)) for a in (pairs.row.astype(int), pairs.col.astype(int)))
    share = torch.from_numpy(pairs.data.astype(np.float32))
    d = torch.from_numpy(dense.predict(patches))
    spot = torch.from_numpy(spots_from_patches(section.overlap, d.numpy()))
    same = spot_prediction(spot, d, torch.zeros_like(d), (*overlap, share), float(MAX_LOG))  # type: ignore[arg-type]
    assert torch.equal(same, spot)
    # And otherwise it is the mean of the rates under the disc.
    r = 0.3 * torch.randn_like(d)
    shifted = spot_prediction(spot, d, r, (*overlap, share), float(MAX_LOG))  # type: ignore[arg-type]
    expected = spots_from_patches(section.overlap, (d + r).numpy())
    np.testing.assert_allclose(shifted.numpy(), expected, atol=2e-5)


def test_a_whitened_covariance_is_shrunk_towards_one_and_keeps_its_length() -> None:
    spread = np.array([4.0, 1.0, 0.25, 0.01, 0.0])
    axes = np.linalg.qr(np.random.default_rng(7).standard_normal((5, 5)))[0]
    covariance = (axes * spread) @ axes.T
    whitening = Whitening.from_covariance(covariance)
    assert whitening is not None
    np.testing.assert_allclose(whitening.matrix @ whitening.inverse, np.eye(5), atol=1e-10)
    np.testing.assert_allclose(whitening.matrix, whitening.matrix.T, atol=1e-12)
    whitened = whitening.matrix @ covariance @ whitening.matrix
    found = np.diag(axes.T @ whitened @ axes)
    expected = spread / (spread + SHRINKAGE * spread.mean())
    np.testing.assert_allclose(found, expected * spread.sum() / expected.sum(), atol=1e-10)
    assert Whitening.from_covariance(np.zeros((3, 3))) is None


@pytest.mark.parametrize("stride_um", [56.0, 14.0])
def test_gathered_windows_and_masked_pairs_give_the_same_values_and_gradients(stride_um: float) -> None:
    patches = replace(_section(1).patches, stride_um=stride_um)
    of = np.arange(40, 200, 3)
    results = []
    for pairs in (False, True):
        network = _network()
        added = _added(network, patches, of, pairs=pairs)
        (added**2).mean().backward()
        results.append((added.detach(), {n: p.grad for n, p in network.named_parameters()}))
    (windows, gradients), (masked, others) = results
    assert windows.abs().max() > 0.1
    torch.testing.assert_close(windows, masked, atol=1e-5, rtol=1e-5)
    for name, gradient in gradients.items():
        assert gradient is not None
        torch.testing.assert_close(gradient, others[name], atol=1e-5, rtol=1e-4, msg=name)


def test_flips_and_rotations_of_a_block_change_nothing() -> None:
    patches, network, of = _section(1).patches, _network(), np.arange(0, 300, 7)
    plain = _added(network, patches, of, pairs=False)
    for rows, cols in (
        (SIDE - patches.rows, patches.cols),
        (patches.cols, patches.rows),
        (SIDE - patches.cols, patches.rows),
    ):
        turned = _added(network, replace(patches, rows=rows, cols=cols), of, pairs=False)
        torch.testing.assert_close(turned, plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("pairs", [False, True])
def test_a_patch_is_seen_as_far_as_the_halo_and_no_further(pairs: bool) -> None:
    rows, cols = (axis.ravel() for axis in np.mgrid[:1, :13])
    rng = np.random.default_rng(0)
    patches = Patches("S", rows, cols, rng.standard_normal((13, DIM)).astype(np.float32), STRIDE, STRIDE)
    # 120 um are two patches of 56 um, 170 um three: five patches to the right of the first.
    network, first = _network(), np.array([0])
    plain = _added(network, patches, first, pairs=pairs)

    def changed(at: int) -> float:
        embedding = patches.embedding.copy()
        embedding[at] += 1
        other = _added(network, patches.with_embedding(embedding), first, pairs=pairs)
        return float((other - plain).detach().abs().max())

    assert min(changed(at) for at in range(6)) > 1e-4
    assert max(changed(at) for at in range(6, 13)) < 1e-5
    # Background is no neighbour: without the patches 1 to 3 nothing links the first one to the rest.
    gap = patches.take(~np.isin(cols, [1, 2, 3]))
    alone = _added(network, patches.take(cols == 0), first, pairs=pairs)
    torch.testing.assert_close(_added(network, gap, first, pairs=pairs), alone, atol=1e-6, rtol=1e-5)


def test_maps_do_not_depend_on_where_blocks_end() -> None:
    model, section = _kept(), _section(11)
    reduce, reduced = model.split()
    assert model.network is not None
    assert reduce is not None
    patches, halo = section.patches, int(np.ceil(reduced.halo_um / STRIDE))

    def in_blocks(edges: list[int]) -> NDArray[np.float32]:
        out = np.full((len(patches), GENES), np.nan, np.float32)
        for top, bottom in pairwise(edges):
            for left, right in pairwise(edges):
                rows, cols = patches.rows, patches.cols
                own = (rows >= top) & (rows < bottom) & (cols >= left) & (cols < right)
                near = (rows >= top - halo) & (rows < bottom + halo)
                near &= (cols >= left - halo) & (cols < right + halo)
                window = patches.take(near)
                window = window.with_embedding(reduce(window.embedding))
                out[own] = reduced.predict_some(window, np.flatnonzero(own[near]))
        return out

    plain, shifted = in_blocks([0, 8, 16, SIDE]), in_blocks([0, 4, 12, SIDE])
    np.testing.assert_allclose(plain, shifted, atol=1e-5, rtol=0)
    np.testing.assert_allclose(plain, model.predict(patches), atol=1e-5, rtol=0)


def test_what_no_line_can_follow_is_learned_and_carries_over() -> None:
    model, unseen = _kept(), _section(12)
    assert model.network is not None
    assert "kept" in model.remark

    def error(one: AttentionModel) -> float:
        guess = spots_from_patches(unseen.overlap, one.predict(unseen.patches))
        return float(((guess - unseen.target) ** 2).mean())

    assert error(model) < 0.8 * error(replace(model, network=None))
    assert model.facts["sections"] == [4, 1, 3, 1]
    assert max(model.facts["judging_change"]) < -0.1


def test_a_network_takes_over_another_one_for_other_patterns_and_fewer_genes() -> None:
    earlier, columns = _network(1), np.array([0, 2, 3, 6])
    axes = np.linalg.qr(np.random.default_rng(4).standard_normal((len(columns), 2)))[0]
    new = BlockNetwork(
        NetworkShape(DIM, len(columns), 2, 16, 4, (120.0, 170.0)), axes, np.full(len(columns), 3.0)
    )
    patches, of = _section(1).patches, np.arange(40, 90)
    found = _added(network_with_genes(earlier, new.eval(), columns), patches, of, pairs=False)
    # In units of each gene's spread, 1 before and 3 now.
    torch.testing.assert_close(
        found / 3, _added(earlier, patches, of, pairs=False)[:, columns], atol=1e-5, rtol=1e-5
    )


def test_whitening_changes_neither_what_a_trained_network_computes_nor_what_is_saved() -> None:
    patches, of = _section(1).patches, np.arange(40, 90)
    mixed = np.random.default_rng(5).standard_normal((DIM, DIM)) * np.array([3.0, 1.0, 1.0, 0.3, 0.1])
    whitening = Whitening.from_covariance(mixed.T @ mixed)
    assert whitening is not None
    plain, network = _network(), _network()
    network.whiten(whitening, is_trained=True)
    wanted = _added(plain, patches, of, pairs=False)
    torch.testing.assert_close(_added(network, patches, of, pairs=False), wanted, atol=1e-5, rtol=1e-4)
    assert set(network.state_dict()) == set(plain.state_dict())
    # Folded in, it is part of the weights; without it, they are others.
    network.fold_whitening()
    torch.testing.assert_close(_added(network, patches, of, pairs=False), wanted, atol=1e-5, rtol=1e-4)
    anew = _network()
    anew.whiten(whitening, is_trained=False)
    trained = _added(anew, patches, of, pairs=False)
    assert (trained - wanted).abs().max() > 0.1
    anew.fold_whitening()
    torch.testing.assert_close(_added(anew, patches, of, pairs=False), trained, atol=1e-5, rtol=1e-4)


def test_features_of_little_variance_are_learned_as_fast_as_others() -> None:
    """Genes follow a feature that has a tenth of the variance of the others, and that a rotation hides."""
    rotation = np.linalg.qr(np.random.default_rng(6).standard_normal((DIM, DIM)))[0]
    weak = (np.diag([0.3, *[1.0] * (DIM - 1)]) @ rotation).astype(np.float32)
    sections = [
        replace(one, patches=one.patches.with_embedding(one.patches.embedding @ weak))
        for one in map(_section, range(9))
    ]
    model = AttentionModel.fit(sections, epochs=14, settings=SMALL)
    assert max(model.facts["judging_change"]) < -0.1


def test_a_model_goes_on_from_its_network() -> None:
    """One epoch is enough for what was learned before, and too little to learn it anew."""
    sections = [_section(seed) for seed in range(30, 36)]
    columns = np.arange(GENES)
    fit_dense = partial(adapt_dense, _kept().dense, columns)
    adapted = _kept().adapt(sections, fit_dense, columns, epochs=1)
    anew = AttentionModel.fit(sections, epochs=1, settings=SMALL)
    assert adapted.network is not None
    assert adapted.facts["stopping_error"][0] < 0.9 * anew.facts["stopping_error"][0]
    assert np.mean(adapted.facts["judging_change"]) < np.mean(anew.facts["judging_change"])
    # Too few to judge by: the model is the adapted dense.
    few = _kept().adapt(sections[:2], fit_dense, columns)
    np.testing.assert_array_equal(
        few.predict(sections[2].patches), fit_dense(sections[:2]).predict(sections[2].patches)
    )
    assert "not tried" in few.remark


def test_without_structure_in_the_residuals_the_model_is_dense_to_the_bit() -> None:
    sections = [_section(seed, 0.0) for seed in range(6)]
    model = AttentionModel.fit(sections, epochs=3, settings=SMALL)
    assert model.network is None
    assert "left out" in model.remark
    patches = _section(9, 0.0).patches
    np.testing.assert_array_equal(model.predict(patches), DenseModel.fit(sections).predict(patches))
    few = AttentionModel.fit(sections[:5], epochs=3, settings=SMALL)
    assert "not tried" in few.remark


def test_a_saved_model_predicts_the_same_bits() -> None:
    model, patches, of = _kept(), _section(13).patches, np.arange(11, 50)
    again = AttentionModel.from_state(model.config(), model.state())
    values, depth = model.predict_with_depth(patches, of)
    other, other_depth = again.predict_with_depth(patches, of)
    np.testing.assert_array_equal(values, other)
    assert depth is not None
    assert other_depth is not None
    np.testing.assert_array_equal(depth, other_depth)
    assert again.remark == model.remark


def test_a_network_whose_sizes_are_not_those_of_its_tensors_is_refused() -> None:
    model = _kept()
    wide = {**model.config(), "network": {"width": 4096, "heads": 2, "radii_um": [120.0, 120.0]}}
    state = model.state() | {"network.tokens.weight": np.zeros((4096, DIM), np.float32)}
    with pytest.raises(ModelError, match=r"residual\.weight"):
        AttentionModel.from_state(wide, state)
    odd = {**model.config(), "network": {"width": 16, "heads": 3, "radii_um": [120.0, 120.0]}}
    with pytest.raises(ModelError, match="multiple"):
        AttentionModel.from_state(odd, model.state())


def test_an_interrupted_training_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    sections = [_section(seed) for seed in range(6)]
    whole = AttentionModel.fit(sections, epochs=4, settings=SMALL)

    class InterruptedHereError(Exception):
        pass

    class Failing(Checkpoint):
        def save(self, epochs, network, optimiser, rng):  # type: ignore[no-untyped-def]
            self._cost_s = 0.0  # every epoch is written, however short
            super().save(epochs, network, optimiser, rng)
            if epochs == 2:
                raise InterruptedHereError

    path = tmp_path / "unfinished"
    with pytest.raises(InterruptedHereError):
        AttentionModel.fit(sections, epochs=4, settings=SMALL, checkpoint=Failing(path, "key"))
    assert path.exists()
    again = AttentionModel.fit(sections, epochs=4, settings=SMALL, checkpoint=Checkpoint(path, "key"))
    assert again.facts == whole.facts
    for name, array in whole.state().items():
        np.testing.assert_array_equal(again.state()[name], array)


def test_parts_are_whole_donors_and_disjoint() -> None:
    donors = [f"D{number // 3}" for number in range(24)]
    parts = split_sections(donor_groups(donors), seed=3)
    assert parts is not None
    named = [{donors[i] for i in part} for part in parts]
    assert sorted(i for part in parts for i in part) == list(range(24))
    assert sum(map(len, named)) == 8
    assert [len(part) for part in named] == [3, 1, 3, 1]
    # Without names every section is its own.
    assert len(set(donor_groups(["", "", "A", "A"]).tolist())) == 3
    assert split_sections(np.arange(5), seed=0) is None


def test_dense_is_out_of_fold_by_donor() -> None:
    seen: list[set[int]] = []
    groups = np.array([0, 0, 1, 2, 2, 3])
    sections = [_section(seed) for seed in range(6)]

    def fit_dense(some: NDArray[np.int64]) -> DenseModel:
        seen.append(set(some.tolist()))
        return DenseModel.fit([sections[i] for i in some])

    def hold_out(dense: DenseModel, number: int) -> DensePatches:
        assert not {i for i in seen[-1] if groups[i] == groups[number]}
        section = sections[number]
        patterns = dense.patterns_with_depth(section.patches, np.arange(len(section.patches)))[0]
        return DensePatches.from_spots(patterns, dense.to_genes, section.overlap, section.target)

    found = out_of_fold(groups, fit_dense, hold_out)
    assert len(found) == 6
    assert len(seen) == 4


def test_blocks_hold_each_spot_once_with_all_that_its_prediction_needs() -> None:
    section, network = _section(1), _network()
    source = SectionBlocks([section], network.shape.halo_um, block=(7, 7))
    blocks = list(source.read(range(len(source.n_spots))))
    assert len(blocks) == 9
    assert sorted(i for block in blocks for i in block.spots) == list(range(len(section.target)))
    assert [len(block.spots) for block in blocks] == source.n_spots.tolist()
    everywhere = _added(network, section.patches, np.arange(len(section.patches)), pairs=False)
    whole = section.overlap @ everywhere.detach().numpy()
    for block in blocks:
        np.testing.assert_array_equal(block.target, section.target[block.spots])
        own = _added(network, block.patches, block.under, pairs=False).detach().numpy()
        np.testing.assert_allclose(block.overlap @ own, whole[block.spots], atol=1e-5)


def test_a_section_of_another_level_trains_the_same_network() -> None:
    sections = [_section(seed) for seed in range(6)]
    plain = AttentionModel.fit(sections, epochs=1, settings=SMALL)
    shifted = [replace(s, target=s.target + np.float32(0.1 * (i % 3))) for i, s in enumerate(sections)]
    other = AttentionModel.fit(shifted, epochs=1, settings=SMALL)
    # The level moves `dense` a little, and the network's errors are of what remains within sections.
    np.testing.assert_allclose(other.facts["stopping_error"], plain.facts["stopping_error"], rtol=0.02)
