"""What models learn from: sections, spots, patches and their overlap, read from a store and from expression files.

It fits nothing. Whole sections for training, blocks with a halo for prediction, shuffled batches of patches or of spots
for training loops of a user's own.

May use: errors, extras, threads and `featurestore`.
"""
