"""A light spatial attention: what lies where around a patch, as a correction to patterns.

    t = tokens of a window of patches, r = radial basis of each one's distance in microns
    q = W_q t_0, k = W_k [t, r], v = W_v [t, r]           4 heads of 8
    correction = W_2 GELU(W_1 [softmax(q k^T / sqrt 8) v, t_0])     W_2 starts at 0

Only distances are seen, so a turned slide gives the same correction, and any stride will do. It is
trained through the spots' discs, on rates: it knows no measured value of a single patch.

Terms
    token    an embedding's leading components, standardised
    pattern  see `low_rank`
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from histosge.models.linear import Affine, Floats, Indices, Standardiser, principal_axes
from histosge.models.model import State
from histosge.sections import Patches, TrainingSection
from histosge.windows import neighbourhood

RADIUS_UM, STEPS = 240.0, 3
"""A window of at most 7 x 7 patches, up to 240 µm away along either axis."""
TOKEN_DIM, HEADS, HEAD_DIM = 32, 4, 8
RINGS_UM = (0.0, 60.0, 120.0, 180.0, 240.0)
_CHUNK = 4096


class WindowAttention(nn.Module):
    """Tokens of windows -> corrections to patterns; see the module's header for the equations.

    Parameters
    ----------
    n_patterns
        Length of a correction.
    """

    def __init__(self, n_patterns: int) -> None:
        super().__init__()
        width = HEADS * HEAD_DIM
        self.query = nn.Linear(TOKEN_DIM, width, bias=False)
        self.key = nn.Linear(TOKEN_DIM + len(RINGS_UM), width, bias=False)
        self.value = nn.Linear(TOKEN_DIM + len(RINGS_UM), width, bias=False)
        self.hidden = nn.Linear(width + TOKEN_DIM, width)
        self.out = nn.Linear(width, n_patterns)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, middle: Tensor, around: Tensor, exists: Tensor, rings: Tensor) -> Tensor:
        """Correct the patches in the middle of ``n`` windows.

        Parameters
        ----------
        middle, around
            Tokens, ``(n, TOKEN_DIM)`` and ``(n, positions, TOKEN_DIM)``.
        exists
            ``(n, positions)``; the middle itself always does.
        rings
            Radial basis of each position, ``(positions, len(RINGS_UM))``.
        """
        n, positions, _ = around.shape
        seen = torch.cat([around, rings.expand(n, -1, -1)], dim=2)
        q = self.query(middle).view(n, HEADS, 1, HEAD_DIM)
        k, v = (
            layer(seen).view(n, positions, HEADS, HEAD_DIM).transpose(1, 2)
            for layer in (self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=exists[:, None, None, :])
        hidden = functional.gelu(self.hidden(torch.cat([mixed.reshape(n, -1), middle], dim=1)))
        correction: Tensor = self.out(hidden)
        return correction


@dataclass(frozen=True)
class Tokeniser:
    """Embeddings -> tokens.

    Parameters
    ----------
    affine
        Standardiser and principal components in one; each component has spread 1 on the training part.
    """

    affine: Affine

    @classmethod
    def of(cls, sections: list[TrainingSection]) -> Self:
        """Measure components on the patches under training spots."""
        under = np.concatenate([s.patches.embedding[np.unique(s.overlap.indices)] for s in sections])
        sample = under[:: -(-len(under) // 5000)].astype(np.float64)
        standardiser = Standardiser.of(sample)
        scaled = standardiser.apply(sample)
        axes = principal_axes(scaled, TOKEN_DIM)
        # The spread of the first component scales all: small components stay small.
        axes = axes / max(float((scaled @ axes[:, 0]).std()), 1e-6)
        wide = np.zeros((len(axes), TOKEN_DIM))
        wide[:, : axes.shape[1]] = axes * 2
        return cls(Affine(wide, np.zeros(TOKEN_DIM)).after(standardiser))

    def __call__(self, patches: Patches) -> Tensor:
        """Return tokens, ``(n_patches + 1, TOKEN_DIM)``; the last is for positions without a patch."""
        tokens = np.zeros((len(patches) + 1, TOKEN_DIM), dtype=np.float32)
        tokens[:-1] = np.clip(self.affine(patches.embedding), -6, 6)
        return torch.from_numpy(tokens)


def radial_basis(offset_um: Floats) -> Tensor:
    """Return how near each position is to each of `RINGS_UM`, ``(positions, len(RINGS_UM))``."""
    distance = np.hypot(offset_um[:, 0], offset_um[:, 1])[:, None]
    width = RINGS_UM[1] - RINGS_UM[0]
    return torch.from_numpy(np.exp(-(((distance - np.array(RINGS_UM)) / width) ** 2) / 2).astype(np.float32))


@dataclass(frozen=True)
class Correction:
    """A trained attention with its tokeniser.

    Parameters
    ----------
    tokeniser, network
        Embeddings -> tokens -> corrections.
    """

    tokeniser: Tokeniser
    network: WindowAttention

    def correct(self, patches: Patches, tokens: Tensor, of: Indices) -> Tensor:
        """Return corrections of some patches; differentiable."""
        window = neighbourhood(patches, RADIUS_UM, STEPS, of)
        index = torch.from_numpy(window.index)
        rings = radial_basis(window.offset_um)
        # Index -1 is the last token, which stands for no patch.
        corrected: Tensor = self.network(tokens[torch.from_numpy(of)], tokens[index], index >= 0, rings)
        return corrected

    def predict(self, patches: Patches) -> Floats:
        """Return corrections to the patterns of every patch, ``(n_patches, n_patterns)``."""
        tokens, corrections = self.tokeniser(patches), []
        with torch.inference_mode():
            for start in range(0, len(patches), _CHUNK):
                of = np.arange(start, min(start + _CHUNK, len(patches)))
                corrections.append(self.correct(patches, tokens, of).numpy())
        empty: NDArray[np.float32] = np.zeros((0, self.network.out.out_features), np.float32)
        return np.concatenate([empty, *corrections]).astype(np.float64)

    def state(self) -> State:
        """Return all arrays."""
        arrays: State = {f"attention.{k}": v.numpy() for k, v in self.network.state_dict().items()}
        return {**arrays, **{f"tokens.{k}": v for k, v in self.tokeniser.affine.state().items()}}

    @classmethod
    def from_state(cls, state: State) -> Self:
        """Rebuild."""
        weights = {
            name.removeprefix("attention."): torch.from_numpy(np.array(array))
            for name, array in state.items()
            if name.startswith("attention.")
        }
        with torch.random.fork_rng(devices=[]):
            network = WindowAttention(len(weights["out.bias"]))
        network.load_state_dict(weights)
        return cls(Tokeniser(Affine(state["tokens.weight"], state["tokens.offset"])), network.eval())
