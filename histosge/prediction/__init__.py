"""From a saved model and a feature store to an expression store: blocks in, blocks out.

May use: every folder above it: data, heldout, models, calibration, training and reporting.
"""
