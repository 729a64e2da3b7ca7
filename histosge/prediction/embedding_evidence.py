"""How far a slide that is predicted lies from those that its model was trained on, by a sample of its embeddings."""

import numpy as np

from histosge.calibration.wording import distance_sentence
from histosge.data.embedded_slide import EmbeddedSlide, stream_windows
from histosge.training.saved_model import SavedModel

MAX_BLOCKS = 8
"""Blocks that are read for it, evenly spread, at most: a block has thousands of patches, and reading all twice would cost
as much as predicting them."""


def distance_from_training(slide: EmbeddedSlide, saved: SavedModel) -> float | None:
    """Return `EmbeddingReference.distance` of a slide's embeddings.

    Returns
    -------
    float or None
        None if the model was trained on the slide, or holds nothing to compare with, or no patch can be read.
    """
    reference = saved.intervals.reference if saved.intervals else None
    if reference is None or saved.was_trained_on(slide.fingerprint):
        return None
    planned = slide.stored.planned(slide.array.block_shape)
    some = planned[:: max(1, -(-len(planned) // MAX_BLOCKS))]
    # As windows, so that several encoders are joined as in training.
    parts = [window.patches.embedding for window in stream_windows(slide, some, 0.0)]
    found = np.concatenate(parts) if parts else np.empty((0, len(reference.mean)), np.float32)
    return reference.distance(found) if len(found) else None


def evidence_sentences(saved: SavedModel, slide_fingerprint: str, distance: float | None) -> list[str]:
    """State what is known of a slide that no spots were measured on: for whom intervals hold, and how far it lies off.

    Nothing of slides that the model was trained on, and for models without intervals.
    """
    if saved.intervals is None or saved.was_trained_on(slide_fingerprint):
        return []
    sentences = [f"Intervals and trust: {saved.intervals.scope}."]
    if distance is not None and saved.intervals.reference is not None:
        sentences.append(distance_sentence(distance, saved.intervals.reference.among_sections))
    return sentences
