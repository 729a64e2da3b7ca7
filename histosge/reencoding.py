"""Encode a section's patches anew, with a defect of the released code: what the wrong pixels cost.

The store's encoder reads the same patches from the slide, changed on the way in.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featurestore.blocks import Block
from featurestore.encoder import Encoder
from featurestore.patches import read_batches
from featurestore.planning import BATCH, EmbedSettings, load_encoders
from featurestore.samples import Sample
from featurestore.slide import open_slide
from histosge.errors import HistosgeError
from histosge.sections import Section
from histosge.stream import LoadedSection

CROP_PX = 50
"""Side of the released code's crop, in pixels at level 0 whatever their size, enlarged to the encoder's input."""


def store_encoder(loaded: LoadedSection) -> Encoder:
    """Load the encoder that made a section's embeddings.

    Raises
    ------
    HistosgeError
        If the one that can be loaded here is another, by its fingerprint.
    """
    wanted = loaded.slide.identity
    (encoder,) = load_encoders(EmbedSettings(encoders=(wanted.key,))).values()
    if encoder.identity.fingerprint != wanted.fingerprint:
        raise HistosgeError(
            f"the encoder {wanted.key!r} at hand ({encoder.identity.fingerprint[:16]}) is not the store's"
            f" ({wanted.fingerprint[:16]})"
        )
    return encoder


def encode_anew(
    loaded: LoadedSection, sample: Sample, encoder: Encoder, *, bgr: bool, fixed_pixel_crop: bool
) -> Section:
    """Return the section with embeddings of changed pixels.

    Parameters
    ----------
    bgr
        Swap red and blue.
    fixed_pixel_crop
        Take the middle 50 level-0 pixels of each patch, and enlarge them to the patch's size.

    Raises
    ------
    FeatureStoreError
        If the slide cannot be opened, or a patch cannot be read.
    """
    section, grid = loaded.section, loaded.slide.stored.grid
    wanted = np.zeros((grid.n_rows, grid.n_cols), dtype=bool)
    wanted[section.patches.rows, section.patches.cols] = True
    found = np.full((*wanted.shape, encoder.identity.dim), np.nan, dtype=np.float32)
    slide = open_slide(sample.slide, sample.mpp)
    try:
        side = round(CROP_PX * slide.mpp / grid.effective_mpp)
        for block in loaded.slide.stored.planned(loaded.slide.array.block_shape):
            for batch in read_batches(slide, grid, block, wanted[block.slices], BATCH):
                if len(batch.pixels):
                    pixels = _crop(batch.pixels, side) if fixed_pixel_crop else batch.pixels
                    pixels = np.ascontiguousarray(pixels[..., ::-1]) if bgr else pixels
                    _place(found, block, batch.rows, batch.cols, encoder.encode(pixels))
    finally:
        slide.close()
    embedding = found[section.patches.rows, section.patches.cols].astype(np.float16).astype(np.float32)
    if not np.isfinite(embedding).all():
        raise HistosgeError(f"{section.slide_id}: some patches could not be encoded anew")
    return replace(section, patches=section.patches.with_embedding(embedding))


def _place(
    found: NDArray[np.float32],
    block: Block,
    rows: NDArray[np.int64],
    cols: NDArray[np.int64],
    vectors: NDArray[np.float32],
) -> None:
    found[rows + block.rows[0], cols + block.cols[0]] = vectors


def _crop(pixels: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Enlarge the middle `side` pixels of each patch to its whole size, ``(n, patch_px, patch_px, 3)``."""
    full = pixels.shape[1]
    if not 0 < side <= full:
        raise HistosgeError(f"a crop of {side} px does not fit in patches of {full} px: embed larger patches")
    start = (full - side) // 2
    middle = pixels[:, start : start + side, start : start + side]
    return np.stack(
        [np.asarray(Image.fromarray(p).resize((full, full), Image.Resampling.BILINEAR)) for p in middle]
    )
