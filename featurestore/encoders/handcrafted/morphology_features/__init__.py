"""What `morphology` measures: stains over pixels, texture over octaves, nuclei; and the encoder that joins them.

May use: errors, the protocol and the stain separation of `featurestore.encoders`. These modules import torch.
"""
