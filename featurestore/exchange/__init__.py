"""Embeddings of other tools in, ours out: TRIDENT and CLAM ``.h5``, raw2features ``.embeddings.zarr``.

May use: everything in `featurestore` but `analysis`.
"""
