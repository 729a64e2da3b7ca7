"""One file per preset: a model that `train --preset` and `evaluate --presets` know by name.

May use: `histosge.data`, `histosge.heldout` and the machinery in `histosge.models`.
"""
