"""One static page of all slides of a store, or of those that are about to be embedded: pictures, tissue, state.

It reads stores and slides, and writes a folder of plain files that opens without a server. It changes no store, and shows
neither label nor macro pictures: a slide's thumbnail is its own pyramid, read coarsely.

May use: every folder of `featurestore`.
"""
