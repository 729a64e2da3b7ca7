"""A multi-resolution transformer in the way of TRIPLEX (Chung et al., CVPR 2024): patch, neighbourhood and slide.

    patch           t = MLP(a z)                                    z: standardised components of the patch
    neighbourhood   N = attention over 5 x 5 positions, 112 um apart,  n = its mean
    slide           S = attention over 5 x 5 positions, 320 um apart, each a Gaussian mean (sigma 160 um); s: the middle one
    fusion          f = s + cross-attention(s, [t, N]);  f = f + MLP(f)
    heads           y_t, y_n, y_s and y_f, linear; y_f is the prediction
    loss            |y_f - y|^2 + sum over t, n, s of (1 - 0.3) |y_j - y|^2 + 0.3 |y_j - y_f|^2

Written from the paper; what differs from it: all resolutions are frozen embeddings of the store (the paper trains a
ResNet-18 on the patch); the slide is seen up to 1.1 mm away and not whole, because maps are predicted block by block;
positions are relative to the patch, in microns (the paper has relative ones for the neighbourhood and a convolution
for the slide); one layer a resolution; and the number of epochs is chosen on training sections left out in turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from histosge.data.gaussian_pooling import TRUNCATE, gaussian_pool
from histosge.data.sections import Patches, TrainingSection
from histosge.data.spot_overlap import Neighbourhood, heaviest_patches, neighbourhood
from histosge.models.bleep import at_most
from histosge.models.linear_algebra import Indices, Standardiser
from histosge.models.multiscale import MultiscaleFeatures
from histosge.models.nested_state import nest, take, unnest
from histosge.models.network_fitting import (
    FitSettings,
    GeneScale,
    fit_network,
    load_network,
    network_state,
    read_epochs,
    single,
)
from histosge.models.protocol import State

STEPS = 2
"""Positions between the middle of a window and its edge, at most: 5 x 5, as published."""
NEAR_UM, FAR_UM, FAR_SIGMA_UM = 224.0, 640.0, 160.0
"""Half the side of both windows, and the Gaussian by which the far one's positions are pooled."""
WIDTH, HEADS, DROPOUT = 64, 4, 0.1
DISTILLATION = 0.3
"""Weight of the fused prediction in the losses of the three others, as published."""
SETTINGS = FitSettings(max_epochs=20, batch=64)
MAX_SPOTS = 20_000
"""Spots that are trained on, at most, evenly over sections: windows of more would not fit a laptop's memory."""
_PATCHES_AT_ONCE = 1024


class Windows(NamedTuple):
    """What the network sees of some patches: 5 x 5 positions around each, at two resolutions.

    Parameters
    ----------
    components, pooled
        Of all patches, as they are and pooled, ``(n_patches, dim)``.
    near, far
        Indices of the patches in the windows, the middle among them; -1 where there is none.
    middle
        Indices of the patches in the middle, ``(n,)``.
    near_um, far_um
        ``(dx, dy)`` of the positions in units of the window's half side, ``(n_positions, 2)``.
    """

    components: Tensor
    pooled: Tensor
    near: Tensor
    far: Tensor
    middle: Tensor
    near_um: Tensor
    far_um: Tensor

    def take(self, chosen: Indices | slice) -> "Windows":
        """Return the windows of some of the patches."""
        index = torch.from_numpy(chosen) if isinstance(chosen, np.ndarray) else chosen
        return self._replace(near=self.near[index], far=self.far[index], middle=self.middle[index])


