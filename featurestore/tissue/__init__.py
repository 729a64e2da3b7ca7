"""Which patches of a slide hold tissue: decided once per grid, on a coarse overview, before anything is encoded.

`survey` does it; how tissue is told from glass is a `TissueMethod`, one file each in ``methods``, or another package's.

May use: errors, extensions, grid and `featurestore.slides`. It reads slides and writes nothing.
"""
