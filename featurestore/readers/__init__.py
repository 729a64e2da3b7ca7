"""Readers: one file per family of slide formats, all behind `featurestore.slide.Slide`."""
