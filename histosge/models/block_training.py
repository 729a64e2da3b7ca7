"""Train the network of `attention` on blocks: the loop over epochs, early stopping, and errors per section.

The network learns what a linear model's prediction lacks at spots of sections that the linear model was fitted without
(out-of-fold): residuals at a model's own training spots are smaller than on new tissue, and of another shape.

Terms
    parts   sections that a gradient sees (training), that choose the epoch (stopping), that decide whether the network
            is used (judging), and that decide nothing (reported); no section is in two of them
    error   squared error at spots, each gene in units of its standard deviation within sections
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from histosge.data.sections import Patches
from histosge.data.spot_blocks import SpotBlock, SpotBlocks
from histosge.models.block_example import BY_SPOTS, Example
from histosge.models.block_network import BlockNetwork, BlockPlan, NetworkShape, plan_layers, single
from histosge.models.checkpoint import Checkpoint
from histosge.models.gpu_memory import MemoryLimit
from histosge.models.linear_algebra import Floats, Indices, Standardiser
from histosge.models.ranks import Ranks, current_ranks
from histosge.models.training_device import chosen_device
from histosge.threads import prefetch

WIDTH_CPU, WIDTH_GPU = 64, 256
"""Numbers of a token. On two cores a step of 4 blocks at 64 takes under a second; a GPU has room for more."""


@dataclass(frozen=True)
class AttentionSettings:
    """How the network is made and trained.

    Parameters
    ----------
    radii_um
        Of each layer's neighbourhood; as many layers. Their sum is the halo.
    width, heads
        Of each layer. None means `WIDTH_CPU`, on a GPU `WIDTH_GPU`.
    dropout, feature_dropout
        See `histosge.models.block_network.NetworkShape`.
    epochs, patience
        Passes over the blocks at most, and passes without a lower error on the stopping part before training ends.
    batch
        Blocks in one step, over all processes.
    learning_rate, weight_decay, warm_up
        Of AdamW; the rate rises over the share `warm_up` of all steps and falls as a cosine.
    average
        Decay of the exponential moving average of the weights per step; the average is what predicts.
    device
        ``auto`` means as `histosge.models.training_device` chose: a GPU where there is one. Or a name that torch knows.
    """

    radii_um: tuple[float, ...] = (256.0, 256.0)
    width: int | None = None
    heads: int = 4
    dropout: float = 0.1
    feature_dropout: float = 0.1
    epochs: int = 60
    patience: int = 12
    batch: int = 4
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warm_up: float = 0.05
    average: float = 0.98
    device: str = "auto"

    def torch_device(self) -> torch.device:
        """Return where the network is trained."""
        if self.device != "auto":
            return torch.device(self.device)
        return chosen_device()

    def shape(self, dim: int, n_genes: int, n_patterns: int) -> NetworkShape:
        """Return the sizes of the network for some data."""
        on_gpu = self.torch_device().type != "cpu"
        return NetworkShape(
            dim,
            n_genes,
            n_patterns,
            self.width or (WIDTH_GPU if on_gpu else WIDTH_CPU),
            self.heads,
            self.radii_um,
            self.dropout,
            self.feature_dropout,
        )


class Parts(NamedTuple):
    """Sections by what they are for: indices, see the module's terms."""

    training: Indices
    stopping: Indices
    judging: Indices
    reported: Indices


MIN_GROUPS = 6
"""Sections, or donors, that a training needs: one to stop on, three to judge by, two to learn from. By two nothing can be
judged: the interval of a mean of two values is six times their standard error."""
MAX_HELD_OUT = 12
"""Groups in a held-out part, at most: an interval over more is hardly narrower, and each costs a training section."""


