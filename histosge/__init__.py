"""Embeddings in, expression out. Knows nothing of slide file formats."""
