"""Training on a cohort that does not fit into memory: sections one after another, blocks in rows, nothing kept but sums.

It fits the models whose solution follows from sums (`cohort_ridges`); all others are trained on
sections in memory (`histosge.training.in_memory`). Passes over a cohort:

    1  survey     counts and positions: genes are chosen, patterns of genes computed (`survey`)
    2  gather     Gram matrices of pooled embeddings per group of sections (`gather`)
    3  hold out   predictions of sections by fits without them, for weights, intervals and trust (`hold_out`)

A count likelihood takes a pass over counts and patterns for each Newton step (`count_fit`). An adaptation to many new
sections takes one more, by the earlier model (`adapt_dense_fit`, `adapt_ridge_fit`).

Sections are visited in this process, or by the workers of a dask cluster (`section_tasks`, `cluster_tasks`): each pass is a
function of one section, whose results are added up and saved here, in the order of sections.

A run that is interrupted goes on from the section that it was at: what each section gave lies in a work folder beside the
model (`work_folder`).
"""
