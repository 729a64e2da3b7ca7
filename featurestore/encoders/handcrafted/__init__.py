"""The two encoders without weights: `morphology`, the embedded default, and `colour`.

May use: errors and the protocol of `featurestore.encoders`.
"""
