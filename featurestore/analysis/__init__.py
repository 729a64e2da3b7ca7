"""Analysis where the store lies: each stored block is read once a pass, and no slide is ever held whole.

Nothing here loads torch or dask. Import from the modules: `stream` opens a cohort; `summary`, `pca`, `kmeans`
and `neighbours` answer.
"""
