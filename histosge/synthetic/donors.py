"""How one donor's sections differ from another's: stain, scanner, tissue composition, expression, depth.

All sections of a cohort share one gene programme (`programme`); a donor changes it and the picture by the draws below,
N(s) being normal with mean 0 and standard deviation s, U(a, b) uniform. The spreads were chosen before any model was scored
on them, so that donors differ visibly in stain and by about as much as tissues do in expression; they are not measured.

    stain        density of haematoxylin and eosin    x exp(N(STAIN_SD)) each
                 hue: density of a dye in R, G, B     x U(1 - HUE, 1 + HUE) each
    scanner      light through glass in R, G, B       x U(1 - LAMP, 1) each, then value = 255 (light / 255)^gamma,
                                                      gamma = exp(N(GAMMA_SD))
    composition  area that a tissue claims            x exp(N(SHARE_SD)) for tumour, fat, gland, immune; all four
                                                      together at most 0.9 of the section
    expression   rate of gene g in tissue t           x exp(a_g + b_gt), a_g = N(GENE_SD), b_gt = N(TISSUE_SD)
                 rate of gradient and noise gene g    x exp(-|N(GENE_SD)|)
    depth        median counts of a spot              x exp(N(DEPTH_SD))

Morphology genes are scaled down together where their sum exceeds what is set aside for them, so that rates still sum to
10,000. a_g is a batch's or a patient's level of a gene, which no picture shows; b_gt is another programme of a tissue, which
nobody can predict from other donors. Anatomy and counts are drawn by the section's own seed, as without donors.
"""

from dataclasses import replace

import numpy as np

from histosge.synthetic.spec import Donor, SyntheticSpec

STAIN_SD = 0.25
HUE = 0.10
LAMP = 0.08
GAMMA_SD = 0.10
SHARE_SD = 0.40
GENE_SD = 0.50
TISSUE_SD = 0.25
DEPTH_SD = 0.40

N_TISSUES = 6
_PURPOSE = 11
"""Of the random numbers: see `SyntheticSpec.rng`."""


def draw_donor(spec: SyntheticSpec, number: int) -> Donor:
    """Draw the donor of that number in a cohort; another `programme_seed` is another cohort.

    Parameters
    ----------
    spec
        Its `programme_seed` and `genes` decide the draws, together with `number`.
    """
    rng = np.random.default_rng([spec.programme_seed, _PURPOSE, number])
    genes = spec.genes
    # In a fixed order: another number of genes changes none of the draws before them.
    return Donor(
        stain=_floats(np.exp(STAIN_SD * rng.standard_normal(2))),
        hue=tuple(_floats(row) for row in rng.uniform(1 - HUE, 1 + HUE, (2, 3))),
        lamp=_floats(rng.uniform(1 - LAMP, 1, 3)),
        gamma=float(np.exp(GAMMA_SD * rng.standard_normal())),
        shares=_floats(np.exp(SHARE_SD * rng.standard_normal(4))),
        depth=float(np.exp(DEPTH_SD * rng.standard_normal())),
        levels=tuple(
            _floats(row)
            for row in np.exp(
                GENE_SD * rng.standard_normal((genes.morphology, 1))
                + TISSUE_SD * rng.standard_normal((genes.morphology, N_TISSUES))
            )
        ),
        other_levels=_floats(np.exp(-np.abs(GENE_SD * rng.standard_normal(genes.gradient + genes.noise)))),
    )


def of_donor(spec: SyntheticSpec, number: int) -> SyntheticSpec:
    """Return a section's spec with the donor of that number."""
    donor = draw_donor(spec, number)
    return replace(spec, donor=donor, median_counts=spec.median_counts * donor.depth)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    # Plain numbers: the spec is compared as JSON.
    return tuple(float(value) for value in values)
