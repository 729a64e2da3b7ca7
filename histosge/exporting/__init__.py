"""Patches with their values -> the files that other tools open: one file per format.

Expression maps and embeddings alike are a `PatchTable`; each format reads it band by band, so that memory
holds a few rows of patches and never the whole map, where the format allows.
"""
