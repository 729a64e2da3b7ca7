"""Models: from embeddings to expression, all behind `histosge.models.protocol.Model`; presets have a file each.

They know patches and spots in memory. They open no store, and do not know how they are scored.
May use: `histosge.data` and `histosge.heldout`.
"""
