"""From a saved model and a feature store to an expression store, block by block.

It trains nothing and scores nothing.
May use: data, heldout, models, calibration, training and reporting.
"""
