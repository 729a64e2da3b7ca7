"""Slides to embeddings: planning, one task per block, in this process or on dask workers.

May use: everything in `featurestore` but `analysis` and `exchange`.
"""
