"""A model for a made store, fitted on invented spots: for speed, not for what it says."""

from dataclasses import asdict
from pathlib import Path

import numpy as np

from featurestore.storage.store import Store
from featurestore.storage.stored_documents import identity_attrs
from histosge.data.embedded_slide import EmbeddedSlide, load_patches, open_embedded
from histosge.data.sections import TrainingSection
from histosge.data.spot_overlap import disc_overlap
from histosge.models.registry import load_preset
from histosge.training.model_card import ModelCard
from histosge.training.saved_model import SavedModel, save_model


def invent_section(
    slide: EmbeddedSlide, n_spots: int, n_genes: int, *, truth: int = 0, seed: int = 0
) -> TrainingSection:
    """Lay spots of 55 µm on a slide whose genes follow 8 directions of the embedding, and noise.

    Parameters
    ----------
    truth
        Seed of the directions: the same for all sections of a cohort.
    seed
        Of the spots' positions and noise.
    """
    patches = load_patches(slide)
    rng, same = np.random.default_rng(seed), np.random.default_rng(truth)
    xy_um = patches.xy_um[rng.choice(len(patches), n_spots, replace=False)]
    overlap = disc_overlap(xy_um, 55.0, patches)
    directions = same.standard_normal((patches.embedding.shape[1], 8)) / np.sqrt(patches.embedding.shape[1])
    loadings = same.standard_normal((8, n_genes))
    signal = (overlap @ patches.embedding) @ directions @ loadings / np.sqrt(8)
    target = np.maximum(0, 1.5 + 0.6 * signal + rng.standard_normal((n_spots, n_genes))).astype(np.float32)
    return TrainingSection(patches, overlap, xy_um, target)


def invent_model(
    store: Store, slide_id: str, folder: Path, n_genes: int, preset: str = "dense"
) -> SavedModel:
    """Fit and save a model of 200 invented spots."""
    slide = open_embedded(store, slide_id, None, None)
    fitted = load_preset(preset).fit([invent_section(slide, 200, n_genes)], epochs=1)
    genes = tuple(f"G{i:05}" for i in range(n_genes))
    grid = asdict(slide.stored.grid.spec)
    card = ModelCard(preset, genes, identity_attrs(slide.identity), grid, {"target": "invented"}, (), 0)
    return save_model(folder, fitted, card)
