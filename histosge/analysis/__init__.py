"""Analyses of expression maps: signatures, pseudobulk and spatially variable genes; slide by slide, band by band.

What is the same for embeddings and maps (summary, principal components, clusters, neighbours) is `featurestore.analysis`.
"""
