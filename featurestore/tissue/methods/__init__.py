"""One file per way of telling tissue from glass, each with its ``RECORD``; the registry reads this folder.

May use: `featurestore.tissue.overview` and `featurestore.tissue.tissue_method`.
"""
