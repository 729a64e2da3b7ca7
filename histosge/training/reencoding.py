"""The patches under spots, encoded again as the released code reads them: to measure what that costs.

Only patches under a spot are read, at the positions of the store's own grid, by the store's own encoder, so that
the way of reading is all that differs. Nothing is written: a store never holds such embeddings.

Terms
    bgr               red and blue change places before the patch is encoded
    fixed_pixel_crop  50 x 50 level-0 pixels around the patch's centre, whatever the scale, enlarged to the
                      side of the store's patches
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import Encoder, EncoderOptions
from featurestore.errors import FeatureStoreError
from featurestore.grid import PatchGrid, TokenGridSpec
from featurestore.slides.open_slide import open_slide
from featurestore.slides.protocol import Slide
from featurestore.slides.sample_sheet import Sample
from histosge.data.section_loading import LoadedSection
from histosge.data.sections import Patches, Section

# The released code's constant.
CROP_PX = 50
_BATCH = 64


@dataclass
class Reencoder:
    """Encodes sections' patches again, once per way of reading.

    Parameters
    ----------
    grids, slides, mpps
        Slide id -> grid of its patches, file or URL, and the scale that the sheet gives it, if any.
    encoder
        The one that made the store.
    """

    grids: Mapping[str, PatchGrid]
    slides: Mapping[str, str]
    mpps: Mapping[str, float | None]
    encoder: Encoder
    _done: dict[tuple[str, frozenset[str]], Section] = field(default_factory=dict)

    @classmethod
    def for_sections(cls, samples: Sequence[Sample], loaded: Sequence[LoadedSection]) -> "Reencoder | None":
        """Return one if the slides can be opened and the store's encoder is at hand, else None.

        None on a grid of tokens, too: the released code reads a crop for each patch, and has no tokens.
        """
        if loaded[0].slide.stored.grid.spec.encoded != loaded[0].slide.stored.grid.spec:
            return None
        where = {sample.slide_id: sample for sample in samples}
        # Every slide is opened once: a variant that fails on the last of them would waste hours.
        identity = loaded[0].slide.identity
        try:
            encoder = load_encoder(identity.key)
            for item in loaded:
                sample = where[item.section.slide_id]
                open_slide(sample.slide, sample.mpp).close()
        except (FeatureStoreError, OSError):
            return None
        # The same name with other weights, or another version, would change more than the way of reading.
        if encoder.identity.fingerprint != identity.fingerprint:
            return None
        return cls(
            {item.section.slide_id: item.slide.stored.grid for item in loaded},
            {name: sample.slide for name, sample in where.items()},
            {name: sample.mpp for name, sample in where.items()},
            encoder,
        )

    def __call__(self, sections: Sequence[Section], switches: frozenset[str]) -> tuple[Section, ...]:
        """Return the sections with the patches under spots encoded in another way; others stay as they are."""
        for section in sections:
            if (section.slide_id, switches) not in self._done:
                self._done[section.slide_id, switches] = self._encode(section, switches)
        return tuple(self._done[section.slide_id, switches] for section in sections)

    def _encode(self, section: Section, switches: frozenset[str]) -> Section:
        under = np.flatnonzero(np.asarray(section.overlap.sum(axis=0)).ravel() > 0)
        slide = open_slide(self.slides[section.slide_id], self.mpps[section.slide_id])
        try:
            read = _read_crops if "fixed_pixel_crop" in switches else read_patches
            embedding = section.patches.embedding.copy()
            for start in range(0, len(under), _BATCH):
                chosen = under[start : start + _BATCH]
                pixels = read(slide, self.grids[section.slide_id], section.patches, chosen)
                if "bgr" in switches:
                    pixels = np.ascontiguousarray(pixels[..., ::-1])
                # As a store rounds them.
                embedding[chosen] = self.encoder.encode(pixels).astype(np.float16).astype(np.float32)
        finally:
            slide.close()
        return replace(section, patches=section.patches.with_embedding(embedding))


def options_of(grid: PatchGrid) -> EncoderOptions:
    """Return how to load the encoder that filled a grid."""
    return EncoderOptions(tokens=grid.spec if isinstance(grid.spec, TokenGridSpec) else None)


def encode_positions(
    encoder: Encoder,
    pixels: NDArray[np.uint8],
    grid: PatchGrid,
    patches: Patches,
    chosen: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Encode what `read_patches` returned, ``(n, dim)``: on a token grid, of each patch the position that was chosen."""
    vectors = encoder.encode(pixels)
    if vectors.ndim == 2:
        return vectors
    inside = (at[chosen] % grid.tokens for at in (patches.rows, patches.cols))
    found: NDArray[np.float32] = vectors[np.arange(len(vectors)), *inside]
    return found


def read_patches(
    slide: Slide, grid: PatchGrid, patches: Patches, chosen: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Read some patches' pixels, as the embedding read them, ``(n, side, side, 3)``; of a token grid, the whole patches."""
    whole = grid.encoded
    side = whole.spec.patch_px
    pixels = np.empty((len(chosen), side, side, 3), np.uint8)
    rows, cols = (at[chosen] // grid.tokens for at in (patches.rows, patches.cols))
    for i, (row, col) in enumerate(zip(rows.tolist(), cols.tolist(), strict=True)):
        x, y, width, height = whole.region_px((row, row + 1), (col, col + 1))
        pixels[i] = slide.read_region(x, y, width, height, grid.effective_mpp)
    return pixels


def _read_crops(
    slide: Slide, grid: PatchGrid, patches: Patches, chosen: NDArray[np.int64]
) -> NDArray[np.uint8]:
    side = grid.spec.patch_px
    pixels = np.empty((len(chosen), side, side, 3), np.uint8)
    for i, (x_um, y_um) in enumerate(patches.xy_um[chosen]):
        # Level-0 pixels, as the released code counts them: that the crop's size in microns varies is the defect.
        x, y = (round(at / slide.mpp - CROP_PX / 2) for at in (x_um, y_um))
        crop = slide.read_region(x, y, CROP_PX, CROP_PX, slide.mpp)
        pixels[i] = np.asarray(Image.fromarray(crop).resize((side, side), Image.Resampling.BILINEAR))
    return pixels
