"""Whole-slide images: open any of them, read pixels at any mpp, and recognise one by its fingerprint.

`open_slide` picks a reader from ``readers`` (or from another package); `sample_sheet` lists the slides of a run. This
folder decides nothing about tissue or grids beyond reading patches, and writes nothing but its download cache.

May use: errors, extensions, names, location, grid, blocks.
"""
