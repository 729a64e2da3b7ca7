"""A small attention network that is added to a linear model: it starts at zero and is fitted to the residuals.

    t_p = A z_p                                        z: standardised components of a patch's embedding
    s_p = sum_n softmax_n(q_p k_n' / sqrt(d) + b(|x_p - x_n|)) v_n      over the patches n of the window, per head
    r_p = W tanh(t_p + O s_p)                          in patterns; W and O are zero at the start

Positions enter by distance alone, in microns: b is a sum of Gaussian basis functions of it, per head. So a model moves
to another slide, grid or orientation. Tokens t are computed once per patch and shared by all windows that it is in. A
spot is the mean of the patches under it; in training one of them is drawn with a probability of its share of the area.

Terms
    window    the patches within a radius of a middle patch, along either axis
    residual  a spot's patterns minus those predicted by a linear model that was fitted without the spot's section
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from torch.nn import functional

from histosge.data.sections import Patches
from histosge.data.spot_overlap import neighbourhood
from histosge.models.linear_algebra import Floats, Standardiser

RADIUS_UM, STEPS = 256.0, 4
"""Half the side of a window, and positions between its middle and its edge, at most: 81 in all."""
WIDTH, HEADS, DROPOUT = 32, 4, 0.1
BASIS_UM, BASIS_SD_UM = (0.0, 60.0, 120.0, 180.0, 240.0, 320.0), 50.0
"""Centres of the basis functions of the distance, and their standard deviation."""
EPOCHS = 60
"""Of the window, after twice as many of the patch alone. No early stop: the error often rises for ten before it falls."""
BATCH, SPOTS_PER_EPOCH, VALIDATION_SPOTS = 64, 4000, 1000
LEARNING_RATE, WEIGHT_DECAY = 3e-3, 0.02
_PATCHES_AT_ONCE = 2048


class AttentionNetwork(nn.Module):
    """Components of patches -> what to add to their patterns.

    Parameters
    ----------
    dim, n_patterns
        Length of the components, and of the output.

    Attributes
    ----------
    uses_window
        Whether attention is computed; False gives the same as long as O is zero, at less cost.
    """

    def __init__(self, dim: int, n_patterns: int) -> None:
        super().__init__()
        self.uses_window = True
        self.tokens = nn.Linear(dim, WIDTH)
        self.query, self.key, self.value, self.mix = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.distance = nn.Parameter(torch.zeros(HEADS, len(BASIS_UM)))
        self.drop = nn.Dropout(DROPOUT)
        self.out = nn.Linear(WIDTH, n_patterns, bias=False)
        # O and W: the sum of the linear model and this network starts as the linear model.
        nn.init.zeros_(self.mix.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, components: Tensor, middle: Tensor, window: Tensor, distance_um: Tensor) -> Tensor:
        """Return what to add to the patterns of some patches, ``(n, n_patterns)``.

        Parameters
        ----------
        components
            Standardised, of all patches that are in any window, ``(n_patches, dim)``.
        middle
            Indices of the patches to predict, ``(n,)``.
        window
            Indices of the patches in the window of each, ``(n, n_positions)``; -1 where there is none.
        distance_um
            From the middle of a window to each of its positions, ``(n_positions,)``.
        """
        if not self.uses_window:
            alone: Tensor = self.out(torch.tanh(self.drop(self.tokens(components[middle]))))
            return alone
        tokens = self.drop(self.tokens(components))
        own, index = tokens[middle], window.clamp(min=0)
        # `embedding` is a look-up whose gradients are added in a fixed order: the same bits every time.
        key, value = (_heads(functional.embedding(index, part(tokens))) for part in (self.key, self.value))
        basis = torch.exp(
            -(((distance_um[:, None] - distance_um.new_tensor(BASIS_UM)) / BASIS_SD_UM) ** 2) / 2
        )
        bias = (self.distance @ basis.T)[None, :, None].masked_fill((window < 0)[:, None, None], -torch.inf)
        query = _heads(self.query(own)[:, None])
        context = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        added: Tensor = self.out(torch.tanh(own + self.mix(context.transpose(1, 2).flatten(-2)[:, 0])))
        return added


def _heads(values: Tensor) -> Tensor:
    """Turn ``(n, positions, width)`` into ``(n, heads, positions, width / heads)``."""
    return values.reshape(*values.shape[:2], HEADS, -1).transpose(1, 2)


@dataclass(frozen=True)
class Windows:
    """The windows around some patches of one slide, ready for a network.

    Parameters
    ----------
    components, middle, window, distance_um
        See `AttentionNetwork.forward`.
    """

    components: Tensor
    middle: Tensor
    window: Tensor
    distance_um: Tensor

    @classmethod
    def from_patches(
        cls, patches: Patches, standardiser: Standardiser, radius_um: float, of: NDArray[np.int64]
    ) -> Self:
        """Cut windows around the patches `of`, whose embeddings are components; only patches in a window are kept."""
        around = neighbourhood(patches, radius_um, STEPS, of)
        needed = np.unique(around.index[around.index >= 0])
        new_index = np.full(len(patches) + 1, -1)  # index -1, no patch, finds the last entry, which stays -1
        new_index[needed] = np.arange(len(needed))
        return cls(
            torch.from_numpy(standardiser.apply(patches.embedding[needed]).astype(np.float32)),
            torch.from_numpy(new_index[of]),
            torch.from_numpy(new_index[around.index]),
            torch.from_numpy(np.hypot(*around.offset_um.T).astype(np.float32)),
        )

    def predict(self, network: AttentionNetwork, chosen: Tensor | slice) -> Tensor:
        """Return what a network adds to some of the patches, ``(n_chosen, n_patterns)``."""
        window = self.window[chosen]
        # Tokens are computed only of the patches in these windows, and once for each.
        needed, new_index = torch.unique(
            torch.cat([self.middle[chosen], window.flatten()]), return_inverse=True
        )
        has_none = int(needed[0] < 0)  # -1, no patch, sorts first
        new_index = new_index - has_none
        middle, window = new_index[: len(window)], new_index[len(window) :].reshape(window.shape)
        added: Tensor = network(self.components[needed[has_none:]], middle, window, self.distance_um)
        return added

    def predict_mean(self, networks: Sequence[AttentionNetwork]) -> NDArray[np.float32]:
        """Return the mean over networks of what they add to every patch, ``(n, n_patterns)``."""
        with torch.inference_mode():
            parts = []
            for start in range(0, len(self.middle), _PATCHES_AT_ONCE):
                chosen = slice(start, start + _PATCHES_AT_ONCE)
                parts.append(torch.stack([self.predict(one, chosen) for one in networks]).mean(dim=0))
        return np.asarray(torch.cat(parts).numpy())


@dataclass(frozen=True)
class TrainingWindows:
    """One section to fit to: windows around the patches under its spots, and the residuals of the spots.

    Parameters
    ----------
    windows
        Around the patches under any spot.
    overlap
        Of the spots with those patches, ``(n_spots, n)``.
    residual
        Per spot, ``(n_spots, n_patterns)``.
    """

    windows: Windows
    overlap: sparse.csr_matrix
    residual: Floats

    def __len__(self) -> int:
        return len(self.residual)

    @classmethod
    def from_patches(
        cls,
        patches: Patches,
        overlap: sparse.csr_matrix,
        residual: Floats,
        standardiser: Standardiser,
        radius_um: float,
    ) -> Self:
        """Cut the windows that a section's spots need."""
        under = np.unique(overlap.indices).astype(np.int64)
        windows = Windows.from_patches(patches, standardiser, radius_um, under)
        return cls(windows, sparse.csr_matrix(overlap[:, under]), residual)

    def take(self, spots: NDArray[np.int64]) -> "TrainingWindows":
        """Return some of the spots, with the windows that they need."""
        overlap, whole = self.overlap[spots], self.windows
        under = np.unique(overlap.indices)
        index = torch.from_numpy(under.astype(np.int64))
        windows = replace(whole, middle=whole.middle[index], window=whole.window[index])
        return TrainingWindows(windows, sparse.csr_matrix(overlap[:, under]), self.residual[spots])

    def draw_patches(self, spots: NDArray[np.int64], rng: np.random.Generator) -> Tensor:
        """Draw one patch under each spot, with a probability of its share of the area; every spot has a patch."""
        # Inverse transform sampling in the running sum of all areas, row after row.
        up_to = np.cumsum(self.overlap.data)
        first, last = self.overlap.indptr[spots], self.overlap.indptr[spots + 1] - 1
        low = np.where(first > 0, up_to[first - 1], 0.0)
        wanted = low + rng.random(len(spots)) * (up_to[last] - low)
        place = np.clip(np.searchsorted(up_to, wanted, side="right"), first, last)
        return torch.from_numpy(self.overlap.indices[place].astype(np.int64))

    def predict(self, network: AttentionNetwork) -> Floats:
        """Return what a network adds at the spots, ``(n_spots, n_patterns)``."""
        return np.asarray(self.overlap @ self.windows.predict_mean([network]).astype(np.float64))


