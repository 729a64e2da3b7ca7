"""Which gene does what where: expression rates from an anatomy. Draws no pixel.

Rates are compositions: at every tissue position they sum to `TOTAL`, and the families' shares of it are set so
that no family leaks into another. Morphology genes sum to the same in every tissue type; gradient and noise genes
do not correlate with the tissue types; housekeeping genes take what is left.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from histosge.synthetic.anatomy import Anatomy
from histosge.synthetic.fields import LATTICE_UM, centres_um, smooth_noise
from histosge.synthetic.spec import SyntheticSpec
from histosge.synthetic.tissue_types import TISSUE_TYPES
from histosge.synthetic.truth import Truth

TOTAL = 1e4
MORPHOLOGY_SHARE, GRADIENT_SHARE, NOISE_SHARE = 0.35, 0.20, 0.15
SWING = 0.8
"""How far gradient and noise genes go from their mean; below 0.85 housekeeping genes stay positive."""
NOISE_UM = 16.0
"""Standard deviation of the Gaussian that smooths noise genes: well under one spot's pitch."""


@dataclass(frozen=True)
class Programme:
    """The part of the truth that sections of one cohort share.

    Parameters
    ----------
    families
        Family -> gene names.
    profiles
        CP10k of each morphology gene in each tissue type, ``(n_types, n_morphology)``.
    means
        Family -> mean CP10k of its genes; for housekeeping genes their weights, which sum to 1.
    """

    families: dict[str, tuple[str, ...]]
    profiles: NDArray[np.float64]
    means: dict[str, NDArray[np.float64]]


def make_programme(spec: SyntheticSpec) -> Programme:
    """Draw a gene programme; it depends on `programme_seed` and the gene numbers alone."""
    rng = np.random.default_rng([spec.programme_seed, 2])
    counts = {
        "morphology": ("MORPH", spec.morphology),
        "gradient": ("GRAD", spec.gradient),
        "noise": ("NOISE", spec.noise),
        "housekeeping": ("HOUSE", spec.housekeeping),
    }
    families = {name: tuple(f"{stem}{i + 1:02d}" for i in range(n)) for name, (stem, n) in counts.items()}
    profiles = _profiles(rng, spec.morphology)
    means = {
        "gradient": GRADIENT_SHARE * TOTAL * _abundance(rng, spec.gradient),
        "noise": NOISE_SHARE * TOTAL * _abundance(rng, spec.noise),
        "housekeeping": _abundance(rng, spec.housekeeping),
    }
    return Programme(families, profiles, means)


def _abundance(rng: np.random.Generator, n: int) -> NDArray[np.float64]:
    """Return shares that sum to 1 and differ by about a factor of 4 between rare and common genes."""
    values = np.exp(0.7 * np.clip(rng.standard_normal(n), -2, 2))
    return np.asarray(values / max(values.sum(), 1e-12))


def _profiles(rng: np.random.Generator, n_genes: int) -> NDArray[np.float64]:
    n_types = len(TISSUE_TYPES)
    pattern = np.full((n_types, n_genes), 0.08) * np.exp(0.4 * rng.standard_normal((n_types, n_genes)))
    genes = np.arange(n_genes)
    main = genes % n_types
    pattern[main, genes] = 1.0
    # Every third gene marks two types, so that types cannot be told from single genes.
    mixed = genes[2::3]
    second = (main[mixed] + rng.integers(1, n_types, len(mixed))) % n_types
    pattern[second, mixed] = rng.uniform(0.4, 0.8, len(mixed))
    pattern *= _abundance(rng, n_genes)
    return np.asarray(MORPHOLOGY_SHARE * TOTAL * pattern / pattern.sum(axis=1, keepdims=True))


