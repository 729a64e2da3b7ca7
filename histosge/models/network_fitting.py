"""Train a small network on spots, for as many epochs as held-out parts of the training data say.

What the presets `mlp`, `bleep` and `triplex` share. The number of epochs is chosen by cross-validation over training
sections (stripes of a lone section); then one network is trained on all spots for that many. A fixed number would
overfit on one section what it underfits on a hundred.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.linear_algebra import Floats, Indices, Standardiser, spatial_groups
from histosge.models.low_rank_targets import MAX_LOG
from histosge.models.nested_state import read_config, take
from histosge.models.protocol import State

Network = TypeVar("Network", bound=nn.Module)
MAX_FOLDS = 3
"""Networks trained to choose the number of epochs, at most: more sections are left out several at a time."""


PATCHES_AT_ONCE = 8192
"""Patches that are predicted together: 100 MB of an embedding of 1,536 numbers, in double precision."""


@dataclass(frozen=True)
class FitSettings:
    """How a network is trained: AdamW, batches of spots in random order, a constant learning rate.

    Parameters
    ----------
    max_epochs
        Of which the best number is chosen.
    batch
        Spots.
    learning_rate, weight_decay
        Of AdamW.
    """

    max_epochs: int
    batch: int
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2


class Objective(Protocol[Network]):
    """What is minimised: the data of all spots, and the network's loss on some of them."""

    def __len__(self) -> int:
        """Return the number of spots."""
        ...

    def make(self) -> Network:
        """Return a new network, its weights drawn from torch's global generator."""
        ...

    def loss(self, network: Network, spots: Indices, rng: np.random.Generator) -> Tensor:
        """Return the mean loss of some spots, differentiable."""
        ...

    def error(self, network: Network, spots: Indices) -> float:
        """Return the summed error of held-out spots."""
        ...


@dataclass(frozen=True)
class Fitted(Generic[Network]):
    """A trained network in evaluation mode, and the epochs that it was trained for."""

    network: Network
    epochs: int


def fit_network(
    objective: Objective[Network],
    sections: Sequence[TrainingSection],
    settings: FitSettings,
    *,
    seed: int,
    epochs: int | None = None,
) -> Fitted[Network]:
    """Train a network on all spots of some sections.

    Parameters
    ----------
    sections
        Whose spots the objective has, one section after another.
    seed
        Same seed, same machine: the same network, bit for bit.
    epochs
        None: chosen on training sections that are left out in turn.
    """
    # Weights and dropout draw from torch's global generator: it is seeded here, and given back as it was.
    with torch.random.fork_rng(devices=[]):
        if epochs is None:
            epochs = _choose_epochs(objective, spatial_groups(sections) % MAX_FOLDS, settings, seed)
        *_, network = _epochs(objective, np.arange(len(objective)), settings, seed, epochs)
    return Fitted(network, epochs)


def _choose_epochs(objective: Objective[Network], folds: Indices, settings: FitSettings, seed: int) -> int:
    """Return the number of epochs with the least error on folds left out in turn."""
    labels, errors = np.unique(folds), np.zeros(settings.max_epochs)
    # A single spot leaves nothing to choose on.
    if len(labels) < 2:
        return settings.max_epochs
    for label in labels:
        training, held_out = np.flatnonzero(folds != label), np.flatnonzero(folds == label)
        networks = _epochs(objective, training, settings, seed, settings.max_epochs)
        errors += [objective.error(network, held_out) for network in networks]
    return int(errors.argmin()) + 1


