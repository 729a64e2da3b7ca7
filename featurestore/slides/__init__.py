"""Whole-slide images: open any of them, read pixels at any mpp, and tell one from another.

`open_slide` picks a reader; `sample_sheet` says which slides there are. This folder decides nothing about
tissue or grids beyond reading the patches it is asked for, and writes nothing but its download cache.

May use: errors, names, location, grid, blocks.
"""
