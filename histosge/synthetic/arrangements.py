"""Embeddings and expression of known truth, to test whether a model sees how patches are *arranged*.

No picture is painted: a section is a square of patches with an embedding and the rate of each gene. Two kinds of genes
are made on the same tissue. Genes of a *local* truth follow the patch's own features. Genes of a *long-range* truth also
follow nests: rings of patches with the markers A and B, 200 to 250 um from a centre.

    A nest is *mixed* or *apart*, with probability 1/2. Both have the same patches on the ring, half of them A and half B.
    Mixed: A and B alternate along the ring, A B A B ...   Apart: all A are on one half of the ring, all B on the other.

    log rate_g(p) = level_g + w_g . z_p + strength * load_g * sum over mixed nests of exp(-|p - c|^2 / (2 * 120^2 um^2))

z are smooth and white features of the patch, c a nest's centre. At the centre there is no marker: what matters lies 200
to 250 um away. The means of A and of B in any Gaussian around the centre are the same for both kinds of nest, and the
direction of the half rings is random, so no linear map of pooled features tells them apart; whether an A patch touches
a B patch does. For the control (`permuted`) the genes follow other draws of mixed and apart than the embedding shows.

    embedding = [A, B, z] + noise, turned by one random rotation that all sections share

Counts: Poisson around library * rate / 10,000; library log-normal (median 5,000, sd of the log 0.3).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from histosge.synthetic.fields import random_field

Floats = NDArray[np.float64]
RING_UM = (200.0, 250.0)
NEST_SD_UM = 120.0
NEST_APART_UM = 620.0
"""Between centres: rings do not touch."""
N_FIELDS, N_WHITE = 6, 8
"""Features of a patch that are smooth in space (correlation length 100 um), and that are not."""
NOISE = 0.3
"""Standard deviation of what is added to each number of an embedding; markers are 0 or 1, features have sd 1."""


@dataclass(frozen=True)
class ArrangementSpec:
    """A cohort.

    Parameters
    ----------
    side
        Patches along a side of a section.
    stride_um
        Between patches.
    genes
        Of each truth.
    strength
        Of mixed nests in the log rate; 0 makes the truth local.
    permuted
        Whether genes follow other draws of mixed and apart than the embedding shows.
    seed
        Of what all sections share.
    """

    side: int = 32
    stride_um: float = 56.0
    genes: int = 12
    strength: float = 1.0
    permuted: bool = False
    seed: int = 0


class Arrangement(NamedTuple):
    """One section.

    Parameters
    ----------
    rows, cols
        Grid positions, ``(n_patches,)``.
    embedding
        ``(n_patches, 2 + N_FIELDS + N_WHITE)``, float32.
    rates
        Of each gene, per 10,000 counts, ``(n_patches, n_genes)``.
    centres_um, is_mixed
        Of the nests, from the middle of patch (0, 0): ``(n_nests, 2)`` as (x, y), and ``(n_nests,)``.
    """

    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    embedding: NDArray[np.float32]
    rates: Floats
    centres_um: Floats
    is_mixed: NDArray[np.bool_]


def make_arrangement(spec: ArrangementSpec, number: int) -> Arrangement:
    """Make one section of a cohort; the same number gives the same section."""
    rng, shared = np.random.default_rng([spec.seed, number]), np.random.default_rng([spec.seed, 0, 7])
    rows, cols = (axis.ravel() for axis in np.mgrid[: spec.side, : spec.side])
    xy = np.stack([cols, rows], axis=1) * spec.stride_um
    centres = _draw_centres(spec, rng)
    is_mixed = rng.random(len(centres)) < 0.5
    followed = rng.random(len(centres)) < 0.5 if spec.permuted else is_mixed
    markers = np.zeros((len(rows), 2))
    for centre, mixed in zip(centres, is_mixed, strict=True):
        _place_ring(markers, xy - centre, mixed=bool(mixed), turn=rng.uniform(0, 2 * np.pi))
    length = 100.0 / spec.stride_um
    smooth = [random_field((spec.side, spec.side), length, rng).ravel() for _ in range(N_FIELDS)]
    features = np.column_stack([*smooth, rng.standard_normal((len(rows), N_WHITE))])
    signal = np.zeros(len(rows))
    for centre in centres[followed]:
        signal += np.exp(-((xy - centre) ** 2).sum(axis=1) / (2 * NEST_SD_UM**2))
    level = np.log(shared.uniform(20, 60, spec.genes))
    weight = shared.standard_normal((features.shape[1], spec.genes)) * 0.1
    load = shared.uniform(0.6, 1.4, spec.genes) * shared.choice([-1, 1], spec.genes)
    rates = np.exp(level + features @ weight + spec.strength * signal[:, None] * load)
    values = np.column_stack([markers, features])
    values += NOISE * rng.standard_normal(values.shape)
    rotation = np.linalg.qr(shared.standard_normal((values.shape[1], values.shape[1])))[0]
    return Arrangement(rows, cols, (values @ rotation).astype(np.float32), rates, centres, is_mixed)


def _draw_centres(spec: ArrangementSpec, rng: np.random.Generator) -> Floats:
    """Draw centres until 200 draws in a row have found no room."""
    size, edge = (spec.side - 1) * spec.stride_um, RING_UM[1]
    found: list[Floats] = []
    failed = 0
    while failed < 200:
        centre = rng.uniform(edge, size - edge, 2)
        if all(np.hypot(*(centre - other)) >= NEST_APART_UM for other in found):
            found.append(centre)
            failed = 0
        else:
            failed += 1
    return np.array(found)


def _place_ring(markers: Floats, from_centre: Floats, *, mixed: bool, turn: float) -> None:
    """Mark the patches of one ring, A in the first column and B in the second; as many of each, but for one."""
    distance = np.hypot(*from_centre.T)
    ring = np.flatnonzero((distance >= RING_UM[0]) & (distance <= RING_UM[1]))
    angle = (np.arctan2(from_centre[ring, 1], from_centre[ring, 0]) - turn) % (2 * np.pi)
    ring = ring[np.argsort(angle)]
    rank = np.arange(len(ring))
    kind = rank % 2 if mixed else rank * 2 // len(ring)
    markers[ring, kind] = 1


def draw_counts(rates: Floats, rng: np.random.Generator) -> tuple[NDArray[np.int64], Floats]:
    """Draw counts of spots, ``(n_spots, n_genes)``, and their library sizes, ``(n_spots,)``.

    Parameters
    ----------
    rates
        Mean rates under each spot, per 10,000 counts, ``(n_spots, n_genes)``.
    """
    library = 5000 * np.exp(0.3 * rng.standard_normal(len(rates)))
    return rng.poisson(rates / 1e4 * library[:, None]), library