def split_sections(groups: Indices, seed: int) -> Parts | None:
    """Divide sections into parts, whole groups (donors) at a time; None where there are too few groups.

    Parameters
    ----------
    groups
        Of each section, ``(n_sections,)``.
    """
    labels = np.random.default_rng([seed, 1]).permutation(np.unique(groups))
    n = len(labels)
    if n < MIN_GROUPS:
        return None
    # The part that is only reported comes last, where there are sections enough.
    sizes = (max(1, n // 8), max(3, n // 6), n // 8)
    ends = np.cumsum([min(size, MAX_HELD_OUT) for size in sizes])
    stopping, judging, reported, training = (
        np.flatnonzero(np.isin(groups, some)) for some in np.split(labels, ends)
    )
    return Parts(training, stopping, judging, reported)


class PatchPredictions(Protocol):
    """What a linear model predicts of the patches under one section's spots."""

    def genes(self, at: Indices) -> NDArray[np.float32]:
        """Return log1p(CP10k) of some of the patches, ``(len(at), n_genes)``."""
        ...

    def offset(self) -> NDArray[np.float32]:
        """Return how far the section's spots lie above their predictions on average, ``(n_genes,)``."""
        ...


class DensePatches(NamedTuple):
    """Predictions that are kept as patterns.

    Parameters
    ----------
    patterns
        ``(n_under, n_patterns)``: a hundred times smaller than genes.
    to_genes
        From patterns to log1p(CP10k).
    above
        See `PatchPredictions.offset`.
    """

    patterns: NDArray[np.floating]
    to_genes: Callable[[Floats], NDArray[np.float32]]
    above: NDArray[np.float32]

    @classmethod
    def from_spots(
        cls,
        patterns: NDArray[np.floating],
        to_genes: Callable[[Floats], NDArray[np.float32]],
        overlap: sparse.csr_matrix,
        target: NDArray[np.float32],
    ) -> "DensePatches":
        """Compare the predictions with the section's spots.

        Parameters
        ----------
        overlap
            Of the spots with the patches, ``(n_spots, n_under)``.
        target
            log1p(CP10k), ``(n_spots, n_genes)``.
        """
        rates = overlap @ np.expm1(to_genes(np.asarray(patterns, np.float64)))
        return cls(patterns, to_genes, (target - np.log1p(rates)).mean(axis=0).astype(np.float32))

    def offset(self) -> NDArray[np.float32]:
        """Return `above`."""
        return self.above

    def genes(self, at: Indices) -> NDArray[np.float32]:
        """Return log1p(CP10k) of some of the patches, ``(len(at), n_genes)``."""
        return self.to_genes(np.asarray(self.patterns[at], np.float64))


@dataclass(frozen=True)
class TrainingData:
    """Blocks, and what the linear model predicts of them.

    Parameters
    ----------
    blocks
        Where blocks come from.
    dense
        Out-of-fold, per section.
    standardiser
        Of the embeddings.
    sd
        Of each gene, ``(n_genes,)``, the unit of errors; a gene of 0 does not count.
    radii_um
        Of the network.
    threads
        That read and prepare blocks ahead.
    """

    blocks: SpotBlocks
    dense: Sequence[PatchPredictions]
    standardiser: Standardiser
    sd: Floats
    radii_um: tuple[float, ...]
    threads: int = 1

    def spot_errors(self, network: BlockNetwork | None, example: Example) -> Tensor:
        """Return the error of each spot, the mean over genes, ``(n_spots,)``; of the linear model for no network."""
        predicted = example.dense_spot if network is None else example.predict(network)
        varies = self.sd > 0
        weight = np.where(varies, 1 / np.where(varies, self.sd, 1), 0) / np.sqrt(max(1, varies.sum()))
        difference = (predicted - example.target) * single(weight).to(predicted.device)
        return difference.square().sum(dim=1)

    def of_sections(self, sections: Indices) -> Indices:
        """Return the blocks of some sections."""
        return np.flatnonzero(np.isin(self.blocks.section_of, sections))

    def examples(self, numbers: Iterable[int]) -> Iterator[Example]:
        """Read blocks in the given order; the next ones are prepared while the caller computes."""
        return prefetch(self._prepare, self.blocks.read(numbers), self.threads)

    def _prepare(self, block: SpotBlock) -> Example:
        plan = plan_patches(block.patches, self.radii_um, block.under)
        dense = single(self.dense[block.section].genes(block.under_in_section))
        pairs = block.overlap.tocoo()
        overlap = (
            torch.from_numpy(pairs.row.astype(np.int64)),
            torch.from_numpy(pairs.col.astype(np.int64)),
            single(pairs.data),
        )
        rates = torch.expm1(dense)[overlap[1]] * overlap[2][:, None]
        dense_spot = torch.log1p(rates.new_zeros(block.target.shape).index_add(0, overlap[0], rates))
        # A section's own level is taken out, as `dense` does: how it was stained and sequenced is no tissue's pattern.
        target = single(block.target - self.dense[block.section].offset())
        embedding = single(self.standardiser.apply(block.patches.embedding[plan.needed]))
        return Example(block.section, embedding, plan, dense, dense_spot, overlap, target)


def plan_patches(patches: Patches, radii_um: Sequence[float], of: Indices) -> BlockPlan:
    """Find the neighbours of some patches, see `plan_layers`."""
    return plan_layers(patches.rows, patches.cols, patches.stride_um, radii_um, of)


class _Progress(nn.Module):
    """All that a checkpoint holds beside the optimiser: one module, so that one file has it."""

    best_error: Tensor
    best_epoch: Tensor
    history: Tensor

    def __init__(self, network: BlockNetwork, epochs: int) -> None:
        super().__init__()
        self.network = network
        self.average, self.best = deepcopy(network), deepcopy(network)
        for copied in (self.average, self.best):
            copied.requires_grad_(requires_grad=False)
        # The untrained network is the linear model: what never improves on it stays that.
        self.register_buffer("best_error", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("best_epoch", torch.tensor(0))
        self.register_buffer("history", torch.full((epochs + 1, 2), torch.nan, dtype=torch.float64))


@dataclass(frozen=True)
class TrainedNetwork:
    """A network in evaluation mode on the CPU, and how it came about.

    Parameters
    ----------
    network
        The average of the weights after the best epoch.
    epochs
        That one; 0 if no epoch improved on the linear model.
    loss, stopping_error
        After each epoch: the mean loss of its steps, and the error on the stopping part, where the linear model alone
        has ``stopping_error[0]``.
    """

    network: BlockNetwork
    epochs: int
    loss: list[float]
    stopping_error: list[float]


def train_network(
    network: BlockNetwork,
    data: TrainingData,
    parts: Parts,
    settings: AttentionSettings,
    *,
    seed: int,
    checkpoint: Checkpoint | None = None,
    on_epoch: Callable[[int, float], None] = lambda epoch, error: None,
) -> TrainedNetwork:
    """Train until the stopping part no longer gains; in several processes where `torchrun` started them.

    Parameters
    ----------
    seed
        Same seed, same machine, one process: the same bits, also where a checkpoint is gone on from.
    on_epoch
        Called with the number of complete epochs and the error on the stopping part.
    """
    device, ranks, limit = settings.torch_device(), current_ranks(), MemoryLimit("--device cpu")
    state = _Progress(network, settings.epochs).to(device)
    optimiser = torch.optim.AdamW(
        state.network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    training, stopping = data.of_sections(parts.training), data.of_sections(parts.stopping)
    # Batches of nearly equal size: a last one of a single block would step as far as a whole one.
    n_batches = max(1, round(len(training) / settings.batch))
    rng = np.random.default_rng(seed)
    # All processes read the same file, or start alike: they must not disagree on the epoch.
    begin = 0 if checkpoint is None else checkpoint.restore(state, optimiser, rng)
    if begin == 0:
        error = mean_error(state.average, data, stopping, device, ranks, limit)
        state.best_error.fill_(error)
        state.history[0, 1] = error
    for epoch in range(begin, settings.epochs):
        if epoch - int(state.best_epoch) >= settings.patience:
            break
        order = np.random.default_rng([seed, epoch]).permutation(training)
        batches = [batch.tolist() for batch in np.array_split(order, n_batches)]
        loss = _run_epoch(state, optimiser, data, batches, settings, (seed, epoch), ranks, limit)
        error = mean_error(state.average, data, stopping, device, ranks, limit)
        state.history[epoch + 1] = torch.tensor([loss, error], dtype=torch.float64)
        if error < float(state.best_error):
            state.best.load_state_dict(state.average.state_dict())
            state.best_error.fill_(error)
            state.best_epoch.fill_(epoch + 1)
        if checkpoint is not None and ranks.is_first:
            checkpoint.save(epoch + 1, state, optimiser, rng)
        on_epoch(epoch + 1, error)
    history = state.history.cpu().numpy()
    done = int(np.isfinite(history[:, 1]).sum())
    return TrainedNetwork(
        state.best.to("cpu").eval(),
        int(state.best_epoch),
        history[1:done, 0].tolist(),
        history[:done, 1].tolist(),
    )


def _run_epoch(
    state: _Progress,
    optimiser: torch.optim.Optimizer,
    data: TrainingData,
    batches: Sequence[Sequence[int]],
    settings: AttentionSettings,
    seed: tuple[int, int],
    ranks: Ranks,
    limit: MemoryLimit,
) -> float:
    """Take a step on each batch, and return the mean loss over the steps."""
    network, device = state.network.train(), next(state.network.parameters()).device
    parameters = [p for p in network.parameters() if p.requires_grad]
    examples = data.examples(number for batch in batches for number in ranks.share(batch))
    n_spots, total = data.blocks.n_spots, 0.0
    for at, batch in enumerate(batches):
        step = seed[1] * len(batches) + at
        rate = _learning_rate(step / (settings.epochs * len(batches)), settings)
        for group in optimiser.param_groups:
            group["lr"] = rate
        # Of all processes: each one's sum over its spots is divided by the batch's number, so that sums of gradients
        # are the gradient of the batch.
        size = int(n_spots[list(batch)].sum())
        optimiser.zero_grad()
        loss = torch.zeros(1, device=device)
        # Seeded by the step: a training that goes on from a checkpoint drops the same numbers.
        _seed_dropout(hash_seed(*seed, at, ranks.rank), device)

        def add_gradient(part: Example, size: int = size) -> Tensor:
            error = data.spot_errors(network, part.to(device)).sum() / size
            # Not `backward`, which adds to the parameters while it runs: where memory runs out on the way, a part of
            # the gradient would be there already, and be added again.
            for parameter, gradient in zip(parameters, torch.autograd.grad(error, parameters), strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
            return error.detach()

        for _ in ranks.share(batch):
            for part in limit.run(add_gradient, next(examples), BY_SPOTS):
                loss += part
        for parameter in parameters:
            if parameter.grad is None:  # this process had no block in the batch
                parameter.grad = torch.zeros_like(parameter)
        ranks.sum([loss, *(p.grad for p in parameters if p.grad is not None)])
        # A block with an outlier must not undo an epoch; 1 is the usual bound.
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        _update_average(state, settings.average, step)
        total += float(loss)
    return total / len(batches)


def _seed_dropout(seed: int, device: torch.device) -> None:
    """Seed the generator that dropout draws from, which each device has for itself."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def hash_seed(*numbers: int) -> int:
    """Return a seed for torch from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def _learning_rate(done: float, settings: AttentionSettings) -> float:
    """Return the rate after a share of all steps: a linear rise, then half a cosine."""
    if done < settings.warm_up:
        # The first step is not wasted at a rate of 0.
        return settings.learning_rate * (done / settings.warm_up * 0.9 + 0.1)
    after = (done - settings.warm_up) / (1 - settings.warm_up)
    return settings.learning_rate * (1 + math.cos(math.pi * after)) / 2


def _update_average(state: _Progress, decay: float, step: int) -> None:
    # Early on a shorter memory: the average would otherwise consist of the untrained weights.
    decay = min(decay, (1 + step) / (10 + step))
    with torch.no_grad():
        for mean, value in zip(state.average.parameters(), state.network.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


def section_errors(
    network: BlockNetwork | None,
    data: TrainingData,
    numbers: Indices,
    device: torch.device,
    ranks: Ranks,
    limit: MemoryLimit | None = None,
) -> Floats:
    """Return sums of errors and numbers of spots of each section, ``(2, n_sections)``."""
    sums = torch.zeros(2, len(data.dense), dtype=torch.float64)
    limit = limit or MemoryLimit("--device cpu")
    if network is not None:
        network.eval()
    with torch.inference_mode():
        for example in data.examples(ranks.share(numbers.tolist())):
            errors = limit.run(
                lambda part: data.spot_errors(network, part.to(device)).sum(), example, BY_SPOTS
            )
            sums[0, example.section] += float(sum(errors))
            sums[1, example.section] += len(example.target)
    ranks.sum([sums])
    return np.asarray(sums.numpy())


def mean_error(
    network: BlockNetwork | None,
    data: TrainingData,
    numbers: Indices,
    device: torch.device,
    ranks: Ranks,
    limit: MemoryLimit,
) -> float:
    """Return the mean error over the spots of some blocks."""
    error, count = section_errors(network, data, numbers, device, ranks, limit)
    return float(error.sum() / max(1.0, count.sum()))
