"""The values that models and evaluation work on: patches in memory, spots, and the overlap between them.

Terms
    patches   the tissue patches of one slide (or of one part of it), with their embeddings
    spots     measured locations with counts
    overlap   (n_spots, n_patches) weights: which patches lie under which spot's disc, rows sum to 1
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.grid import PatchGrid


@dataclass(frozen=True)
class Patches:
    """Embedded tissue patches of one slide, in memory.

    Parameters
    ----------
    slide_id
        Whose they are.
    rows, cols
        Grid positions, shape ``(n_patches,)`` each. Positions may be missing (background).
    embedding
        Shape ``(n_patches, dim)``, float32, without NaN.
    stride_um, patch_um
        The grid's step, and the side of a patch, in microns.
    origin_um
        Corner ``(x, y)`` of patch (0, 0), from the slide's top-left.
    token_um
        On a grid of tokens, the distance from which on two patches share no pixel, see
        `featurestore.grid.PatchGrid.receptive_um`; None where that is `patch_um`.
    tissue_share
        Share of each patch that is tissue, 0 to 1, ``(n_patches,)``, float32; None where it is not known, which counts
        as 1. Neighbourhoods are pooled with it as weight.
    """

    slide_id: str
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    embedding: NDArray[np.float32]
    stride_um: float
    patch_um: float
    origin_um: tuple[float, float] = (0.0, 0.0)
    token_um: float | None = None
    tissue_share: NDArray[np.float32] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def on_grid(
        cls,
        slide_id: str,
        grid: PatchGrid,
        rows: NDArray[np.int64],
        cols: NDArray[np.int64],
        embedding: NDArray[np.float32],
        tissue_share: NDArray[np.float32] | None = None,
    ) -> "Patches":
        """Return patches of a grid."""
        token_um = grid.receptive_um if grid.encoded is not grid else None
        return cls(
            slide_id,
            rows,
            cols,
            embedding,
            grid.stride_um,
            grid.patch_um,
            grid.origin_um,
            token_um,
            tissue_share,
        )

    @property
    def receptive_um(self) -> float:
        """Distance along an axis from which on two patches share no pixel, in microns."""
        return self.patch_um if self.token_um is None else self.token_um

    @property
    def xy_um(self) -> NDArray[np.float64]:
        """Patch centres ``(x, y)`` in microns from the slide's top-left, shape ``(n_patches, 2)``."""
        # The first patch starts at the origin, so its centre is half a patch further, whatever the stride.
        steps = np.stack([self.cols, self.rows], axis=1).astype(np.float64)
        return np.asarray(steps * self.stride_um + self.patch_um / 2 + self.origin_um)

    def take(self, index: NDArray[np.generic]) -> "Patches":
        """Return some of the patches, by a mask or by indices."""
        share = None if self.tissue_share is None else self.tissue_share[index]
        rows, cols, embedding = self.rows[index], self.cols[index], self.embedding[index]
        return replace(self, rows=rows, cols=cols, embedding=embedding, tissue_share=share)

    def with_embedding(self, embedding: NDArray[np.float32]) -> "Patches":
        """Return the same patches carrying other vectors."""
        return replace(self, embedding=embedding)


@dataclass(frozen=True)
class Spots:
    """Measured locations of one section.

    Parameters
    ----------
    slide_id, donor
        Which slide they lie on, and whose tissue it is.
    barcodes
        Shape ``(n_spots,)``.
    xy_um
        Spot centres ``(x, y)`` in microns from the slide's top-left, shape ``(n_spots, 2)``.
    diameter_um
        Of one spot's disc; the side, where spots are squares.
    counts
        Raw counts, sparse, shape ``(n_spots, n_genes)``.
    genes
        Names of the columns of `counts`.
    shape
        Of a spot: ``disc`` or ``square`` (a bin).
    """

    slide_id: str
    donor: str
    barcodes: NDArray[np.str_]
    xy_um: NDArray[np.float64]
    diameter_um: float
    counts: sparse.csr_matrix
    genes: tuple[str, ...]
    shape: str = "disc"

    def __len__(self) -> int:
        return len(self.barcodes)


@dataclass(frozen=True)
class StainPairs:
    """Some of a slide's patches, encoded as they are and in other stains.

    Parameters
    ----------
    plain
        ``(n_patches, dim)``, float32.
    stained
        The same patches, ``(n_stains, n_patches, dim)``, float32.
    """

    plain: NDArray[np.float32]
    stained: NDArray[np.float32]


@dataclass(frozen=True)
class TrainingSection:
    """One section, ready for a model: patches, the spots to learn from, and their targets.

    Parameters
    ----------
    patches
        All tissue patches of the slide.
    overlap
        Sparse ``(n_spots, n_patches)``; each row sums to 1.
    spot_xy_um
        Spot centres, shape ``(n_spots, 2)``.
    target
        log1p(CP10k) of the chosen genes, shape ``(n_spots, n_genes)``, float32.
    library
        Total counts of each spot, shape ``(n_spots,)``; None where they are not known.
    stain_pairs
        How embeddings move when the stain changes; None where that was not measured.
    donor
        Whose tissue it is; the slide's id where no donor is named, empty where it is not known.
    """

    patches: Patches
    overlap: sparse.csr_matrix
    spot_xy_um: NDArray[np.float64]
    target: NDArray[np.float32]
    library: NDArray[np.float64] | None = None
    stain_pairs: StainPairs | None = None
    donor: str = ""

    def subset(self, keep: NDArray[np.bool_]) -> "TrainingSection":
        """Return the section with only some of its spots."""
        # All patches stay: models look at what lies around a spot, and patches carry no counts.
        library = None if self.library is None else self.library[keep]
        return replace(
            self,
            overlap=self.overlap[keep],
            spot_xy_um=self.spot_xy_um[keep],
            target=self.target[keep],
            library=library,
        )


@dataclass(frozen=True)
class Section:
    """One slide with its measured expression, ready to be split, trained on and scored.

    Only usable spots are left: enough counts, and tissue patches under their disc.

    Parameters
    ----------
    patches
        All tissue patches of the slide.
    spots
        The usable spots, with raw counts of all genes.
    overlap
        Sparse ``(n_spots, n_patches)``; each row sums to 1.
    thumbnail
        Mean colour of every patch of the grid, ``(n_rows, n_cols, 3)``, uint8.
    """

    patches: Patches
    spots: Spots
    overlap: sparse.csr_matrix
    thumbnail: NDArray[np.uint8]

    @property
    def slide_id(self) -> str:
        """Which slide this is."""
        return self.patches.slide_id
