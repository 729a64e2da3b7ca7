"""Tissue as somebody else has outlined it: the whole area of a mask or annotation file, whatever the pixels show."""

import numpy as np
from numpy.typing import NDArray

from featurestore.tissue.overview import Overview
from featurestore.tissue.tissue_method import TissueMethod


def _mask(overview: Overview) -> NDArray[np.bool_]:
    # What the file leaves out is taken off by the survey, as it is for every method with --within.
    return np.ones(overview.rgb.shape[:2], bool)


RECORD = TissueMethod(
    "mask",
    "the area of a file: the sheet's column mask, or --mask DIR (PNG, TIFF, GeoJSON)",
    _mask,
    needs_region=True,
)
