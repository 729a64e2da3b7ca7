"""Settings of a synthetic section; nothing is drawn here.

Terms
    programme   which gene answers to which tissue: shared by all sections of a cohort
    anatomy     where which tissue lies: another for every seed
"""

import json
from dataclasses import asdict, dataclass, field

import numpy as np

from histosge.errors import ExpressionError

LATTICE_UM = 8.0
"""Step of the lattice on which the truth is known."""
MIN_SIDE_UM = 200.0
MAX_COUNTS = 1e7
FAMILIES = ("morphology", "gradient", "noise", "housekeeping")
PREFIXES = {"morphology": "MORPH", "gradient": "GRAD", "noise": "NOISE", "housekeeping": "HOUSE"}


@dataclass(frozen=True)
class GeneCounts:
    """How many genes each family holds.

    Parameters
    ----------
    morphology
        Genes whose rate follows the tissue that the slide shows.
    gradient
        Genes that change smoothly over the section, and that nothing in the picture predicts.
    noise
        Genes that neither the picture nor the neighbours predict.
    housekeeping
        Genes that take what the others leave of 10,000; at least one.
    """

    morphology: int = 24
    gradient: int = 12
    noise: int = 12
    housekeeping: int = 12

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0 or self.housekeeping < 1:
            raise ExpressionError(
                f"{self} cannot be made: counts are not negative, and one housekeeping gene or more closes the sum"
            )

    @property
    def total(self) -> int:
        """Genes in all families."""
        return sum(asdict(self).values())

    def names(self) -> dict[str, tuple[str, ...]]:
        """Return family -> gene names, in the order in which they are stored."""
        sizes = asdict(self)
        return {f: tuple(f"{PREFIXES[f]}{i + 1:02d}" for i in range(sizes[f])) for f in FAMILIES}


@dataclass(frozen=True)
class Donor:
    """What a donor changes, as factors: see `histosge.synthetic.donors`, which draws them.

    Parameters
    ----------
    stain
        Of the densities of haematoxylin and eosin.
    hue
        Of each dye's density in R, G, B.
    lamp, gamma
        Light through glass in R, G, B; and the power that the scanner applies to it.
    shares
        Of the area that tumour, fat, gland and immune tissue claim.
    depth
        Of the median counts of a spot.
    levels
        Of each morphology gene's rate in each of six tissues.
    other_levels
        Of the gradient genes' and then the noise genes' rates; at most 1.
    """

    stain: tuple[float, ...]
    hue: tuple[tuple[float, ...], ...]
    lamp: tuple[float, ...]
    gamma: float
    shares: tuple[float, ...]
    depth: float
    levels: tuple[tuple[float, ...], ...]
    other_levels: tuple[float, ...]


@dataclass(frozen=True)
class SyntheticSpec:
    """One synthetic section: the same spec gives the same pixels, counts and truth.

    Parameters
    ----------
    size_px
        The slide's ``(width, height)`` at level 0.
    mpp
        Microns per pixel at level 0, 0.1 to 2.
    seed
        Of the anatomy, the staining and the counts.
    programme_seed
        Of the gene programme: equal in all sections of a cohort.
    genes
        Genes of each family.
    spot_diameter_um, spot_pitch_um
        Of the hexagonal lattice of spots.
    median_counts
        Median library size of a spot.
    region_um
        Rough radius of a region of one tissue; smaller slides get smaller regions, so that all fit.
    donor
        Whose tissue it is; None for the one that all sections share otherwise.
    """

    size_px: tuple[int, int] = (8704, 8192)
    mpp: float = 0.5
    seed: int = 0
    programme_seed: int = 0
    genes: GeneCounts = field(default_factory=GeneCounts)
    spot_diameter_um: float = 55.0
    spot_pitch_um: float = 100.0
    median_counts: float = 5000.0
    region_um: float = 330.0
    donor: Donor | None = None

    def __post_init__(self) -> None:
        # Bad values would otherwise fail deep inside numpy, minutes later.
        whole = all(isinstance(side, int) for side in (*self.size_px, self.seed, self.programme_seed))
        if not whole or min(self.seed, self.programme_seed) < 0:
            raise ExpressionError(
                f"size_px {self.size_px}, seed {self.seed} and programme_seed {self.programme_seed} must be whole numbers, "
                "and seeds not negative"
            )
        if not 0.1 <= self.mpp <= 2 or min(self.size_px) * self.mpp < MIN_SIDE_UM:
            raise ExpressionError(
                f"a synthetic slide of {self.size_px[0]} x {self.size_px[1]} px at {self.mpp} microns per pixel cannot "
                f"be drawn: give sides of at least {MIN_SIDE_UM:g} microns at 0.1 to 2 microns per pixel"
            )
        if (
            not 0 < self.spot_diameter_um <= min(self.spot_pitch_um, min(self.size_px) * self.mpp)
            or not 0 < self.median_counts < MAX_COUNTS
            or not self.region_um > 0
        ):
            raise ExpressionError(
                f"spots of {self.spot_diameter_um:g} microns every {self.spot_pitch_um:g} with {self.median_counts:g} "
                f"counts in regions of {self.region_um:g} microns cannot be made: give positive values, and a pitch "
                "and a slide of at least the diameter"
            )

    @property
    def lattice_shape(self) -> tuple[int, int]:
        """Positions of the truth, ``(n_y, n_x)``; the last may reach beyond the slide."""
        # 1e-6: a side that is a whole number of steps must not get one more by rounding.
        width, height = (int(np.ceil(side * self.mpp / LATTICE_UM - 1e-6)) for side in self.size_px)
        return height, width

    @property
    def region_length_um(self) -> float:
        """Rough radius of a region on this slide, in microns."""
        return min(self.region_um, min(self.size_px) * self.mpp / 8)

    def rng(self, purpose: int) -> np.random.Generator:
        """Return the random numbers of one purpose: drawing more for one part changes none of the others."""
        return np.random.default_rng([self.seed, purpose])

    def to_json(self) -> str:
        """Return the spec as text that is equal for equal specs."""
        facts = asdict(self)
        # Left out where there is none, so that sections made before donors existed count as the same.
        if self.donor is None:
            del facts["donor"]
        return json.dumps(facts, sort_keys=True)
