"""The two encoders without weights, each with its ``RECORD``: `morphology`, the embedded default, and `colour`.

The registry imports the modules of this folder to list them, so they import torch only inside functions.

May use: errors and the protocol of `featurestore.encoders`.
"""
