"""Which gene follows what (tissue, slow fields, chance), and the rates that result.

Rates are given per 10,000 (like CP10k) and sum to 10,000 at every tissue position. Three families are
capped so that together they never reach 10,000, and the housekeeping genes take exactly what is left.
So no gene changes because another one does, except the housekeeping genes: a noise gene stays
independent of tissue also after normalisation, which it would not if rates were simply rescaled.

Terms
    morphology genes    follow the composition of tissue types, the density of nuclei, or both
    gradient genes      follow slow fields of the section, drawn independently of its tissue
    noise genes         white noise on the lattice: independent at every position, so that neither the picture
                        nor a neighbour tells them (a constant would leave the Pearson undefined). A model that
                        is given a spot's own counts still learns what lies under that spot.
    housekeeping genes  the remainder, in fixed proportions; falls where the morphology genes rise
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from histosge.synthetic.anatomy import TISSUES, Anatomy
from histosge.synthetic.fields import Field, random_field
from histosge.synthetic.spec import Donor, GeneCounts, SyntheticSpec

TOTAL = 10_000.0
N_FIELDS = 3
"""Slow fields of a section; gradient genes are mixtures of them."""
CANDIDATES = 64
"""Slow fields drawn, of which those that the tissue explains least are used."""
GRADIENT_FOLD = 6.0
NOISE_SD = 0.5
FULL_DENSITY_MM2 = 12_000.0
"""Nuclei per square millimetre at which a density gene is fully on."""


@dataclass(frozen=True)
class Programme:
    """The part of the truth that all sections share.

    Parameters
    ----------
    affinity
        Rate of each morphology gene in pure tissue of each type, ``(n_morphology, 6)``; a column sums to its
        cap at most.
    follows_density
        How much of a morphology gene depends on the density of nuclei, 0..1, ``(n_morphology,)``.
    follows_field
        How much of it depends on the first slow field, 0..1, ``(n_morphology,)``.
    loading
        Gradient genes as mixtures of the slow fields, absolute values sum to 1: ``(n_gradient, 3)``.
    share
        Of the remainder, per housekeeping gene.
    """

    affinity: NDArray[np.float64]
    follows_density: NDArray[np.float64]
    follows_field: NDArray[np.float64]
    loading: NDArray[np.float64]
    share: NDArray[np.float64]


def draw_programme(seed: int, genes: GeneCounts) -> Programme:
    """Draw what each gene follows."""
    rng = np.random.default_rng([seed, 7])
    types = len(TISSUES) - 1
    affinity = rng.uniform(0.06, 0.16, (genes.morphology, types))
    density, field = np.zeros(genes.morphology), np.zeros(genes.morphology)
    for gene in range(genes.morphology):
        turn, first = divmod(gene, types)
        second = (first + 1 + turn) % types
        affinity[gene, first] = 1.0
        if turn % 4 == 1:  # shared by two tissues
            affinity[gene, second] = rng.uniform(0.4, 0.8)
        elif turn % 4 == 2:  # everywhere, more where nuclei crowd
            affinity[gene] = rng.uniform(0.5, 1.0, types)
            density[gene] = rng.uniform(0.7, 0.95)
        elif turn % 4 == 3:  # one tissue's, and partly the gradient's
            affinity[gene, second] = rng.uniform(0.2, 0.5)
            field[gene] = 0.4
    cap = TOTAL * genes.morphology / genes.total
    # Scaled so that no tissue exceeds the cap: together the families then leave something for housekeeping genes.
    affinity *= cap / max(float(affinity.sum(axis=0).max(initial=0)), 1e-12)
    loading = rng.standard_normal((genes.gradient, N_FIELDS))
    loading /= np.abs(loading).sum(axis=1, keepdims=True)
    return Programme(affinity, density, field, loading, rng.dirichlet(np.full(genes.housekeeping, 6.0)))


def slow_fields(spec: SyntheticSpec, anatomy: Anatomy) -> Field:
    """Draw the section's slow fields, ``(3, n_tissue)``, each from -1 to 1 over the tissue.

    Of several candidates those are taken that the composition of tissues explains least: regions are few,
    so a blind draw follows one of them by chance.
    """
    rng = spec.rng(5)
    shape, tissue = anatomy.label.shape, anatomy.tissue
    known = anatomy.composition[:, tissue].T.astype(np.float64)
    # Shares sum to 1, so the matrix may be singular where a tissue is missing.
    inverse = np.linalg.pinv(known.T @ known)
    fields = []
    for _ in range(CANDIDATES):
        values = random_field(shape, min(shape) / 4.5, rng)[tissue]
        values = 2 * (values - values.min()) / max(float(np.ptp(values)), 1e-12) - 1
        fit = known @ (inverse @ (known.T @ values))
        fields.append((float(np.var(fit) / max(float(np.var(values)), 1e-12)), values))
    fields.sort(key=lambda entry: entry[0])
    return np.stack([values for _, values in fields[:N_FIELDS]]).astype(np.float32)


def rates(spec: SyntheticSpec, anatomy: Anatomy, nuclei_mm2: Field) -> NDArray[np.float32]:
    """Return every gene's rate at every tissue position, per 10,000.

    Parameters
    ----------
    nuclei_mm2
        Density of nuclei on the lattice.

    Returns
    -------
    numpy.ndarray
        Shape ``(n_genes, n_tissue)``, families in the order of `spec.FAMILIES`; columns sum to 10,000.
    """
    programme = draw_programme(spec.programme_seed, spec.genes)
    if spec.donor is not None:
        programme = _of_donor(programme, spec.donor, spec.genes)
    genes, tissue = spec.genes, anatomy.tissue
    slow = slow_fields(spec, anatomy)
    n = int(tissue.sum())
    out = np.empty((genes.total, n), np.float32)
    stops = np.cumsum([genes.morphology, genes.gradient, genes.noise])
    out[: stops[0]] = _morphology(programme, anatomy.composition[:, tissue], nuclei_mm2[tissue], slow[0])
    fold = np.log(GRADIENT_FOLD) / 2  # the fields go from -1 to 1, so the exponent spans the whole fold
    out[stops[0] : stops[1]] = TOTAL / genes.total * np.exp(fold * (programme.loading @ slow - 1))
    # Clipped and shifted to 2 standard deviations: no gene exceeds its share of the 10,000.
    white = np.clip(spec.rng(6).standard_normal((genes.noise, n), dtype=np.float32), -2, 2)
    out[stops[1] : stops[2]] = TOTAL / genes.total * np.exp(NOISE_SD * (white - 2))
    if spec.donor is not None:
        out[stops[0] : stops[2]] *= np.array(spec.donor.other_levels, np.float32)[:, None]
    left = TOTAL - out[: stops[2]].sum(axis=0, dtype=np.float64)
    out[stops[2] :] = programme.share[:, None] * left
    return out


def _of_donor(programme: Programme, donor: Donor, genes: GeneCounts) -> Programme:
    """Return the programme with a donor's levels of the morphology genes, which keep to their part of the 10,000."""
    affinity = programme.affinity * np.array(donor.levels).reshape(programme.affinity.shape)
    cap = TOTAL * genes.morphology / genes.total
    excess = float(affinity.sum(axis=0).max(initial=0)) / max(cap, 1e-12)
    return replace(programme, affinity=affinity / max(excess, 1.0))


def _morphology(
    programme: Programme, composition: Field, nuclei_mm2: Field, slow: Field
) -> NDArray[np.float64]:
    crowded = np.clip(nuclei_mm2 / FULL_DENSITY_MM2, 0, 1)
    by_density = 1 - programme.follows_density[:, None] * (1 - crowded)
    by_field = 1 - programme.follows_field[:, None] * (1 - slow) / 2
    return np.asarray(programme.affinity @ composition * by_density * by_field)
