"""From sections in a store to a saved model, with its intervals and its report.

May use: every folder above prediction: data, heldout, models, calibration and reporting.
"""
