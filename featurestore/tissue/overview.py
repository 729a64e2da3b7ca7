"""The whole slide at a coarse scale: what a tissue method looks at."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from featurestore.slides.protocol import Slide

# The mask's lengths are tens of microns, so finer pixels would add time and nothing to see. A grid records the value.
OVERVIEW_MPP = 8.0
"""Microns per pixel: a slide of 10 cm2 is 16 megapixels."""
STRIP_PX = 256
"""Rows of the overview read at once: a slide without a coarse level is averaged down from its finest one."""


@dataclass(frozen=True)
class Overview:
    """A whole slide, coarsely.

    Parameters
    ----------
    rgb
        Shape ``(height, width, 3)``.
    mpp
        Microns per pixel of `rgb`; its pixel (0, 0) lies at pixel (0, 0) of the slide.
    slide
        The slide itself, open: for methods that read finer pixels or look for a file beside it.
    """

    rgb: NDArray[np.uint8]
    mpp: float
    slide: Slide


def read_overview(slide: Slide, mpp: float = OVERVIEW_MPP) -> Overview:
    """Read a whole slide coarsely, in strips.

    Parameters
    ----------
    mpp
        Microns per pixel; the slide's own are taken where they are coarser.
    """
    mpp = max(mpp, slide.mpp)
    # A pixel that the slide's edge cuts counts; the 1e-6 is for sizes that are whole but for a float's last bits.
    width, height = (max(1, int(np.ceil(side * slide.mpp / mpp - 1e-6))) for side in slide.size_px)
    parts = [
        slide.read_region(0, top, width, min(STRIP_PX, height - top), mpp)
        for top in range(0, height, STRIP_PX)
    ]
    return Overview(np.concatenate(parts), mpp, slide)
