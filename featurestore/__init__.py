"""Slides in, chunked embeddings out. Knows nothing of genes."""