class Attention(nn.Module):
    """Multi-head attention of queries over tokens, pre-norm, with a residual connection and an MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm, self.token_norm, self.norm = (nn.LayerNorm(WIDTH) for _ in range(3))
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, queries: Tensor, tokens: Tensor, exists: Tensor) -> Tensor:
        """Map queries ``(n, n_queries, WIDTH)`` to the same shape; `exists` is ``(n, n_tokens)``."""
        normed = self.token_norm(tokens)
        q, k, v = self.query(self.query_norm(queries)), self.key(normed), self.value(normed)
        mixed = functional.scaled_dot_product_attention(
            _heads(q), _heads(k), _heads(v), attn_mask=exists[:, None, None, :]
        )
        queries = queries + self.drop(self.out(mixed.transpose(1, 2).flatten(-2)))
        added: Tensor = queries + self.drop(self.mlp(self.norm(queries)))
        return added


def _heads(values: Tensor) -> Tensor:
    """Turn ``(n, positions, width)`` into ``(n, heads, positions, width / heads)``."""
    return values.reshape(*values.shape[:2], HEADS, -1).transpose(1, 2)


class TriplexNetwork(nn.Module):
    """Windows -> standardised genes, by four heads.

    Parameters
    ----------
    dim, n_genes
        Length of the components, and of the output.
    """

    def __init__(self, dim: int, n_genes: int) -> None:
        super().__init__()
        self.patch = nn.Sequential(
            nn.Linear(dim, WIDTH), nn.GELU(), nn.Dropout(DROPOUT), nn.Linear(WIDTH, WIDTH)
        )
        self.near, self.far = nn.Linear(dim, WIDTH), nn.Linear(dim, WIDTH)
        # Of dx, dy and their squares: a position's distance from the middle is linear in these.
        self.near_place, self.far_place = (nn.Linear(4, WIDTH, bias=False) for _ in range(2))
        self.near_attention, self.far_attention, self.fusion = (Attention() for _ in range(3))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, n_genes)) for _ in range(4)
        )

    def forward(self, windows: Windows) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the predictions of fusion, patch, neighbourhood and slide, ``(n, n_genes)`` each."""
        patch = self.patch(windows.components[windows.middle])
        near, near_exists = windows.near.clamp(min=0), windows.near >= 0
        far, far_exists = windows.far.clamp(min=0), windows.far >= 0
        near_tokens = _tokens(self.near, windows.components, near) + self.near_place(_place(windows.near_um))
        far_tokens = _tokens(self.far, windows.pooled, far) + self.far_place(_place(windows.far_um))
        neighbours = self.near_attention(near_tokens, near_tokens, near_exists)
        share = (near_exists / near_exists.sum(dim=1, keepdim=True))[..., None]
        # The middle one alone is asked: the others' answers are not used.
        centre = far_tokens.shape[1] // 2
        slide = self.far_attention(far_tokens[:, centre : centre + 1], far_tokens, far_exists)
        tokens = torch.cat([patch[:, None], neighbours], dim=1)
        exists = functional.pad(near_exists, (1, 0), value=True)
        fused = self.fusion(slide, tokens, exists)[:, 0]
        parts = (fused, patch, (neighbours * share).sum(dim=1), slide[:, 0])
        fusion, *others = (head(part) for head, part in zip(self.heads, parts, strict=True))
        return fusion, others[0], others[1], others[2]


def _tokens(project: nn.Linear, values: Tensor, index: Tensor) -> Tensor:
    """Project the patches in some windows, each once, and lay them out, ``(n, n_positions, WIDTH)``."""
    needed, place = torch.unique(index, return_inverse=True)
    # `embedding` is a look-up whose gradients are added in a fixed order: the same bits every time.
    return functional.embedding(place, project(values[needed]))


def _place(offset: Tensor) -> Tensor:
    return torch.cat([offset, offset**2], dim=1)


@dataclass(frozen=True)
class _Distilled:
    """The loss with distillation; the error is that of the fused prediction, see `network_fitting.Objective`."""

    sections: Sequence[Windows]
    targets: Tensor
    dim: int

    def __len__(self) -> int:
        return len(self.targets)

    def make(self) -> TriplexNetwork:
        return TriplexNetwork(self.dim, self.targets.shape[1])

    def _parts(self, spots: Indices) -> list[tuple[Windows, Tensor]]:
        """Return the windows and targets of some spots, section by section."""
        ends = np.cumsum([len(windows.middle) for windows in self.sections])
        number = np.searchsorted(ends, spots, side="right")
        parts = []
        for i in np.unique(number):
            here = np.sort(spots[number == i])
            windows = self.sections[i].take(here - (ends[i] - len(self.sections[i].middle)))
            parts.append((windows, self.targets[here]))
        return parts

    def loss(self, network: TriplexNetwork, spots: Indices, rng: np.random.Generator) -> Tensor:
        total = torch.zeros(())
        for windows, target in self._parts(spots):
            fused, *others = network(windows)
            total = total + ((fused - target) ** 2).sum()
            # The three learn from the fused one, not the fused one from them.
            soft = fused.detach()
            for one in others:
                total = total + (1 - DISTILLATION) * ((one - target) ** 2).sum()
                total = total + DISTILLATION * ((one - soft) ** 2).sum()
        return total / (len(spots) * self.targets.shape[1])

    def error(self, network: TriplexNetwork, spots: Indices) -> float:
        with torch.inference_mode():
            return sum(float(((network(w)[0] - y) ** 2).sum()) for w, y in self._parts(spots))


