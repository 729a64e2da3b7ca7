"""Encoders (patches to embeddings): the only part of `featurestore` that imports torch.

Their records, their identities, their weights and the engines that run them. It opens no slide and no store.

May use: errors and names.
"""
