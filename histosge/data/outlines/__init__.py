"""Outlines of cells that other tools have drawn, in level-0 pixels of a slide, read batch by batch.

It reads no slide and no map. What a cell's expression is, `histosge.exporting.cell_table` computes.
"""