@dataclass(frozen=True)
class TriplexModel:
    """log1p(CP10k) = genes(network(patch, neighbourhood, slide)).

    Parameters
    ----------
    features
        Embeddings -> at most 256 principal components.
    standardiser
        Of the components, measured at the training spots.
    network
        Trained; used for inference only.
    genes
        From standardised genes to log1p(CP10k).
    epochs
        Passes over the training spots.
    """

    name: ClassVar[str] = "triplex"
    # Four networks a fit, and calibration takes up to four more fits.
    calibrated_by_default: ClassVar[bool] = False
    features: MultiscaleFeatures
    standardiser: Standardiser
    network: TriplexNetwork
    genes: GeneScale
    epochs: int

    @property
    def halo_um(self) -> float:
        """Return how far the outermost pooled position reaches."""
        return FAR_UM + TRUNCATE * FAR_SIGMA_UM

    @classmethod
    def fit(cls, sections: Sequence[TrainingSection], *, seed: int = 0, epochs: int | None = None) -> Self:
        """Train; without `epochs` their number is chosen on training sections left out in turn."""
        sections = at_most(sections, MAX_SPOTS)
        features, genes = MultiscaleFeatures.fit(sections), GeneScale.fit(sections)
        reduced = [features.components(section.patches) for section in sections]
        # One patch a spot, as published: the one that covers most of its disc.
        middles = [heaviest_patches(section.overlap) for section in sections]
        at_spots = np.concatenate([p.embedding[m] for p, m in zip(reduced, middles, strict=True)])
        standardiser = Standardiser.fit(at_spots.astype(np.float64))
        windows = [
            cut_windows(patches, standardiser, middle)
            for patches, middle in zip(reduced, middles, strict=True)
        ]
        targets = single(genes.standardise(np.concatenate([s.target for s in sections])))
        objective = _Distilled(windows, targets, at_spots.shape[1])
        fitted = fit_network(objective, sections, SETTINGS, seed=seed, epochs=epochs)
        return cls(features, standardiser, fitted.network, genes, fitted.epochs)

    def predict(self, patches: Patches) -> NDArray[np.float32]:
        """Return log1p(CP10k) of every patch, ``(n_patches, n_genes)``."""
        return self.predict_some(patches, np.arange(len(patches)))

    def predict_some(self, patches: Patches, of: Indices) -> NDArray[np.float32]:
        """Return log1p(CP10k) of the patches `of`, ``(len(of), n_genes)``."""
        out = np.empty((len(of), len(self.genes.mean)), np.float32)
        if len(of) == 0:
            return out
        windows = cut_windows(self.features.components(patches), self.standardiser, of)
        with torch.inference_mode():
            for start in range(0, len(out), _PATCHES_AT_ONCE):
                part = slice(start, start + _PATCHES_AT_ONCE)
                out[part] = self.genes.to_genes(self.network(windows.take(part))[0].numpy())
        return out

    def config(self) -> dict[str, Any]:
        """Return the length of the training."""
        return {"epochs": self.epochs}

    def state(self) -> State:
        """Return the components, weights and scales."""
        return {
            **nest("features", self.features.state()),
            **nest("network", network_state(self.network)),
            "components.mean": self.standardiser.mean,
            "components.scale": self.standardiser.scale,
            **self.genes.state(),
        }

    @classmethod
    def from_state(cls, config: dict[str, Any], state: State) -> Self:
        """Rebuild."""
        features = MultiscaleFeatures.from_state(unnest("features", state))
        standardiser, genes = Standardiser.from_state(state, "components"), GeneScale.from_state(state)
        take(state, "components.mean", len(features.centre))
        # Before a network of these sizes is made: torch would take the memory for any.
        take(state, "network.near.weight", WIDTH, len(features.centre))
        take(state, "network.heads.0.1.weight", len(genes.mean), WIDTH)
        network = load_network(
            lambda: TriplexNetwork(len(features.centre), len(genes.mean)), unnest("network", state)
        )
        return cls(features, standardiser, network, genes, read_epochs(config))


def cut_windows(patches: Patches, standardiser: Standardiser, of: Indices) -> Windows:
    """Cut both windows around the patches `of`; embeddings are components, and only those in a window are kept."""
    near = neighbourhood(patches, NEAR_UM, STEPS, of)
    far = neighbourhood(patches, FAR_UM, STEPS, of)
    kept, pooled_at = _present(near, of), _present(far)
    values = standardiser.apply(patches.embedding[kept])
    # Pooled first and standardised afterwards: both are linear, and the pooled ones are fewer.
    pooled = standardiser.apply(gaussian_pool(patches, FAR_SIGMA_UM, ("mean",), pooled_at))
    return Windows(
        single(values),
        single(pooled),
        _renumbered(near.index, kept, len(patches)),
        _renumbered(far.index, pooled_at, len(patches)),
        _renumbered(of, kept, len(patches)),
        single(near.offset_um / NEAR_UM),
        single(far.offset_um / FAR_UM),
    )


def _present(around: Neighbourhood, *more: Indices) -> Indices:
    """Return the patches that are in any window, sorted."""
    return np.unique(np.concatenate([around.index[around.index >= 0], *more]))


def _renumbered(index: Indices, kept: Indices, n_patches: int) -> Tensor:
    """Return indices into all patches as indices into those that are kept; -1 stays."""
    new = np.full(n_patches + 1, -1)  # index -1, no patch, finds the last entry, which stays -1
    new[kept] = np.arange(len(kept))
    return torch.from_numpy(new[index])
