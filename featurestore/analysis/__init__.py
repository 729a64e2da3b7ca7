"""Analysis of a whole cohort from its store: each stored block is read once a pass, and no slide is held in memory.

May use: everything in `featurestore` but `exchange`; of `embedding` only what starts and connects to workers. Nothing but
`cluster_stream` loads dask, and nothing here torch. Import from the modules: `patch_stream` opens a cohort in this process,
`cluster_stream` on a cluster; `summary`, `pca`, `kmeans` and `neighbours` analyse it.
"""
