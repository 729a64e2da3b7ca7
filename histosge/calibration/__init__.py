"""Prediction intervals and trust, measured on held-out spots.

May use: `histosge.data`, `histosge.heldout` and `histosge.models`.
"""
