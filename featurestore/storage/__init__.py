"""The feature store: Zarr metadata, arrays whose blocks are single objects, and what checks and lists them.

docs/SPEC.md is its specification. It opens no slide and runs no encoder.

May use: errors, names, location, grid, blocks, `featurestore.tissue` and the identities of `featurestore.encoders`.
"""