def _epochs(
    objective: Objective[Network], spots: Indices, settings: FitSettings, seed: int, epochs: int
) -> Iterator[Network]:
    """Train on some spots, and yield the network in evaluation mode after each epoch."""
    rng = np.random.default_rng(seed)
    torch.default_generator.manual_seed(int(rng.integers(2**31)))
    network = objective.make()
    optimiser = torch.optim.AdamW(
        network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    for _ in range(epochs):
        network.train()
        order = rng.permutation(spots)
        # Parts of nearly equal size: a last batch of one spot would move the weights as far as a whole one.
        for part in np.array_split(order, max(1, round(len(order) / settings.batch))):
            optimiser.zero_grad()
            torch.autograd.backward(objective.loss(network, part, rng))
            optimiser.step()
        yield network.eval()


def network_state(network: nn.Module) -> State:
    """Return a network's weights as arrays."""
    return {name: value.numpy() for name, value in network.state_dict().items()}


def load_network(make: Callable[[], Network], state: State) -> Network:
    """Return a network in evaluation mode with the weights of a saved state.

    Raises
    ------
    ModelError
        If a tensor is missing or has another shape than the network's.
    """
    # Making a network draws weights, although they are replaced: the global generator is given back as it was.
    with torch.random.fork_rng(devices=[]):
        network = make()
    own = network.state_dict()
    if set(own) != set(state):
        raise ModelError(
            f"the network's tensors are not those of this preset: {sorted(set(own) ^ set(state))[:3]}"
        )
    for name, value in own.items():
        if tuple(value.shape) != state[name].shape:
            raise ModelError(
                f"tensor {name!r} has shape {state[name].shape}, and should have {tuple(value.shape)}"
            )
    network.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in state.items()})
    return network.eval()


def read_epochs(config: dict[str, Any]) -> int:
    """Return the epochs of a configuration ``{"epochs": N}``, all that a network's model has beside its tensors.

    Raises
    ------
    DocumentError
        If there are none, or they are no whole number.
    """
    return read_config(config, _Config).epochs


class _Config(msgspec.Struct):
    epochs: int


def predict_in_parts(
    embedding: NDArray[np.floating],
    standardiser: Standardiser,
    n_genes: int,
    predict: Callable[[Tensor], NDArray[np.float32]],
) -> NDArray[np.float32]:
    """Return what a network predicts of every row, ``(n_patches, n_genes)``, in bounded memory.

    Parameters
    ----------
    embedding
        ``(n_patches, dim)``.
    predict
        From standardised embeddings of some patches to log1p(CP10k).
    """
    out = np.empty((len(embedding), n_genes), np.float32)
    with torch.inference_mode():
        for start in range(0, len(out), PATCHES_AT_ONCE):
            part = slice(start, start + PATCHES_AT_ONCE)
            out[part] = predict(single(standardiser.apply(embedding[part])))
    return out


def single(values: NDArray[np.floating]) -> Tensor:
    """Return values as a tensor in single precision."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))


@dataclass(frozen=True)
class GeneScale:
    """Mean and standard deviation of each gene over the training spots: what networks predict is standardised.

    Parameters
    ----------
    mean, sd
        ``(n_genes,)``; the latter 0 where a gene does not vary.
    """

    mean: Floats
    sd: Floats

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection]) -> "GeneScale":
        """Measure them."""
        targets = np.concatenate([section.target for section in sections]).astype(np.float64)
        found = Standardiser.fit(targets)
        return cls(found.mean, np.where(np.isinf(found.scale), 0.0, found.scale))

    def standardise(self, target: NDArray[np.floating]) -> Floats:
        """Return standardised targets; 0 of a gene that does not vary."""
        return np.asarray((target - self.mean) / np.where(self.sd > 0, self.sd, np.inf))

    def to_genes(self, values: NDArray[np.floating]) -> NDArray[np.float32]:
        """Return log1p(CP10k) within what it can be."""
        return np.clip(self.mean + self.sd * values, 0.0, MAX_LOG).astype(np.float32)

    def state(self) -> State:
        """Return the arrays."""
        return {"genes.mean": self.mean, "genes.sd": self.sd}

    @classmethod
    def from_state(cls, state: State) -> "GeneScale":
        """Rebuild."""
        mean = take(state, "genes.mean", None)
        return cls(mean, take(state, "genes.sd", len(mean)))
