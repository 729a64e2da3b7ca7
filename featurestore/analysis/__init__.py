"""Analysis of a whole cohort from the store: each stored block is read once a pass, and no slide is held in memory.

May use: everything in `featurestore` but `embedding` and `exchange`. Nothing here loads torch or dask. Import from the
modules: `patch_stream` opens a cohort; `summary`, `pca`, `kmeans` and `neighbours` analyse it.
"""
