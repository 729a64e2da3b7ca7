"""The tissue types of a synthetic section: how common, how stained, which nuclei. Data alone.

Terms
    optical density   of one stain, before the stain's colour: 0 is glass, 1 is dark
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TissueType:
    """One tissue type.

    Parameters
    ----------
    name
        As in the truth's documentation.
    share
        Of the section's tissue area.
    eosin, haematoxylin
        Optical density between nuclei.
    fibres, mottle
        How strongly fibre and cytoplasm textures modulate the eosin, as standard deviations of a share.
    nuclei_per_mm2
        How dense its nuclei lie; in fat, before those that no wall carries are dropped.
    nucleus_um
        Semi-axes ``(long, short)`` of a nucleus.
    nucleus_od
        Haematoxylin optical density within a nucleus.
    vesicular
        How pale the middle of a nucleus is, 0..1.
    """

    name: str
    share: float
    eosin: float
    haematoxylin: float
    fibres: float
    mottle: float
    nuclei_per_mm2: float
    nucleus_um: tuple[float, float]
    nucleus_od: float
    vesicular: float


TISSUE_TYPES = (
    TissueType("tumour", 0.33, 0.36, 0.20, 0.06, 0.22, 5200, (6.2, 4.8), 0.78, 0.45),
    TissueType("stroma", 0.28, 0.42, 0.03, 0.42, 0.10, 1500, (7.5, 1.7), 0.80, 0.0),
    TissueType("immune", 0.12, 0.20, 0.16, 0.08, 0.20, 13500, (3.3, 3.0), 1.05, 0.1),
    TissueType("glands", 0.15, 0.32, 0.05, 0.30, 0.12, 2200, (4.0, 2.4), 0.90, 0.1),
    TissueType("fat", 0.12, 0.02, 0.0, 0.0, 0.0, 1000, (4.5, 1.5), 0.85, 0.0),
)
"""The label of a tissue type in a truth is its place here plus 1; 0 is background."""
STROMA, GLANDS, FAT = 1, 3, 4
"""Places of the types that have a drawing of their own."""
