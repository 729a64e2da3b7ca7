"""What another lab's stain does to `dense`, and what its penalty for stains does against it.

python benchmarks/augmenting.py [--quick] [--json FILE]

Each public section is held out in turn; its slide is encoded as it is and in four fixed stains that no training
section was seen in (--quick, or where the sections are absent: a made cohort and `colour`). Means over sections;
`shifted` is the mean over the four stains. Strengths are shown as a table: none is chosen.

    strength   factor of the covariance of the stain's shifts, measured on some patches of the training slides; 1 is what
               `--stains` takes
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _common import Result, options, report
from _public import embed_public, public_sheet

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders.loading import load_encoder
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import read_samples
from histosge.data.genes import choose_genes
from histosge.data.section_loading import (
    LoadedSection,
    Selection,
    load_sections,
    training_section,
)
from histosge.data.sections import TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.heldout.metrics import correlate
from histosge.models.dense import DenseModel
from histosge.synthetic import SyntheticSpec, make_cohort
from histosge.training.stain_augmentation import Stain, augment_stains, encode_stained

SHIFTED = {
    "pink": Stain((0.8, 1.25)),
    "blue": Stain((1.25, 0.8)),
    "dark": Stain((1.3, 1.3)),
    "pale": Stain((0.75, 0.75)),
}
STRENGTHS = (0.3, 1.0, 3.0, 10.0)
GENES = 250
PUBLIC = GridSpec(mpp=0.7, patch_px=320, stride_px=160)
MADE = GridSpec(mpp=0.5, patch_px=112, stride_px=112)

Score = dict[str, tuple[float, float]]
"""Stain -> mean Pearson and mean squared error over genes."""


@dataclass(frozen=True)
class Cohort:
    """Sections, and their patches in each of `SHIFTED`."""

    sheet: Path
    loaded: list[LoadedSection]
    shifted: list[dict[str, np.ndarray]]

    @classmethod
    def of(cls, sheet: Path, loaded: list[LoadedSection]) -> "Cohort":
        """Encode all patches of all slides in each stain."""
        encoder = load_encoder(loaded[0].slide.identity.key)
        samples = {sample.slide_id: sample for sample in read_samples(str(sheet))}
        shifted = []
        for item in loaded:
            every = np.arange(len(item.section.patches))
            sample = samples[item.section.slide_id]
            values = encode_stained(item, sample, encoder, list(SHIFTED.values()), every)
            shifted.append(dict(zip(SHIFTED, values, strict=True)))
        return cls(sheet, loaded, shifted)


def main() -> None:
    """Hold each section out, and print the table."""
    asked = options(__doc__)
    sheet = public_sheet()
    with tempfile.TemporaryDirectory() as name:
        if asked.quick or sheet is None:
            made = make_cohort(Path(name), SyntheticSpec(size_px=(2000, 2000)), 3)
            embed(str(made.sheet), f"{name}/store", EmbedSettings(encoders=("colour",), spec=MADE))
            what, loaded = "made", load_sections(str(made.sheet), f"{name}/store", Selection())
            cohort = Cohort.of(made.sheet, loaded)
        else:
            what, cohort = "public", Cohort.of(sheet, embed_public(sheet, Path(name), PUBLIC))
        scores = [_held_out(cohort, k) for k in range(len(cohort.loaded))]
    results = []
    for label in scores[0]:
        own = np.mean([fold[label]["as it is"] for fold in scores], axis=0)
        shifted = np.mean([[fold[label][stain] for stain in SHIFTED] for fold in scores], axis=(0, 1))
        for where, (pearson, error) in (("as it is", own), ("shifted", shifted)):
            results += [
                Result(f"{label}, {where}: Pearson", float(pearson)),
                Result(f"{label}, {where}: squared error", float(error)),
            ]
    report(f"augmenting (other stains: {what}, {len(scores)} sections)", results, asked)


def _held_out(cohort: Cohort, k: int) -> dict[str, Score]:
    """Fit on all sections but one with each penalty, and score the one in every stain."""
    sections = [item.section for item in cohort.loaded]
    others = [i for i in range(len(sections)) if i != k]
    genes = choose_genes([sections[i].spots for i in others], GENES)
    every = [training_section(s, genes) for s in sections]
    known, held = [cohort.loaded[i] for i in others], every[k]
    training = augment_stains(read_samples(str(cohort.sheet)), known, [every[i] for i in others], seed=0)
    plain = [replace(section, stain_pairs=None) for section in training]
    scores = {"no penalty": _score(DenseModel.fit(plain), held, cohort.shifted[k])}
    for strength in STRENGTHS:
        model = DenseModel.fit([_with_strength(section, strength) for section in training])
        scores[f"strength {strength:g}"] = _score(model, held, cohort.shifted[k])
    return scores


def _with_strength(section: TrainingSection, strength: float) -> TrainingSection:
    """Scale the shifts: their covariance grows with the square."""
    pairs = section.stain_pairs
    assert pairs is not None
    stained = pairs.plain + np.float32(np.sqrt(strength)) * (pairs.stained - pairs.plain)
    return replace(section, stain_pairs=replace(pairs, stained=stained))


def _score(model: DenseModel, held: TrainingSection, shifted: dict[str, np.ndarray]) -> Score:
    scores = {}
    for stain, embedding in {"as it is": held.patches.embedding, **shifted}.items():
        patches = replace(held, patches=held.patches.with_embedding(embedding)).patches
        guess = spots_from_patches(held.overlap, model.predict(patches)).astype(np.float64)
        truth = held.target.astype(np.float64)
        pearson, _ = correlate(truth, guess, np.zeros(len(truth), np.int64))
        scores[stain] = (float(pearson.mean()), float(((guess - truth) ** 2).mean()))
    return scores


if __name__ == "__main__":
    main()
