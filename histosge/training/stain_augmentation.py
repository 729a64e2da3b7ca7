"""Stain augmentation: some patches of the training slides are encoded again in other stains.

In optical density, dyes add up. Haematoxylin and eosin are separated by their published directions, scaled by a factor
each, shifted a little, and converted back to RGB. How far embeddings change with the stain is what
`histosge.models.stain_invariance` penalises.

Terms
    stain   factors of haematoxylin and eosin, and what is added to the density of each
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from featurestore.encoders.loading import load_encoder
from featurestore.encoders.protocol import Encoder
from featurestore.encoders.stain_separation import DYES_RGB
from featurestore.errors import FeatureStoreError, SlideError
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.open_slide import open_slide
from featurestore.slides.sample_sheet import Sample
from histosge.data.section_loading import LoadedSection
from histosge.data.sections import Section, StainPairs, TrainingSection
from histosge.errors import ModelError
from histosge.training.reencoding import encode_positions, options_of, read_patches

PATCHES, STAINS = 64, 4
"""Per section: patches that are encoded again, each in so many stains."""
FACTOR, SHIFT = 0.3, 0.05
"""Spread of the draws: log of the factors, and natural density added, both ways."""
_BATCH = 16


@dataclass(frozen=True)
class Stain:
    """Factors of haematoxylin and eosin, and natural density added to each."""

    factors: tuple[float, float]
    shifts: tuple[float, float] = (0.0, 0.0)

    @classmethod
    def draw(cls, rng: np.random.Generator) -> "Stain":
        """Draw one, evenly within `FACTOR` and `SHIFT`."""
        factors, shifts = np.exp(rng.uniform(-FACTOR, FACTOR, 2)), rng.uniform(-SHIFT, SHIFT, 2)
        return cls((float(factors[0]), float(factors[1])), (float(shifts[0]), float(shifts[1])))

    def apply(self, pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return RGB pixels, ``(..., 3)``, as this stain would have them."""
        dyes = np.array(DYES_RGB)
        axes = np.stack([row / np.linalg.norm(row) for row in (*dyes, np.cross(*dyes))])
        # The third axis is what neither dye explains; it is left as it is, so that factors of 1 change nothing.
        turn = np.linalg.inv(axes) @ np.diag((*self.factors, 1.0)) @ axes
        # A table of 256 entries in place of a logarithm a pixel. Plus 1: black would have an infinite density.
        table = -np.log((np.arange(256, dtype=np.float32) + 1) / 256)
        density = table[pixels] @ turn.astype(np.float32) + (np.array((*self.shifts, 0.0)) @ axes).astype(
            np.float32
        )
        through = np.rint(256 * np.exp(-density) - 1)
        return np.asarray(np.clip(through, 0, 255), dtype=np.uint8)


def augment_stains(
    samples: Sequence[Sample], loaded: Sequence[LoadedSection], training: Sequence[TrainingSection], seed: int
) -> list[TrainingSection]:
    """Return training sections that know how the stain moves their embeddings.

    Raises
    ------
    ModelError
        If a slide cannot be read, or the store's encoder is not at hand.
    """
    identity, where = loaded[0].slide.identity, {sample.slide_id: sample for sample in samples}
    try:
        encoder = load_encoder(identity.key, options_of(loaded[0].slide.stored.grid))
    except FeatureStoreError as error:
        raise ModelError(f"stains need the store's encoder ({error}); leave --stains out") from error
    if encoder.identity.fingerprint != identity.fingerprint:
        raise ModelError(
            f"stains need the store's encoder {identity.key!r} ({identity.fingerprint[:16]}), the one at hand is "
            f"{encoder.identity.fingerprint[:16]}; leave --stains out, or embed again"
        )
    # One generator for all slides, in the order of their ids: the draws of a slide depend on those before it.
    rng = np.random.default_rng(seed)
    out = []
    for item, section in zip(loaded, training, strict=True):
        # Under spots: only those are trained on, so only there a change of stain matters to the fit.
        under = np.unique(section.overlap.indices)
        chosen = np.sort(rng.choice(under, min(PATCHES, len(under)), replace=False))
        stains = [Stain.draw(rng) for _ in range(STAINS)]
        try:
            stained = encode_stained(item, where[item.section.slide_id], encoder, stains, chosen)
        except (FeatureStoreError, OSError) as error:
            raise ModelError(
                f"stains need the slide of {item.section.slide_id!r} ({error}); leave --stains out"
            ) from error
        plain = section.patches.embedding[chosen]
        out.append(replace(section, stain_pairs=StainPairs(plain, stained)))
    return out


def encode_stained(
    item: LoadedSection,
    sample: Sample,
    encoder: Encoder,
    stains: Sequence[Stain],
    chosen: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Encode some of a section's patches in other stains, ``(n_stains, len(chosen), dim)``, as a store rounds them."""
    section: Section = item.section
    # Another scan of the same block would differ in more than the stain.
    if slide_fingerprint(sample.slide) != item.slide.fingerprint:
        raise SlideError(f"{sample.slide} is not the slide that was embedded as {sample.slide_id!r}")
    slide = open_slide(sample.slide, sample.mpp)
    try:
        out = np.empty((len(stains), len(chosen), section.patches.embedding.shape[1]), np.float32)
        for start in range(0, len(chosen), _BATCH):
            some = slice(start, start + _BATCH)
            grid, patches = item.slide.stored.grid, section.patches
            pixels = read_patches(slide, grid, patches, chosen[some])
            for k, stain in enumerate(stains):
                found = encode_positions(encoder, stain.apply(pixels), grid, patches, chosen[some])
                out[k, some] = found.astype(np.float16)
    finally:
        slide.close()
    return out
