"""BLEEP (Xie et al., NeurIPS 2023): patches and expression in one space, and the expression of the nearest spots.

Two projections, of the embedding under a spot and of its genes, are trained so that both of one spot are alike:

    p(x) = LayerNorm(h + drop(W_2 GELU(h))),  h = W_1 x            for images (I) and for expression (E)
    T = softmax((I I' + E E') / 2 tau)                              soft targets: like spots may be alike
    L = (cross-entropy(E I' / tau, T) + cross-entropy(I E' / tau, T')) / 2

A patch is predicted as the mean log1p(CP10k) of the 50 training spots whose expression is nearest to it by the cosine.
Written from the paper; what differs from it: the image encoder is the frozen embedding of the store (the paper trains
a ResNet-50), genes are standardised, batches hold 64 spots instead of 512, and the number of epochs is chosen on
training sections that are left out in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

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

# As published: length of the common space, dropout, temperature, and spots that are averaged.
WIDTH, DROPOUT, TEMPERATURE, NEIGHBOURS = 256, 0.1, 1.0, 50
SETTINGS = FitSettings(max_epochs=30, batch=64, weight_decay=1e-3)
MAX_REFERENCES = 20_000
"""Training spots that are kept to retrieve from, at most, evenly over sections: a model of more would be gigabytes."""
_SIMILARITIES_AT_ONCE = 1 << 22
"""Patches times references that are compared together: 16 MB."""


class Projection(nn.Module):
    """Map vectors into the common space, ``(n, dim) -> (n, WIDTH)``."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(dim, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.drop, self.norm = nn.Dropout(DROPOUT), nn.LayerNorm(WIDTH)

    def forward(self, values: Tensor) -> Tensor:
        """Return points of the common space."""
        h = self.first(values)
        point: Tensor = self.norm(h + self.drop(self.second(functional.gelu(h))))
        return point


class BleepNetwork(nn.Module):
    """Both projections."""

    def __init__(self, dim: int, n_genes: int) -> None:
        super().__init__()
        self.image, self.expression = Projection(dim), Projection(n_genes)


def contrastive_loss(image: Tensor, expression: Tensor) -> Tensor:
    """Return the loss of the points of some spots, ``(n, WIDTH)`` each."""
    similar = expression @ image.T / TEMPERATURE
    targets = functional.softmax((image @ image.T + expression @ expression.T) / (2 * TEMPERATURE), dim=-1)
    # Soft targets take part in the gradient, as in the paper's derivation from CLIP.
    by_expression = functional.cross_entropy(similar, targets)
    by_image = functional.cross_entropy(similar.T, targets.T)
    return (by_expression + by_image) / 2


def retrieve(query: Tensor, reference: Tensor, target: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the mean target of the nearest references of each query, ``(n, n_genes)``; points have length 1."""
    k = min(NEIGHBOURS, len(reference))
    at_once = max(1, _SIMILARITIES_AT_ONCE // len(reference))
    out = np.empty((len(query), target.shape[1]), np.float32)
    for start in range(0, len(query), at_once):
        part = slice(start, start + at_once)
        nearest = torch.topk(query[part] @ reference.T, k, dim=1).indices.numpy()
        # As a sparse product: an array of (patches, neighbours, genes) would not fit in memory.
        rows = np.repeat(np.arange(len(nearest)), k)
        mix = sparse.csr_matrix(
            (np.full(nearest.size, 1 / k, np.float32), (rows, nearest.ravel())),
            shape=(len(nearest), len(reference)),
        )
        out[part] = mix @ target
    return out


@dataclass(frozen=True)
class _Contrast:
    """The contrastive loss; the error is that of retrieval from the other spots, see `network_fitting.Objective`."""

    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def make(self) -> BleepNetwork:
        return BleepNetwork(self.inputs.shape[1], self.targets.shape[1])

    def loss(self, network: BleepNetwork, spots: Indices, rng: np.random.Generator) -> Tensor:
        return contrastive_loss(network.image(self.inputs[spots]), network.expression(self.targets[spots]))

    def error(self, network: BleepNetwork, spots: Indices) -> float:
        # What users get is the retrieved mean: its error, not the loss, decides how long to train.
        others = np.setdiff1d(np.arange(len(self)), spots)
        with torch.inference_mode():
            query = functional.normalize(network.image(self.inputs[spots]))
            reference = functional.normalize(network.expression(self.targets[others]))
        found = retrieve(query, reference, self.targets[others].numpy())
        return float(((found - self.targets[spots].numpy()) ** 2).sum())


@dataclass(frozen=True)
class BleepModel:
    """log1p(CP10k) = mean of that of the training spots whose expression is nearest to the patch.

    Parameters
    ----------
    network
        Trained; of it only the projection of images is used.
    standardiser
        Of embeddings, measured at the training spots.
    reference
        Points of the training spots' expression, of length 1, ``(n_spots, WIDTH)``.
    target
        Their log1p(CP10k), ``(n_spots, n_genes)``.
    epochs
        Passes over the training spots.
    """

    name: ClassVar[str] = "bleep"
    network: Projection
    standardiser: Standardiser
    reference: Tensor
    target: NDArray[np.float32]
    epochs: int

    @property
    def halo_um(self) -> float:
        """Return 0: no neighbouring patch is needed."""
        return 0.0

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Train; without `epochs` their number is chosen on training sections left out in turn."""
        sections = at_most(sections, MAX_REFERENCES)
        X = np.concatenate([spot_embeddings(s.overlap, s.patches) for s in sections])
        target = np.concatenate([s.target for s in sections])
        standardiser, genes = Standardiser.fit(X), GeneScale.fit(sections)
        objective = _Contrast(single(standardiser.apply(X)), single(genes.standardise(target)))
        fitted = fit_network(objective, sections, SETTINGS, seed=seed, epochs=epochs)
        with torch.inference_mode():
            reference = functional.normalize(fitted.network.expression(objective.targets))
        return cls(fitted.network.image, standardiser, reference, target, fitted.epochs)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return predict_in_parts(
            patches.embedding, self.standardiser, self.target.shape[1], self._predict_standardised
        )

    def _predict_standardised(self, inputs: Tensor) -> NDArray[np.float32]:
        return retrieve(functional.normalize(self.network(inputs)), self.reference, self.target)

    def config(self) -> dict[str, Any]:
        """Return the length of the training."""
        return {"epochs": self.epochs}

    def state(self) -> State:
        """Return the projection of images, and the training spots."""
        return {
            **nest("image", network_state(self.network)),
            "embedding.mean": self.standardiser.mean,
            "embedding.scale": self.standardiser.scale,
            "reference": self.reference.numpy(),
            "target": self.target,
        }

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        standardiser = Standardiser.from_state(state, "embedding")
        # Before a network of these sizes is made: torch would take the memory for any.
        dim = take(state, "image.first.weight", WIDTH, len(standardiser.mean)).shape[1]
        network = load_network(lambda: Projection(dim), unnest("image", state))
        reference = take(state, "reference", None, WIDTH)
        target = take(state, "target", len(reference), None).astype(np.float32, copy=False)
        return cls(network, standardiser, single(reference), target, read_epochs(config))


def at_most(sections: Sequence[TrainingSection], n_spots: int) -> list[TrainingSection]:
    """Return sections with every k-th of their spots, so that there are at most `n_spots`, one a section at least."""
    every = -(-sum(len(s.target) for s in sections) // n_spots)
    if every == 1:
        return list(sections)
    return [s.subset(np.arange(len(s.target)) % every == 0) for s in sections]