def make_truth(spec: SyntheticSpec, anatomy: Anatomy) -> Truth:
    """Evaluate the gene programme of `spec` on an anatomy."""
    programme = make_programme(spec)
    rng = np.random.default_rng([spec.seed, 3])
    tissue = anatomy.tissue
    kinds = anatomy.composition[:, tissue].astype(np.float64)
    morphology = programme.profiles.T @ kinds
    gradient = _swing(programme.means["gradient"], _gradients(rng, tissue, kinds, spec.gradient))
    noise = _swing(programme.means["noise"], _noise(rng, tissue, kinds, spec.noise))
    rest = TOTAL - morphology.sum(axis=0) - gradient.sum(axis=0) - noise.sum(axis=0)
    house = programme.means["housekeeping"][:, None] * rest
    rates = np.full((sum(map(len, programme.families.values())), *tissue.shape), np.nan, np.float32)
    rates[:, tissue] = np.concatenate([morphology, gradient, noise, house])
    y_um, x_um = (centres_um(n) for n in tissue.shape)
    genes = tuple(gene for family in programme.families.values() for gene in family)
    return Truth(rates, y_um, x_um, anatomy.label, _library(anatomy), genes, programme.families)


def _library(anatomy: Anatomy) -> NDArray[np.float32]:
    """Return the expected depth per position relative to its median: mildly more where nuclei are dense."""
    density = np.array([kind.nuclei_per_mm2 for kind in TISSUE_TYPES]) ** 0.25
    depth = np.tensordot(density, anatomy.composition, axes=1)
    depth /= np.median(depth[anatomy.tissue])
    return np.where(anatomy.tissue, depth, np.nan).astype(np.float32)


def _swing(means: NDArray[np.float64], fields: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return rates around their means, each field scaled to use the whole swing."""
    if len(fields) == 0:
        return fields
    reach = np.abs(fields).max(axis=1, keepdims=True)
    return np.asarray(means[:, None] * (1 + SWING * fields / np.maximum(reach, 1e-12)))


def _gradients(
    rng: np.random.Generator, tissue: NDArray[np.bool_], kinds: NDArray[np.float64], n: int
) -> NDArray[np.float64]:
    """Draw smooth fields that do not correlate with any tissue type, ``(n, n_tissue)``.

    Few waves cross a section, so a plain random one would follow some tissue type by chance. The coefficients
    are drawn under the condition that it does not (a Gaussian conditioned on linear equations), which leaves
    the fields smooth; subtracting the types would print their borders into them.
    """
    v, u = (np.linspace(0, np.pi, size) for size in tissue.shape)
    orders = [(i, j) for i in range(5) for j in range(5) if 0 < i + j <= 4]
    waves = np.stack([np.outer(np.cos(i * v), np.cos(j * u))[tissue] for i, j in orders])
    waves -= waves.mean(axis=1, keepdims=True)
    scale = np.array([1.0 / (i + j) ** 2 for i, j in orders])
    drawn = scale * rng.standard_normal((n, len(orders)))
    leak = waves @ (kinds - kinds.mean(axis=1, keepdims=True)).T
    weighted = scale[:, None] ** 2 * leak
    fit = np.linalg.lstsq(leak.T @ weighted, leak.T @ drawn.T, rcond=1e-8)[0]
    return np.asarray((drawn - (weighted @ fit).T) @ waves)


def _noise(
    rng: np.random.Generator, tissue: NDArray[np.bool_], kinds: NDArray[np.float64], n: int
) -> NDArray[np.float64]:
    """Draw short-range fields, freed from what they share with tissue types by chance, ``(n, n_tissue)``."""
    sigma = NOISE_UM / LATTICE_UM
    drawn = [smooth_noise(rng, tissue.shape, sigma)[tissue] for _ in range(n)]
    fields = np.array(drawn, dtype=np.float64).reshape(n, kinds.shape[1])
    fields = np.clip(fields, -2.5, 2.5)
    fit = np.linalg.lstsq(kinds.T, fields.T, rcond=None)[0]
    return np.asarray(fields - (kinds.T @ fit).T)
