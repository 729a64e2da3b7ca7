"""The published network (HisToSGE, arXiv 2407.20518), written anew from its equations.

One group of patches is one attention call. Nothing here knows microns, slides or training.

    h = e + R[row] + C[col]                 between two rows, or columns, their tables' linear mix
    h = h + W_o softmax(q k^T / 8) v        q, k, v = LayerNorm(h) W_{q,k,v}, 4 heads of 64, no bias
    h = h + W_2 GELU(W_1 LayerNorm(h))      width 1024
    y = ReLU(W_4 LayerNorm(ReLU(W_3 h)))    width 2048
"""

from torch import Tensor, nn
from torch.nn import functional

POSITIONS = 512
"""Rows, and columns, that the learned tables hold."""
HEADS, HEAD_DIM, MLP_DIM, GENE_DIM = 4, 64, 1024, 2048


class Attention(nn.Module):
    """Multi-head self-attention over the patches of a group, no bias in q, k and v."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * HEADS * HEAD_DIM, bias=False)
        self.out = nn.Linear(HEADS * HEAD_DIM, dim)

    def forward(self, x: Tensor, exists: Tensor) -> Tensor:
        """Map ``(groups, patches, dim)``; where `exists` is False nobody looks."""
        n_groups, n_patches, _ = x.shape
        qkv = self.qkv(self.norm(x)).view(n_groups, n_patches, 3, HEADS, HEAD_DIM)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(q, k, v, attn_mask=exists[:, None, None, :])
        mixed: Tensor = self.out(seen.transpose(1, 2).reshape(n_groups, n_patches, HEADS * HEAD_DIM))
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
        self.attention = Attention(dim)
        self.mlp = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, MLP_DIM), nn.GELU(), nn.Linear(MLP_DIM, dim)
        )
        self.head = nn.Sequential(
            nn.Linear(dim, GENE_DIM),
            nn.ReLU(),
            nn.LayerNorm(GENE_DIM),
            nn.Linear(GENE_DIM, n_genes),
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
        h = embedding + _at(self.row, position[..., 0]) + _at(self.col, position[..., 1])
        h = h + self.attention(h, exists)
        h = h + self.mlp(h)
        genes: Tensor = self.head(h)
        return genes


def _at(table: nn.Embedding, place: Tensor) -> Tensor:
    """Look up rows of a table; between two of them, mix both."""
    if not place.is_floating_point():
        whole: Tensor = table(place)
        return whole
    low = place.floor().clamp(0, POSITIONS - 2)
    share = (place - low)[..., None]
    mixed: Tensor = table(low.long()) * (1 - share) + table(low.long() + 1) * share
    return mixed
