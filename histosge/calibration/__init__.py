"""Prediction intervals and trust, measured on held-out spots of the training sections.

It is given a function that fits a model, and knows no preset; it reads and writes nothing.
May use: `histosge.data`, `histosge.heldout` and `histosge.models`.
"""
