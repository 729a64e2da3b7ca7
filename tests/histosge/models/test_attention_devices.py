"""`attention` on a GPU: the same values as on a CPU within stated tolerances, and blocks that do not fit its memory.

What needs no GPU is tested without one: how a block is divided, and that its parts add up.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_blocks import SectionBlocks
from histosge.data.spot_overlap import disc_overlap, spots_from_patches
from histosge.errors import ModelError
from histosge.models.block_attention import AttentionModel
from histosge.models.block_example import BY_SPOTS, Example
from histosge.models.block_network import BlockNetwork, NetworkShape
from histosge.models.block_training import AttentionSettings, DensePatches, TrainingData, train_network
from histosge.models.block_training import split_sections as split
from histosge.models.gpu_memory import Division, MemoryLimit
from histosge.models.linear_algebra import Standardiser
from histosge.models.prediction_device import prediction_device
from histosge.models.ranks import Ranks, joined_processes

GENES, DIM, SIDE, STRIDE = 7, 5, 18, 56.0
RADII_UM = (120.0, 170.0)
CPU, GPU = torch.device("cpu"), torch.device("cuda")
PLAIN = AttentionSettings(
    radii_um=RADII_UM,
    width=32,
    heads=4,
    learning_rate=1e-2,
    batch=2,
    epochs=6,
    dropout=0.0,
    feature_dropout=0.0,
)
"""Without dropout, whose draws differ between devices."""


@cache
def _section(seed: int, side: int = SIDE) -> TrainingSection:
    """Genes follow the first number of the embedding in a curve that no line can follow."""
    rng = np.random.default_rng(seed)
    rows, cols = np.nonzero(rng.random((side, side)) > 0.05)
    z = rng.standard_normal((len(rows), DIM)).astype(np.float32)
    first = z[:, :1].astype(float)
    logs = 5 + (0.3 * first + 0.8 * ((np.abs(first) < 0.7) - 0.5)) * np.linspace(0.5, 1.5, GENES)
    patches = Patches(f"S{seed}", rows, cols, z, STRIDE, STRIDE)
    along = np.arange(60, side * STRIDE - 50, 90.0)
    xy = np.stack([axis.ravel() for axis in np.meshgrid(along, along)], axis=1)
    overlap = disc_overlap(xy, 80.0, patches)
    keep = np.asarray(overlap.sum(axis=1)).ravel() > 0
    target = spots_from_patches(overlap[keep], logs)
    target += (0.2 * rng.standard_normal(target.shape)).astype(np.float32)
    return TrainingSection(patches, overlap[keep], xy[keep], target)


def _network(seed: int = 0, width: int = 32) -> BlockNetwork:
    """A network that is not at its start: it adds something."""
    torch.manual_seed(seed)
    shape = NetworkShape(DIM, GENES, 3, width, 4, RADII_UM, dropout=0.0, feature_dropout=0.0)
    axes = np.random.default_rng(seed).standard_normal((GENES, 3))
    network = BlockNetwork(shape, axes, np.ones(GENES)).eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network


def _data(sections: list[TrainingSection]) -> TrainingData:
    """Blocks whose linear model is a constant."""

    def to_genes(patterns: NDArray[np.float64]) -> NDArray[np.float32]:
        return np.full((len(patterns), GENES), 4.9, np.float32)

    def constant(section: TrainingSection) -> DensePatches:
        under = np.unique(section.overlap.indices)
        patterns = np.zeros((len(under), 1), np.float32)
        return DensePatches.from_spots(patterns, to_genes, section.overlap[:, under], section.target)

    return TrainingData(
        SectionBlocks(sections, sum(RADII_UM)),
        [constant(section) for section in sections],
        Standardiser(np.zeros(DIM), np.ones(DIM)),
        np.ones(GENES),
        RADII_UM,
    )


def _example(side: int = SIDE) -> tuple[TrainingData, Example]:
    data = _data([_section(1, side)])
    return data, next(iter(data.examples([0])))


def _gradients(network: BlockNetwork, data: TrainingData, parts: list[Example]) -> list[torch.Tensor]:
    network.zero_grad()
    for part in parts:
        torch.autograd.backward(data.spot_errors(network, part).sum())
    return [p.grad.cpu() for p in network.parameters() if p.grad is not None]


# ---------------------------------------------------------------- blocks that are divided


def test_the_parts_of_a_block_have_its_spots_and_add_up_to_its_gradient() -> None:
    data, whole = _example()
    network = _network()
    parts = [quarter for half in whole.halves() for quarter in half.halves()]
    assert sorted(len(part.target) for part in parts) == sorted(
        [len(whole.target) // 4 + (i < len(whole.target) % 4) for i in range(4)]
    )
    # Each has what its spots need and no more: a strip across the block, not all of it.
    assert max(len(part.embedding) for part in parts) < 0.8 * len(whole.embedding)
    errors = [data.spot_errors(network, part) for part in [whole, *parts]]
    torch.testing.assert_close(
        torch.cat(errors[1:]).sort().values, errors[0].sort().values, rtol=1e-5, atol=1e-6
    )
    found, expected = _gradients(network, data, parts), _gradients(network, data, [whole])
    assert len(expected) == len(list(network.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * float(theirs.abs().max()))


def test_work_that_does_not_fit_is_halved_until_it_does_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    limit, tried = MemoryLimit("--device cpu"), list[int]()
    division = Division[range](len, lambda some: (some[: len(some) // 2], some[len(some) // 2 :]), "numbers")

    def work(some: range) -> list[int]:
        tried.append(len(some))
        if len(some) > 6:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return list(some)

    with pytest.warns(UserWarning, match="going on with at most 11 numbers at once") as said:
        first = limit.run(work, range(23), division)
    assert [number for part in first for number in part] == list(range(23))
    # What was learned holds for later work as well.
    tried.clear()
    assert [len(part) for part in limit.run(work, range(13), division)] == [3, 3, 3, 4]
    assert tried == [3, 3, 3, 4]
    assert len(said) == 1

    def never(some: range) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ModelError, match="too little free memory for one of the numbers; use --device cpu"):
        limit.run(never, range(1), division)


def test_a_training_that_runs_out_of_memory_goes_on_to_the_same_losses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data, parts = _data([_section(seed) for seed in range(8)]), split(np.arange(8), 0)
    assert parts is not None
    settings = replace(PLAIN, device="cpu", epochs=2, batch=1)

    def losses() -> list[float]:
        return train_network(_network(3), data, parts, settings, seed=0).loss

    plain, predict, most = losses(), Example.predict, len(_section(1).target) // 3

    def fits(self: Example, network: BlockNetwork) -> torch.Tensor:
        found = predict(self, network)
        if len(self.target) > most:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return found

    monkeypatch.setattr(Example, "predict", fits)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    with pytest.warns(UserWarning, match="out of memory") as said:
        divided = losses()
    np.testing.assert_allclose(divided, plain, rtol=1e-4)
    assert len(said) == 1


# ---------------------------------------------------------------- on a GPU


@pytest.mark.gpu
def test_windows_and_pairs_on_a_gpu_give_what_windows_give_on_the_cpu() -> None:
    """In single precision: 1e-4 of the largest value."""
    _, example = _example()
    network = _network(width=64)
    with torch.inference_mode():
        expected = network(example.embedding, example.plan, pairs=False)
        moved, there = example.to(GPU), network.to(GPU)
        for pairs in (False, True):
            found = there(moved.embedding, moved.plan, pairs=pairs).cpu()
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.gpu
def test_gradients_of_windows_and_pairs_agree_on_a_gpu() -> None:
    """In single precision: 1e-3 of each tensor's largest value."""
    _, example = _example()
    found = []
    for device, pairs in ((CPU, False), (GPU, False), (GPU, True)):
        network, moved = _network(width=64).to(device), example.to(device)
        (network(moved.embedding, moved.plan, pairs=pairs) ** 2).mean().backward()
        found.append([p.grad.cpu() for p in network.parameters() if p.grad is not None])
    for others in found[1:]:
        for expected, other in zip(found[0], others, strict=True):
            torch.testing.assert_close(other, expected, rtol=0, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.gpu
def test_bf16_on_a_gpu_is_off_by_less_than_the_residual_it_learns() -> None:
    """Training computes the network in bf16, of 8 bits: 3 % of the values' standard deviation, on average."""
    _, example = _example()
    network = _network(width=64)
    with torch.inference_mode():
        expected = example.predict(network) - example.dense_spot
        moved = example.to(GPU)
        found = (moved.predict(network.to(GPU)) - moved.dense_spot).cpu()
    assert found.dtype == torch.float32
    assert float((found - expected).square().mean().sqrt()) < 0.03 * float(expected.std())
    # And it is bf16 that was used: single precision would be nearer.
    assert float((found - expected).abs().max()) > 1e-5 * float(expected.std())


@cache
def _sections() -> tuple[TrainingSection, ...]:
    return tuple(_section(seed) for seed in range(9))


@cache
def _trained(device: str, epochs: int = 6) -> AttentionModel:
    settings = replace(PLAIN, device=device, epochs=epochs)
    return AttentionModel.fit(_sections(), seed=2, settings=settings)


@pytest.mark.gpu
def test_training_on_a_gpu_follows_training_on_the_cpu() -> None:
    """Losses within 1 %, predictions of unseen tissue correlated above 0.99: the rounding of bf16 over some steps."""
    ours, theirs = _trained("cuda"), _trained("cpu")
    loss = ours.facts["loss"]
    assert np.isfinite(loss).all()
    assert loss[-1] < 0.95 * loss[0]
    np.testing.assert_allclose(loss, theirs.facts["loss"], rtol=0.01)
    np.testing.assert_allclose(ours.facts["stopping_error"], theirs.facts["stopping_error"], rtol=0.01)
    assert ours.network is not None
    assert theirs.network is not None
    assert {p.device.type for p in ours.network.parameters()} == {"cpu"}
    patches = _section(11).patches
    a, b = (model.predict(patches) - model.dense.predict(patches) for model in (ours, theirs))
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > 0.99


@pytest.mark.gpu
def test_the_same_seed_draws_the_same_dropout_on_a_gpu_and_leaves_its_generator_as_it_was() -> None:
    settings = replace(PLAIN, device="cuda", epochs=2, dropout=0.4, feature_dropout=0.4)
    losses = []
    for other in (3, 5):
        torch.cuda.manual_seed(other)
        before = torch.cuda.get_rng_state()
        losses.append(AttentionModel.fit(_sections(), seed=2, settings=settings).facts["loss"])
        assert torch.equal(torch.cuda.get_rng_state(), before)
    # Sums of a GPU come in any order, so not the same bits; other draws would change the losses by per cent.
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.gpu
def test_maps_of_a_gpu_are_those_of_the_cpu() -> None:
    """Within 1e-4 in log1p(CP10k), whole and block by block from tokens, also in the threads of a prediction."""
    model, patches = _trained("cpu"), _section(12).patches
    assert model.network is not None
    of = np.arange(len(patches))
    expected = model.predict(patches)
    assert np.abs(expected - model.dense.predict(patches)).max() > 0.05
    with prediction_device("cuda"):
        np.testing.assert_allclose(model.predict_some(patches, of), expected, rtol=0, atol=1e-4)
        reduce, reduced = model.split()
        assert reduce is not None
        tokens = patches.with_embedding(reduce(patches.embedding))
        np.testing.assert_allclose(reduced.predict_some(tokens, of), expected, rtol=0, atol=1e-4)
    assert {p.device.type for p in model.network.parameters()} == {"cpu"}
    np.testing.assert_array_equal(model.predict(patches), expected)


@contextmanager
def _gpu_memory(n_bytes: int) -> Iterator[None]:
    """Let torch take so much more of the GPU than it holds now."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + n_bytes) / total)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


@pytest.mark.gpu
def test_a_block_that_does_not_fit_the_gpu_is_trained_on_in_parts() -> None:
    # 32 x 32 patches: all pairs of them take some hundred MB.
    data, example = _example(32)
    network = _network(width=64).to(GPU).train()
    parameters = list(network.parameters())

    def gradient(part: Example) -> torch.Tensor:
        loss = data.spot_errors(network, part.to(GPU)).sum()
        return torch.cat([one.flatten() for one in torch.autograd.grad(loss, parameters)]).cpu()

    gradient(example)  # what the libraries keep for themselves is there afterwards
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    whole = gradient(example)
    needed = torch.cuda.max_memory_allocated() - before
    assert needed > 50 << 20  # what the limit leaves is then more than a segment of the allocator, 20 MB
    with _gpu_memory(round(0.6 * needed)), pytest.warns(UserWarning, match="out of memory") as said:
        parts = MemoryLimit("--device cpu").run(gradient, example, BY_SPOTS)
    assert len(parts) >= 2
    assert len(said) == 1
    # bf16 rounds each part for itself.
    assert float((torch.stack(parts).sum(dim=0) - whole).norm()) < 0.05 * float(whole.norm())


@pytest.mark.gpu
def test_a_training_on_a_gpu_with_little_memory_ends_as_one_with_much() -> None:
    data, parts = _data([_section(seed, 32) for seed in range(8)]), split(np.arange(8), 0)
    assert parts is not None
    settings = replace(PLAIN, device="cuda", epochs=2, batch=1)

    def losses() -> list[float]:
        return train_network(_network(3, width=64), data, parts, settings, seed=0).loss

    losses()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    plain = losses()
    needed = torch.cuda.max_memory_allocated() - before
    with _gpu_memory(round(0.6 * needed)), pytest.warns(UserWarning, match="out of memory"):
        np.testing.assert_allclose(losses(), plain, rtol=0.03)


@pytest.mark.gpu
def test_processes_on_gpus_sum_tensors_of_the_gpu_and_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process of nccl: the group that `torchrun` makes, whose sum is what it was."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}
    for name, value in about.items():
        monkeypatch.setenv(name, str(value))
    with joined_processes() as ranks:
        assert torch.distributed.get_backend() == "nccl"
        assert ranks == Ranks(0, 1)
        for device in (CPU, GPU):
            tensors = [torch.arange(6.0, device=device).reshape(2, 3), torch.tensor([7.0], device=device)]
            Ranks(0, 2).sum(tensors)  # which a group of one would leave out
            assert [tensor.device.type for tensor in tensors] == [device.type] * 2
            assert tensors[0].flatten().tolist() == [0, 1, 2, 3, 4, 5]
        torch.distributed.barrier()
    assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(ModelError, match="--nproc-per-node 1"), joined_processes():
        pass
