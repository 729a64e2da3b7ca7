"""The network of the preset `attention`: a transformer over the patches of a block and its halo.

    x_p  = T z_p                                            z: standardised embedding of a patch; once per patch and block
                                                            T = U W while it is trained, see `histosge.models.whitening`
    x_p += O sum_n softmax_n(q_p k_n' / sqrt(d) + b(|p - n|)) v_n      n: tissue patches within the layer's radius, per head
    x_p += M2 gelu(M1 norm(x_p))
    r_p  = sd * (axes P norm(x_p) + G norm(x_p))            per gene; P and G are zero at the start, so r = 0

q, k and v are of ``norm(x)`` (pre-norm). Positions enter by distance alone, in microns: b is a sum of Gaussian basis
functions of it, per layer and head. So a block that is flipped or rotated gives the same values, without augmentation,
and a model can be used on another slide. A patch without tissue is no neighbour.

The two ways to compute a layer give the same values: neighbours gathered into windows (a CPU: work grows with the
neighbours), and `scaled_dot_product_attention` over all pairs with a mask (a GPU: work grows with the square of the
block, in few large products).

Terms
    plan    which patches each layer computes: the last one those asked for, each earlier one their neighbours, too
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from histosge.models.linear_algebra import Floats, Indices
from histosge.models.whitening import Whitening

MAX_STEPS = 6
"""Positions between a patch and the edge of its neighbourhood, at most. On a finer grid only every second, third ...
patch is a neighbour: all of those within 256 um would be 1,000 patches on a grid of tokens 14 um apart."""
BASIS = 7
"""Gaussian basis functions of the distance, evenly from 0 to the radius; as wide as they are apart."""
MLP_FACTOR = 2


@dataclass(frozen=True)
class NetworkShape:
    """Sizes of a network.

    Parameters
    ----------
    dim
        Numbers of an embedding.
    n_genes, n_patterns
        Of the output, and of the low-rank part of its head.
    width, heads
        Of each layer; `width` is a multiple of `heads`.
    radii_um
        Of each layer's neighbourhood.
    dropout, feature_dropout
        Shares that are zeroed in training: of each layer's output; and of the embedding's features, the same ones in a
        whole block.
    """

    dim: int
    n_genes: int
    n_patterns: int
    width: int = 64
    heads: int = 4
    radii_um: tuple[float, ...] = (256.0, 256.0)
    dropout: float = 0.1
    feature_dropout: float = 0.1

    @property
    def halo_um(self) -> float:
        """Return how far from a patch its prediction looks."""
        return float(sum(self.radii_um))


class LayerPlan(NamedTuple):
    """What one layer computes.

    Parameters
    ----------
    own
        Of each output, its index among the inputs, ``(n_out,)``.
    neighbours
        Of each output, its neighbours among the inputs, ``(n_out, n_offsets)``; -1 where there is no tissue.
    distance_um
        Of each offset, ``(n_offsets,)``.
    rows, cols
        Grid positions of the inputs, ``(n_in,)``.
    stride_um, radius_um, step
        The grid's; the neighbourhood's radius; and the step between neighbours, in patches.
    """

    own: Tensor
    neighbours: Tensor
    distance_um: Tensor
    rows: Tensor
    cols: Tensor
    stride_um: float
    radius_um: float
    step: int

    def to(self, device: torch.device) -> Self:
        """Move the tensors."""
        return self._replace(
            own=self.own.to(device),
            neighbours=self.neighbours.to(device),
            distance_um=self.distance_um.to(device),
            rows=self.rows.to(device),
            cols=self.cols.to(device),
        )


class BlockPlan(NamedTuple):
    """All layers of a block.

    Parameters
    ----------
    needed
        Indices of the patches whose tokens the first layer takes, ``(n_needed,)``.
    layers
        From the first to the last.
    """

    needed: Indices
    layers: tuple[LayerPlan, ...]

    def to(self, device: torch.device) -> "BlockPlan":
        """Move the tensors."""
        if device.type == "cpu":
            return self
        return BlockPlan(self.needed, tuple(layer.to(device) for layer in self.layers))

    def take(self, outputs: Tensor) -> tuple["BlockPlan", Tensor]:
        """Return the plan of some outputs, and which of the tokens it takes, as indices among those of this plan."""
        layers = []
        for layer in reversed(self.layers):
            neighbours = layer.neighbours[outputs]
            # A patch is its own neighbour, so these are all inputs.
            inputs = torch.unique(neighbours[neighbours >= 0])
            # Index -1, no patch, finds the last entry, which stays -1.
            place = torch.full((len(layer.rows) + 1,), -1)
            place[inputs] = torch.arange(len(inputs))
            layers.append(
                layer._replace(
                    own=place[layer.own[outputs]],
                    neighbours=place[neighbours],
                    rows=layer.rows[inputs],
                    cols=layer.cols[inputs],
                )
            )
            outputs = inputs
        return BlockPlan(self.needed[outputs.numpy()], tuple(reversed(layers))), outputs


def plan_layers(
    rows: Indices, cols: Indices, stride_um: float, radii_um: Sequence[float], of: Indices
) -> BlockPlan:
    """Find the neighbours in every layer of the patches `of`.

    Parameters
    ----------
    rows, cols
        Grid positions of all patches at hand, ``(n_patches,)``.
    """
    # A raster of indices: looking up a neighbour is one step of arithmetic.
    first_row, first_col = int(rows.min(initial=0)), int(cols.min(initial=0))
    reach = max((_offsets(radius, stride_um)[2] for radius in radii_um), default=0)
    height = int(rows.max(initial=0)) - first_row + 1 + 2 * reach
    width = int(cols.max(initial=0)) - first_col + 1 + 2 * reach
    raster = np.full(height * width, -1, np.int64)
    flat = (rows - first_row + reach) * width + (cols - first_col + reach)
    raster[flat] = np.arange(len(rows))
    outputs, layers = np.asarray(of, np.int64), []
    for radius in reversed(radii_um):
        offsets, step, _ = _offsets(radius, stride_um)
        index = raster[flat[outputs][:, None] + offsets[:, 0] * width + offsets[:, 1]]
        inputs = np.unique(index[index >= 0])
        place = np.full(
            len(rows) + 1, -1, np.int64
        )  # index -1, no patch, finds the last entry, which stays -1
        place[inputs] = np.arange(len(inputs))
        layers.append(
            LayerPlan(
                torch.from_numpy(place[outputs]),
                torch.from_numpy(place[index]),
                torch.from_numpy((np.hypot(*offsets.T) * stride_um).astype(np.float32)),
                torch.from_numpy(rows[inputs]),
                torch.from_numpy(cols[inputs]),
                stride_um,
                radius,
                step,
            )
        )
        outputs = inputs
    return BlockPlan(outputs, tuple(reversed(layers)))


def _offsets(radius_um: float, stride_um: float) -> tuple[Indices, int, int]:
    """Return ``(d_row, d_col)`` of all neighbours, the patch itself among them; the step; and the largest offset."""
    # The tolerance lets a radius of 4 x 56 / 56 be 4 steps whatever the rounding of the stride.
    step = max(1, int(np.ceil(radius_um / MAX_STEPS / stride_um - 1e-6)))
    reach = int(np.floor(radius_um / (step * stride_um) + 1e-6))
    along = np.arange(-reach, reach + 1) * step
    d_row, d_col = (axis.ravel() for axis in np.meshgrid(along, along, indexing="ij"))
    near = np.hypot(d_row, d_col) * stride_um <= radius_um * (1 + 1e-6)
    return np.stack([d_row, d_col], axis=1)[near].astype(np.int64), step, reach * step


class Layer(nn.Module):
    """One pre-norm layer: attention within a radius, then an MLP, both with a residual connection."""

    def __init__(self, width: int, heads: int, radius_um: float, dropout: float) -> None:
        super().__init__()
        self.heads, self.radius_um = heads, radius_um
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.distance = nn.Parameter(torch.zeros(heads, BASIS))
        self.mlp = nn.Sequential(
            nn.Linear(width, MLP_FACTOR * width), nn.GELU(), nn.Linear(MLP_FACTOR * width, width)
        )
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, plan: LayerPlan, *, pairs: bool) -> Tensor:
        """Map inputs ``(n_in, width)`` to outputs ``(n_out, width)``.

        Parameters
        ----------
        pairs
            Attend over all pairs with a mask, in place of gathered neighbours.
        """
        normed, own = self.norm(x), functional.embedding(plan.own, x)
        query = self.query(functional.embedding(plan.own, normed))
        attend = self._over_pairs if pairs else self._over_windows
        x = own + self.drop(self.out(attend(query, self.key_value(normed), plan)))
        added: Tensor = x + self.drop(self.mlp(self.mlp_norm(x)))
        return added

    def _bias(self, distance_um: Tensor) -> Tensor:
        """Return what is added to the logits at some distances, ``(*distance.shape, heads)``."""
        apart = self.radius_um / (BASIS - 1)
        centres = torch.arange(BASIS, device=distance_um.device) * apart
        basis = torch.exp(-(((distance_um[..., None] - centres) / apart) ** 2) / 2)
        bias: Tensor = basis.to(self.distance.dtype) @ self.distance.T
        return bias

    def _over_windows(self, query: Tensor, key_value: Tensor, plan: LayerPlan) -> Tensor:
        n, width = query.shape
        # `embedding` is a look-up whose gradients are added in a fixed order: the same bits every time.
        at = plan.neighbours.clamp(min=0)
        key, value = (
            functional.embedding(at, part).reshape(n, -1, self.heads, width // self.heads)
            for part in (key_value[:, :width], key_value[:, width:])
        )
        logits = (key * query.reshape(n, 1, self.heads, -1)).sum(dim=-1) / (width // self.heads) ** 0.5
        logits = logits + self._bias(plan.distance_um)
        weight = logits.masked_fill((plan.neighbours < 0)[..., None], -torch.inf).softmax(dim=1)
        attended: Tensor = (weight[..., None] * value).sum(dim=1).reshape(n, width)
        return attended

    def _over_pairs(self, query: Tensor, key_value: Tensor, plan: LayerPlan) -> Tensor:
        n, width = query.shape
        d_row = (plan.rows[plan.own][:, None] - plan.rows).abs()
        d_col = (plan.cols[plan.own][:, None] - plan.cols).abs()
        distance = torch.hypot(d_row.float(), d_col.float()) * plan.stride_um
        is_near = distance <= plan.radius_um * (1 + 1e-6)
        is_near &= (d_row % plan.step == 0) & (d_col % plan.step == 0)
        bias = self._bias(distance).masked_fill(~is_near[..., None], -torch.inf).permute(2, 0, 1)
        key, value = key_value.reshape(len(key_value), 2, self.heads, -1).permute(1, 2, 0, 3)
        q = query.reshape(n, self.heads, -1).transpose(0, 1)
        mixed = functional.scaled_dot_product_attention(
            q[None], key[None], value[None], attn_mask=bias[None].to(q.dtype)
        )
        attended: Tensor = mixed[0].transpose(0, 1).reshape(n, width)
        return attended


class BlockNetwork(nn.Module):
    """Embeddings of a block and its halo -> what is added to the log-expression of some of its patches.

    Parameters
    ----------
    shape
        Sizes.
    axes, sd
        Patterns of the genes, ``(n_genes, n_patterns)``, and the genes' standard deviations, ``(n_genes,)``: see
        `histosge.models.low_rank_targets`. They are not trained.
    """

    axes: Tensor
    sd: Tensor
    whitening: Tensor | None

    def __init__(self, shape: NetworkShape, axes: Floats, sd: Floats) -> None:
        super().__init__()
        self.shape = shape
        self.tokens = nn.Linear(shape.dim, shape.width)
        self.layers = nn.ModuleList(
            Layer(shape.width, shape.heads, radius, shape.dropout) for radius in shape.radii_um
        )
        self.norm = nn.LayerNorm(shape.width)
        self.patterns = nn.Linear(shape.width, shape.n_patterns, bias=False)
        self.residual = nn.Linear(shape.width, shape.n_genes, bias=False)
        # Both, so that the model starts as the one that it is added to.
        nn.init.zeros_(self.patterns.weight)
        nn.init.zeros_(self.residual.weight)
        self.register_buffer("axes", torch.from_numpy(np.asarray(axes, np.float32)))
        self.register_buffer("sd", torch.from_numpy(np.asarray(sd, np.float32)))
        # Not saved: it is folded into the weights after the training.
        self.register_buffer("whitening", None, persistent=False)

    def whiten(self, whitening: Whitening, *, is_trained: bool) -> None:
        """Train the tokens on whitened embeddings from here on.

        Parameters
        ----------
        is_trained
            What the network computes stays as it is. Otherwise its random weights become those of whitened embeddings.
        """
        if is_trained:
            with torch.no_grad():
                self.tokens.weight.copy_(self.tokens.weight.double() @ torch.from_numpy(whitening.inverse))
        self.whitening = single(whitening.matrix)

    def fold_whitening(self) -> None:
        """Multiply the whitening into the weights; what the network computes does not change."""
        if self.whitening is None:
            return
        with torch.no_grad():
            self.tokens.weight.copy_(self.tokens.weight.double() @ self.whitening.double())
        self.whitening = None

    def forward(self, embedding: Tensor, plan: BlockPlan, *, pairs: bool | None = None) -> Tensor:
        """Return what is added to log1p(CP10k), ``(n_of, n_genes)``.

        Parameters
        ----------
        embedding
            Standardised, of the patches `BlockPlan.needed`, ``(n_needed, dim)``.
        pairs
            See `Layer.forward`; None means on a GPU.
        """
        weight = self.tokens.weight
        # On the weights, which are fewer than the numbers of a block's embeddings.
        if self.training and self.shape.feature_dropout > 0:
            weight = weight * functional.dropout(weight.new_ones(weight.shape[1]), self.shape.feature_dropout)
        if self.whitening is not None:
            # In single precision also where the layers are in bf16: small directions are differences of large weights.
            with torch.autocast(weight.device.type, enabled=False):
                weight = weight @ self.whitening
        tokens = functional.linear(embedding, weight, self.tokens.bias)
        return self.from_tokens(tokens, plan, pairs=pairs)

    def from_tokens(self, tokens: Tensor, plan: BlockPlan, *, pairs: bool | None = None) -> Tensor:
        """Return what `forward` does, from tokens ``(n_needed, width)`` that are computed already."""
        x, over_pairs = tokens, tokens.device.type != "cpu" if pairs is None else pairs
        for layer, layer_plan in zip(self.layers, plan.layers, strict=True):
            x = layer(x, layer_plan, pairs=over_pairs)
        x = self.norm(x)
        added: Tensor = (self.patterns(x) @ self.axes.T + self.residual(x)) * self.sd
        return added


def spot_prediction(
    dense_spot: Tensor, dense: Tensor, added: Tensor, overlap: tuple[Tensor, Tensor, Tensor], max_log: float
) -> Tensor:
    """Return log1p(CP10k) of spots: ``dense_spot + log1p(mean expm1(d + r)) - log1p(mean expm1(d))``.

    Rates add up under a disc, logarithms do not. With r = 0 the result is `dense_spot`, to the bit.

    Parameters
    ----------
    dense_spot
        By the linear model, ``(n_spots, n_genes)``.
    dense, added
        d and r of the patches under spots, ``(n_under, n_genes)``.
    overlap
        Spot, patch and share of each patch under a spot, ``(n_pairs,)`` each; a spot's shares sum to 1.
    max_log
        d + r counts as this at most: a step that is too long must not overflow.
    """
    spot, patch, share = overlap

    def log_mean(values: Tensor) -> Tensor:
        rates = torch.expm1(values.clamp(max=max_log))[patch] * share[:, None]
        return torch.log1p(torch.zeros_like(dense_spot).index_add(0, spot, rates))

    return dense_spot + (log_mean(dense + added) - log_mean(dense))


def single(values: NDArray[np.floating]) -> Tensor:
    """Return values as a tensor in single precision."""
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
