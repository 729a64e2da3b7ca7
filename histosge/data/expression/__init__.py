"""Measured expression of one section, in whatever layout the lab has it -> `Spots`.

One file per layout under ``layouts``; `find_expression` tries the registered ones. Only reading and refusing: choosing
genes and normalising are in `histosge.data.genes`, the comparison with the slide in `histosge.data.alignment_check`.

Terms
    frame   where positions count from: ``px`` are level-0 pixels of the slide, ``um`` microns from its
            top-left; every layout ends in the latter
    side    of a square spot (a bin); a round spot has a diameter
"""
