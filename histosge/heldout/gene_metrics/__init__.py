"""One file per metric that an evaluation computes of every gene, beside Pearson.

May use: `histosge.heldout.metrics` and `histosge.heldout.spatial_metrics`.
"""