@dataclass(frozen=True)
class FitResult:
    """A network at its best epoch, in evaluation mode.

    Parameters
    ----------
    patch_epochs, window_epochs
        Epochs kept of the patch alone, and then of its window; 0 where they did not reduce the error.
    """

    network: AttentionNetwork
    patch_epochs: int
    window_epochs: int


def fit(
    training: Sequence[TrainingWindows],
    validation: Sequence[TrainingWindows],
    seed: Sequence[int],
    epochs: int,
) -> FitResult:
    """Train on some sections, and keep the epoch with the least squared error on others.

    The patch alone is fitted first, which is a curve in place of a line; then, from the best epoch of that, its window.
    Fitted at once, the window is overfitted.

    Parameters
    ----------
    validation
        About `VALIDATION_SPOTS` of their spots are used.
    seed
        Same seed, same machine: the same network, bit for bit.
    epochs
        Of the window, and half of those of the patch alone: passes over the spots, or over `SPOTS_PER_EPOCH` of them.
    """
    every = -(-sum(map(len, validation)) // VALIDATION_SPOTS)
    validation = [section.take(np.arange(0, len(section), every)) for section in validation]
    rng = np.random.default_rng(seed)
    dim, n_patterns = training[0].windows.components.shape[1], training[0].residual.shape[1]
    # Weights and dropout draw from torch's global generator: it is seeded here, and given back as it was.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**31)))
        network, kept = AttentionNetwork(dim, n_patterns), []
        for network.uses_window, passes in ((False, 2 * epochs), (True, epochs)):
            kept.append(_fit_stage(network, training, validation, rng, passes))
    return FitResult(network.eval(), *kept)


def _fit_stage(
    network: AttentionNetwork,
    training: Sequence[TrainingWindows],
    validation: Sequence[TrainingWindows],
    rng: np.random.Generator,
    epochs: int,
) -> int:
    """Train, restore the best epoch, and return its number: 0 if none was better than the start."""
    optimiser = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    best, kept, state = np.inf, 0, network.state_dict()
    for epoch in range(epochs + 1):
        # Before the first epoch as well: where no epoch is better, the network stays as it was.
        network.eval()
        error = sum(
            float(((section.predict(network) - section.residual) ** 2).sum()) for section in validation
        )
        if error < best:
            best, kept = error, epoch
            state = {name: value.clone() for name, value in network.state_dict().items()}
        if epoch < epochs:
            network.train()
            _train_epoch(network, optimiser, training, rng)
    network.load_state_dict(state)
    return kept


def _train_epoch(
    network: AttentionNetwork,
    optimiser: torch.optim.Optimizer,
    training: Sequence[TrainingWindows],
    rng: np.random.Generator,
) -> None:
    """Go through the spots, or `SPOTS_PER_EPOCH` of them."""
    share = min(1.0, SPOTS_PER_EPOCH / sum(map(len, training)))
    # All spots of a batch lie on one slide, so that their windows share tokens.
    batches = []
    for number, section in enumerate(training):
        spots = rng.permutation(len(section))[: int(np.ceil(share * len(section)))]
        batches += [(number, part) for part in np.array_split(spots, max(1, round(len(spots) / BATCH)))]
    for at in rng.permutation(len(batches)):
        number, spots = batches[at]
        section = training[number]
        wanted = torch.from_numpy(section.residual[spots].astype(np.float32))
        predicted = section.windows.predict(network, section.draw_patches(spots, rng))
        loss = ((predicted - wanted) ** 2).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
