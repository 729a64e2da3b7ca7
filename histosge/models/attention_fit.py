"""Trains the attention of `dense`, and asks unseen tissue whether it helps.

Loss: squared error of log1p(mean rate under a spot's disc), each gene in units of its spread, against the
section's own standardised targets.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from histosge.models.attention import Correction, Tokeniser, WindowAttention
from histosge.models.linear import Floats, Indices
from histosge.models.low_rank import FLOOR, LowRankTargets, standardise
from histosge.sections import TrainingSection

EPOCHS = 20
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
BATCH = 32
SPOTS_PER_EPOCH = 1024
PATCHES_PER_SPOT = 16


@dataclass(frozen=True)
class Linear:
    """The solution that attention corrects.

    Parameters
    ----------
    patterns
        Of every patch of each section, ``(n_patches, n_patterns)`` each.
    targets
        Patterns -> genes.
    """

    patterns: Sequence[Floats]
    targets: LowRankTargets


@dataclass(frozen=True)
class _Disc:
    """One spot: the patches under it, their weights and what was measured, standardised."""

    section: int
    patches: Indices
    weights: NDArray[np.float32]
    target: NDArray[np.float32]


def fit_attention(
    sections: Sequence[TrainingSection], linear: Linear, *, seed: int, epochs: int
) -> Correction:
    """Train a correction on top of a linear solution.

    Parameters
    ----------
    sections
        With the spots to learn from.
    linear
        Fitted on the same spots.
    """
    tokeniser = Tokeniser.of(list(sections))
    # Layers draw their first weights from torch's global generator: borrow it, and give it back.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        network = WindowAttention(linear.targets.axes.shape[1])
    correction = Correction(tokeniser, network)
    tokens = [tokeniser(section.patches) for section in sections]
    discs = [disc for i, section in enumerate(sections) for disc in _discs(i, section)]
    head = _GeneHead.of(linear.targets)
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(discs))[:SPOTS_PER_EPOCH]
        for start in range(0, len(order), BATCH):
            loss = torch.zeros(())
            for i, section in enumerate(sections):
                chosen = [discs[j] for j in order[start : start + BATCH] if discs[j].section == i]
                if chosen:
                    loss = loss + _loss(chosen, correction, section, tokens[i], linear.patterns[i], head)
            optimiser.zero_grad()
            (loss / len(order[start : start + BATCH])).backward()
            optimiser.step()
    network.eval()
    return correction


def _discs(number: int, section: TrainingSection) -> list[_Disc]:
    target, overlap, discs = standardise(section.target), section.overlap, []
    for spot in range(overlap.shape[0]):
        inside = slice(overlap.indptr[spot], overlap.indptr[spot + 1])
        patches, weights = overlap.indices[inside], overlap.data[inside]
        # On a fine grid a disc holds hundreds of patches: some of them tell as much.
        every = -(-len(patches) // PATCHES_PER_SPOT)
        patches, weights = patches[::every].astype(np.int64), weights[::every]
        weights = (weights / weights.sum()).astype(np.float32)
        discs.append(_Disc(number, patches, weights, target[spot].astype(np.float32)))
    return discs


@dataclass(frozen=True)
class _GeneHead:
    """`LowRankTargets.genes` in torch, and back to units of spread."""

    weight: Tensor
    mean: Tensor
    floor: Tensor
    sd: Tensor

    @classmethod
    def of(cls, targets: LowRankTargets) -> "_GeneHead":
        mean, sd = (torch.from_numpy(a.astype(np.float32)) for a in (targets.mean, targets.sd))
        weight = torch.from_numpy((targets.axes * targets.sd[:, None]).T.astype(np.float32))
        return cls(weight, mean, torch.clamp(FLOOR * mean, min=1e-6), torch.clamp(sd, min=1e-6))

    def rates(self, patterns: Tensor) -> Tensor:
        values = patterns @ self.weight + self.mean
        bent = self.floor * torch.exp(torch.clamp(values / self.floor - 1, -80, 0))
        return torch.expm1(torch.where(values < self.floor, bent, values))

    def standardised(self, rates: Tensor) -> Tensor:
        return (torch.log1p(rates) - self.mean) / self.sd


def _loss(
    discs: list[_Disc],
    correction: Correction,
    section: TrainingSection,
    tokens: Tensor,
    patterns: Floats,
    head: _GeneHead,
) -> Tensor:
    """Return the squared error summed over spots, mean over genes."""
    of = np.concatenate([disc.patches for disc in discs])
    base = torch.from_numpy(patterns[of].astype(np.float32))
    rates = head.rates(base + correction.correct(section.patches, tokens, of))
    weighted = rates * torch.from_numpy(np.concatenate([disc.weights for disc in discs]))[:, None]
    sums = torch.stack([part.sum(dim=0) for part in weighted.split([len(d.patches) for d in discs])])
    target = torch.from_numpy(np.stack([disc.target for disc in discs]))
    return ((head.standardised(sums) - target) ** 2).mean(dim=1).sum()
