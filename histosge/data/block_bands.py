"""A slide's blocks, one row of blocks after another, and the embeddings pooled around its spots.

A wide halo spans many blocks: at sigma 320 µm, cut off at three sigmas, it is 17 patches of 56 µm to each side, so that
blocks read with a halo of their own would be read 4.3 times. Here rows of blocks roll through memory: each stored object
is read once, and memory holds the rows that the halo reaches, not the slide.

Terms
    band    the patches of one row of blocks (its own), and those above and below them within the halo
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.blocks import Block
from featurestore.errors import StoreError
from histosge.data.embedded_slide import EmbeddedSlide, Part, Reduce, clip_part, join_parts, read_tissue
from histosge.data.gaussian_pooling import TRUNCATE, Moment, pool_moments
from histosge.data.sections import Patches
from histosge.data.spot_overlap import find_patches

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Band:
    """One row of blocks and what lies around it.

    Parameters
    ----------
    rows
        Of patches: the band's own, from and up to.
    patches
        Its own and those within the halo.
    """

    rows: tuple[int, int]
    patches: Patches


def stream_bands(slide: EmbeddedSlide, halo_um: float, reduce: Reduce | None = None) -> Iterator[Band]:
    """Yield the bands of a slide from top to bottom; a row of blocks without tissue has none.

    Parameters
    ----------
    halo_um
        How far above and below its own rows a band reaches, microns.
    reduce
        Applied to the embeddings of each block as it is read.

    Raises
    ------
    StoreError
        If a block is not there any more.
    """
    height, n_cols = slide.array.block_shape[0], slide.stored.grid.n_cols
    halo = int(np.ceil(halo_um / slide.stored.grid.stride_um))
    blocks = dict[int, list[Block]]()
    for block in slide.stored.planned(slide.array.block_shape):
        blocks.setdefault(block.index[0], []).append(block)
    waiting, held = sorted(blocks), dict[int, list[Part]]()
    for i in sorted(blocks):
        rows = (i * height, (i + 1) * height)
        reached = (rows[0] - halo, rows[1] + halo)
        held = {k: parts for k, parts in held.items() if (k + 1) * height > reached[0]}
        while waiting and waiting[0] * height < reached[1]:
            k = waiting.pop(0)
            held[k] = [_read(slide, block, reduce) for block in blocks[k]]
        parts = [clip_part(part, reached, (0, n_cols)) for k in sorted(held) for part in held[k]]
        yield Band(rows, join_parts(slide, parts))


def _read(slide: EmbeddedSlide, block: Block, reduce: Reduce | None) -> Part:
    rows, cols, embedding = read_tissue(slide, block)
    return rows, cols, embedding if reduce is None else reduce(embedding)


@dataclass(frozen=True)
class SpotPatches:
    """Which patches lie under which spot of a section, with the patches known by their positions alone.

    Parameters
    ----------
    rows, cols
        Positions of the patches under any spot, ``(n_patches,)``.
    overlap
        ``(n_spots, n_patches)``; rows sum to 1.
    """

    rows: Indices
    cols: Indices
    overlap: sparse.csr_matrix

    @classmethod
    def from_overlap(cls, patches: Patches, overlap: sparse.csr_matrix) -> "SpotPatches":
        """Keep the patches under spots, of all patches of a section."""
        under = np.unique(overlap.indices).astype(np.int64)
        return cls(patches.rows[under], patches.cols[under], sparse.csr_matrix(overlap[:, under]))

    def in_band(self, band: Band, slide_id: str) -> tuple[Indices, Indices]:
        """Return which of these patches are a band's own, and where they stand among the band's patches.

        Raises
        ------
        StoreError
            If one of them has no embedding any more.
        """
        own = np.flatnonzero((self.rows >= band.rows[0]) & (self.rows < band.rows[1]))
        at = find_patches(band.patches, self.rows[own], self.cols[own])
        if (at < 0).any():
            raise StoreError(
                f"{int((at < 0).sum())} patches of slide {slide_id!r} cannot be read any more; the store was changed "
                "while it was read: run the same command again"
            )
        return own, at


@dataclass(frozen=True)
class PooledSpots:
    """Some spots of a section with what is pooled around them at one scale.

    Parameters
    ----------
    scale
        Index of the scale.
    spots
        Indices of the spots, ``(n,)``.
    values
        ``(n, dim)``.
    """

    scale: int
    spots: Indices
    values: Floats


def pool_spots_by_band(
    slide: EmbeddedSlide, under: SpotPatches, sigmas_um: Sequence[float]
) -> Iterator[PooledSpots]:
    """Pool the embedding around each patch by Gaussians, then over the disc of each spot, band by band.

    Each spot comes once at each scale, as soon as all patches under its disc are known.

    Parameters
    ----------
    sigmas_um
        Microns; 0 is the patches under the disc alone.
    """
    spot, patch = under.overlap.nonzero()
    # From which row of patches to which a spot reaches: one that lies in two bands waits for the second.
    last = np.zeros(under.overlap.shape[0], np.int64)
    np.maximum.at(last, spot, under.rows[patch])
    carried = [dict[int, Floats]() for _ in sigmas_um]
    for band in stream_bands(slide, TRUNCATE * max(sigmas_um)):
        own, at = under.in_band(band, slide.slide_id)
        if len(own) == 0:
            continue
        overlap = under.overlap[:, own]
        spots = np.flatnonzero(np.diff(overlap.indptr))
        overlap, whole = overlap[spots], last[spots] < band.rows[1]
        for scale, sigma_um in enumerate(sigmas_um):
            values = np.zeros((len(spots), band.patches.embedding.shape[1]))
            moment = [Moment(sigma_um, "mean")]
            for _, features, pooled in pool_moments(band.patches, moment, at, precision="float64"):
                values[:, features] = overlap @ pooled
            for place, number in enumerate(spots.tolist()):
                if number in carried[scale]:
                    values[place] += carried[scale].pop(number)
            for place in np.flatnonzero(~whole).tolist():
                carried[scale][int(spots[place])] = values[place].copy()
            yield PooledSpots(scale, spots[whole], values[whole])
