"""Encoders: the only part of `featurestore` that imports torch."""
