"""A multi-layer perceptron on the embedding under each spot: `ridge` with a curve in place of a line.

y = mean + sd * (W_3 drop(GELU(W_2 drop(GELU(W_1 z)))))        z: the standardised embedding
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import spot_embeddings
from histosge.models.linear_algebra import Indices, Standardiser
from histosge.models.nested_state import nest, take, unnest
from histosge.models.network_fitting import (
    FitSettings,
    GeneScale,
    fit_network,
    load_network,
    network_state,
    predict_in_parts,
    read_epochs,
    single,
)
from histosge.models.protocol import State

# Usual values of the field, set before any section was scored and not tuned.
WIDTH, DROPOUT = 256, 0.2
SETTINGS = FitSettings(max_epochs=40, batch=64)


def make_network(dim: int, n_genes: int) -> nn.Sequential:
    """Return a network of two hidden layers."""
    return nn.Sequential(
        nn.Linear(dim, WIDTH),
        nn.GELU(),
        nn.Dropout(DROPOUT),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Dropout(DROPOUT),
        nn.Linear(WIDTH, n_genes),
    )


@dataclass(frozen=True)
class _Regression:
    """Squared error of standardised genes, see `network_fitting.Objective`."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def make(self) -> nn.Sequential:
        return make_network(self.inputs.shape[1], self.targets.shape[1])

    def loss(self, network: nn.Sequential, spots: Indices, rng: np.random.Generator) -> Tensor:
        error: Tensor = ((network(self.inputs[spots]) - self.targets[spots]) ** 2).mean()
        return error

    def error(self, network: nn.Sequential, spots: Indices) -> float:
        with torch.inference_mode():
            return float(((network(self.inputs[spots]) - self.targets[spots]) ** 2).sum())


@dataclass(frozen=True)
class MlpModel:
    """log1p(CP10k) = genes(network(standardised embedding)).

    Parameters
    ----------
    network
        Trained; used for inference only.
    standardiser
        Of embeddings, measured at the training spots.
    genes
        From standardised genes to log1p(CP10k).
    epochs
        Passes over the training spots.
    """

    name: ClassVar[str] = "mlp"
    baseline: ClassVar[str] = "a network on single patches"
    network: nn.Sequential
    standardiser: Standardiser
    genes: GeneScale
    epochs: int

    @property
    def halo_um(self) -> float:
        """Return 0: no neighbouring patch is needed."""
        return 0.0

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Train; without `epochs` their number is chosen on training sections left out in turn."""
        X = np.concatenate([spot_embeddings(s.overlap, s.patches) for s in sections])
        Y = np.concatenate([s.target for s in sections])
        standardiser, genes = Standardiser.fit(X), GeneScale.fit(sections)
        objective = _Regression(single(standardiser.apply(X)), single(genes.standardise(Y)))
        fitted = fit_network(objective, sections, SETTINGS, seed=seed, epochs=epochs)
        return cls(fitted.network, standardiser, genes, fitted.epochs)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return predict_in_parts(
            patches.embedding,
            self.standardiser,
            len(self.genes.mean),
            lambda inputs: self.genes.to_genes(self.network(inputs).numpy()),
        )

    def config(self) -> dict[str, Any]:
        """Return the length of the training."""
        return {"epochs": self.epochs}

    def state(self) -> State:
        """Return weights, standardiser and scale of the genes."""
        return {
            **nest("network", network_state(self.network)),
            "embedding.mean": self.standardiser.mean,
            "embedding.scale": self.standardiser.scale,
            **self.genes.state(),
        }

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        genes, standardiser = GeneScale.from_state(state), Standardiser.from_state(state, "embedding")
        # Before a network of these sizes is made: torch would take the memory for any.
        take(state, "network.0.weight", WIDTH, len(standardiser.mean))
        take(state, "network.6.weight", len(genes.mean), WIDTH)
        network = load_network(
            lambda: make_network(len(standardiser.mean), len(genes.mean)), unnest("network", state)
        )
        return cls(network, standardiser, genes, read_epochs(config))
