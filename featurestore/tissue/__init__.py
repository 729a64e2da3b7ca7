"""Which patches of a slide hold tissue: decided once per grid, on a coarse overview, before anything is encoded.

May use: errors, grid and `featurestore.slides`. It reads slides and writes nothing.
"""
