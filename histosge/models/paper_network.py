"""The published network (HisToSGE, arXiv 2407.20518), implemented from its equations.

One group of patches is one attention call. The module knows neither microns nor slides nor training.

    h = e + R[row] + C[col]                 R and C learned; interpolated linearly between two rows or columns
    h = h + W_o softmax(q k^T / 8) v        q, k, v = LayerNorm(h) W_{q,k,v}, 4 heads of 64, no bias
    h = h + W_2 GELU(W_1 LayerNorm(h))      width 1024
    y = ReLU(W_4 LayerNorm(ReLU(W_3 h)))    width 2048
"""

from torch import Tensor, nn
from torch.nn import functional

POSITIONS = 512
"""Rows, and columns, of the learned tables, as published."""
# As published: 4 heads of 64, whatever the embedding's length, hence the scale of 8 in the equation.
HEADS, HEAD_DIM, MLP_DIM, GENE_DIM = 4, 64, 1024, 2048


class SelfAttention(nn.Module):
    """Multi-head self-attention over the patches of a group, no bias in q, k and v."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        # One layer for the three of them: one product in place of three.
        self.qkv = nn.Linear(dim, 3 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, dim)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """Map ``(groups, patches, dim)`` to the same shape; patches where `exists` is False are not attended to."""
        n_groups, n_patches, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(n_groups, n_patches, 3, HEADS, HEAD_DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=exists[:, None, None, :])
        mixed: Tensor = self.out(attended.transpose(1, 2).reshape(n_groups, n_patches, HEADS * HEAD_DIM))
        return mixed


class PaperNetwork(nn.Module):
    """Embeddings and integer positions -> log1p(CP10k).

    Parameters
    ----------
    dim, n_genes
        Length of an embedding, and of an output.
    """

    def __init__(self, dim: int, n_genes: int) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.row = nn.Embedding(POSITIONS, dim)
        self.col = nn.Embedding(POSITIONS, dim)
        self.attention = SelfAttention(dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, MLP_DIM), nn.GELU(), nn.Linear(MLP_DIM, dim)
        )
        self.head = nn.Sequential(
            nn.Linear(dim, GENE_DIM),
            nn.ReLU(),
            nn.LayerNorm(GENE_DIM),
            nn.Linear(GENE_DIM, n_genes),
            # As published. A gene whose inputs turn negative everywhere stays at 0: on the public sections 68 to 84 of
            # 250 genes do.
            nn.ReLU(),
        )

    def forward(self, embedding: Tensor, position: Tensor, exists: Tensor) -> Tensor:
        """Predict the patches of some groups.

        Parameters
        ----------
        embedding
            ``(groups, patches, dim)``; any finite value where `exists` is False.
        position
            Row and column, 0 .. `POSITIONS` - 1, ``(groups, patches, 2)``: whole numbers (int64), or any (float32).
        exists
            ``(groups, patches)``; every group holds at least one.

        Returns
        -------
        Tensor
            ``(groups, patches, genes)``, not negative.
        """
        h = embedding + _interpolate(self.row, position[..., 0]) + _interpolate(self.col, position[..., 1])
        h = h + self.attention(h, exists)
        h = h + self.mlp(h)
        genes: Tensor = self.head(h)
        return genes


def _interpolate(table: nn.Embedding, place: Tensor) -> Tensor:
    """Look up rows of a table, interpolated linearly between two of them."""
    if not place.is_floating_point():
        whole: Tensor = table(place)
        return whole
    # 511 exactly must find a row above it: it is row 510 with a share of 1.
    low = place.floor().clamp(0, POSITIONS - 2)
    share = (place - low)[..., None]
    mixed: Tensor = table(low.long()) * (1 - share) + table(low.long() + 1) * share
    return mixed
