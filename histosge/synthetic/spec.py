"""What a synthetic section is made from: one frozen value, the same value gives the same section."""

from dataclasses import asdict, dataclass

from histosge.synthetic.tissue_types import TISSUE_TYPES

SMALLEST_PX = 256


@dataclass(frozen=True)
class SyntheticSpec:
    """Everything that decides a synthetic section.

    Parameters
    ----------
    size_px
        ``(width, height)`` at level 0. The sides differ by default, so that swapped axes show.
    mpp
        Microns per pixel at level 0.
    seed
        Of the anatomy, the picture and the counts.
    programme_seed
        Of the gene programme: which gene follows which tissue type. Sections that share it belong together.
    morphology, gradient, noise, housekeeping
        Number of genes in each family. At least one morphology gene per tissue type.
    spot_diameter_um, spot_pitch_um
        Of the hexagonal spot lattice.
    median_depth
        Median of a spot's total counts.
    dispersion
        Squared coefficient of variation of the counts beyond Poisson.
    """

    size_px: tuple[int, int] = (8704, 8192)
    mpp: float = 0.5
    seed: int = 0
    programme_seed: int = 0
    morphology: int = 24
    gradient: int = 12
    noise: int = 12
    housekeeping: int = 12
    spot_diameter_um: float = 55.0
    spot_pitch_um: float = 100.0
    median_depth: float = 5000.0
    dispersion: float = 0.02

    def __post_init__(self) -> None:
        if min(self.size_px) < SMALLEST_PX:
            raise ValueError(
                f"a synthetic slide of {self.size_px[0]} x {self.size_px[1]} px is too small to hold tissue types; "
                f"give at least {SMALLEST_PX} px a side"
            )
        if self.morphology < len(TISSUE_TYPES):
            raise ValueError(
                f"{self.morphology} morphology genes cannot mark {len(TISSUE_TYPES)} tissue types; "
                f"give at least {len(TISSUE_TYPES)}"
            )
        if min(self.gradient, self.noise) < 0 or self.housekeeping < 1:
            raise ValueError(
                f"gene numbers are gradient {self.gradient}, noise {self.noise}, housekeeping {self.housekeeping}; "
                "give 0 or more, and at least 1 housekeeping gene, which makes rates sum to 10,000"
            )
        positive = (self.mpp, self.spot_diameter_um, self.spot_pitch_um, self.median_depth)
        if min(positive) <= 0 or self.dispersion < 0:
            raise ValueError(
                f"mpp, spot diameter, spot pitch and depth are {positive}, dispersion {self.dispersion}; "
                "give positive numbers (dispersion may be 0)"
            )

    @property
    def size_um(self) -> tuple[float, float]:
        """Return ``(width, height)`` in microns."""
        return self.size_px[0] * self.mpp, self.size_px[1] * self.mpp

    def to_json(self) -> dict[str, object]:
        """Return JSON-ready values that tell one spec from another."""
        return {**asdict(self), "size_px": list(self.size_px)}
