"""Measured expression of one section, in whatever layout the lab has it -> `Spots`.

One file per layout; `reading` recognises which. Only reading and refusing: choosing genes and
normalising are in `histosge.data.genes`, the fit to the slide in `histosge.data.alignment_check`.

Terms
    frame   where positions count from: ``px`` are level-0 pixels of the slide, ``um`` microns from its
            top-left; every reader ends in the latter
    side    of a square spot (a bin); a round spot has a diameter
"""

from histosge.data.expression.find_expression import find_expression, read_expression
from histosge.data.expression.loaded_expression import VISIUM_SPOT_UM

__all__ = ["VISIUM_SPOT_UM", "find_expression", "read_expression"]
