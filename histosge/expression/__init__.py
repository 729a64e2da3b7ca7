"""Measured expression of one section, in whatever layout the lab has it -> `Spots`.

One file per layout; `reading` recognises which. Only reading and refusing: choosing genes and
normalising are in `histosge.genes`, the fit to the slide in `histosge.fit_check`.

Terms
    frame   where positions count from: ``px`` are level-0 pixels of the slide, ``um`` microns from its
            top-left; every reader ends in the latter
    side    of a square spot (a bin); a round spot has a diameter
"""

from histosge.expression.found import VISIUM_SPOT_UM
from histosge.expression.reading import find_expression, read_expression

__all__ = ["VISIUM_SPOT_UM", "find_expression", "read_expression"]
