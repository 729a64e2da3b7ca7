"""A slide's stain: measured once on some of its tissue patches, kept with the embeddings, applied to every patch."""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.protocol import Encoder
from featurestore.encoders.stain_normalisation import (
    Normalise,
    StainFit,
    fit_stain,
    parse_fit,
    tissue_pixels,
)
from featurestore.errors import SlideError, StoreError
from featurestore.slides.protocol import Slide
from featurestore.storage.store import Store, StoredGrid

SAMPLED = 64
"""Patches that a stain is measured on, evenly spaced over the tissue: half a second of reading. Of patches, not of the
overview: its pixels are wider than a nucleus, so that none shows haematoxylin alone."""
MAX_PIXELS = 1_000_000
"""Pixels that are kept of them; percentiles and means need no more."""
MOSTLY_TISSUE = 128
"""Share of tissue (of 255) from which on a patch is sampled, if there are any."""


def fit_of_slide(
    store: Store, slide: Slide, stored: StoredGrid, encoders: Mapping[str, Encoder], method: str
) -> StainFit | None:
    """Return the stain of a slide: that of an encoder of the run that was begun earlier, or else measured now.

    Returns
    -------
    StainFit or None
        None of a slide without tissue.

    Raises
    ------
    SlideError
        If the stain cannot be measured.
    """
    for key in encoders:
        # Measured again elsewhere, the last bits could differ; blocks of one slide must be alike.
        found = store.stain(stored.slide_id, stored.grid.spec.key, key)
        if found is not None and found[0].get("method") == method:
            return parse_fit(*found)
    if not stored.is_tissue.any():
        return None
    return fit_stain(method, sample_pixels(slide, stored))


def sample_pixels(slide: Slide, stored: StoredGrid) -> NDArray[np.uint8]:
    """Return pixels of tissue from patches all over a slide, ``(n, 3)``; the same ones every time."""
    grid = stored.grid.encoded
    mostly = stored.tissue >= MOSTLY_TISSUE
    rows, cols = np.nonzero(mostly if mostly.any() else stored.is_tissue)
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(SAMPLED, len(rows))).astype(int))
    parts = [np.empty((0, 3), np.uint8)]
    for row, col in zip(rows[chosen].tolist(), cols[chosen].tolist(), strict=True):
        row, col = row // stored.grid.tokens, col // stored.grid.tokens
        x, y, width, height = grid.region_px((row, row + 1), (col, col + 1))
        try:
            parts.append(tissue_pixels(slide.read_region(x, y, width, height, grid.effective_mpp)))
        except SlideError:
            continue  # a patch that cannot be read is NaN in the store, and no reason to give up the slide
    pixels = np.concatenate(parts)
    return pixels[:: max(1, -(-len(pixels) // MAX_PIXELS))]


def slide_normaliser(store: Store, stored: StoredGrid, keys: Iterable[str]) -> Normalise | None:
    """Return what normalises the pixels of a slide for these encoders; None if they take them as they are.

    Raises
    ------
    StoreError
        If two of them were normalised differently: then no pixels are right for both.
    """
    grid_key = stored.grid.spec.key
    found = {key: store.stain(stored.slide_id, grid_key, key) for key in sorted(keys)}
    fits = {None if attrs is None else parse_fit(*attrs) for attrs in found.values()}
    if len(fits) > 1:
        raise StoreError(
            f"{stored.slide_id}/{grid_key}: the stain of {', '.join(found)} was measured in different runs; embed them one "
            "after the other (--encoder)"
        )
    (fit,) = fits or {None}
    return None if fit is None else fit.normaliser()
