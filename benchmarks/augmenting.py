"""What another lab's stain does to `dense`, and what penalties for stain and dropout do against it.

python benchmarks/augmenting.py [--quick] [--json FILE]

Each public section is held out in turn; its slide is encoded as it is and in four fixed stains that no training
section was seen in (--quick, or where the sections are absent: a made cohort and `colour`). Means over sections;
`shifted` is the mean over the four stains. Strengths are shown as a table: none is chosen.

    stain      weights along stain shifts, measured on some patches of the training slides
    dropout    a component zeroed on the whole slide: for one moment that is the ridge's own penalty; here the blocks
               of a component's five moments
"""

import tempfile
from collections.abc import Sequence
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
from histosge.models.dense import N_PATTERNS, DenseModel
from histosge.models.linear_algebra import Floats, spatial_groups
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import MOMENTS, MultiscaleFeatures, spot_features
from histosge.models.stacking import fit_stack
from histosge.models.stain_invariance import stain_covariance
from histosge.synthetic import SyntheticSpec, make_cohort
from histosge.training.stain_augmentation import Stain, augment_stains, encode_stained

SHIFTED = {
    "pink": Stain((0.8, 1.25)),
    "blue": Stain((1.25, 0.8)),
    "dark": Stain((1.3, 1.3)),
    "pale": Stain((0.75, 0.75)),
}
STRENGTHS = {"stain": (1.0, 3.0, 10.0, 30.0), "dropout": (0.3, 1.0, 3.0, 10.0)}
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
    report(f"other stains ({what}, {len(scores)} sections)", results, asked.json)


def _held_out(cohort: Cohort, k: int) -> dict[str, Score]:
    """Fit on all sections but one with each penalty, and score the one in every stain."""
    sections = [item.section for item in cohort.loaded]
    others = [i for i in range(len(sections)) if i != k]
    genes = choose_genes([sections[i].spots for i in others], GENES)
    every = [training_section(s, genes) for s in sections]
    known, held = [cohort.loaded[i] for i in others], every[k]
    training = augment_stains(read_samples(str(cohort.sheet)), known, [every[i] for i in others], seed=0)
    features = MultiscaleFeatures.fit(training)
    covariances = {
        "stain": stain_covariance(training, features, 1.0),
        "dropout": _dropout_covariance(training, features),
    }
    scores = {"no penalty": _score(_fit(training, features, None), held, cohort.shifted[k])}
    for name, strengths in STRENGTHS.items():
        covariance = covariances[name]
        assert covariance is not None
        for g in strengths:
            model = _fit(training, features, g * covariance)
            scores[f"{name} {g:g}"] = _score(model, held, cohort.shifted[k])
    return scores


def _fit(
    training: Sequence[TrainingSection], features: MultiscaleFeatures, nuisance: Floats | None
) -> DenseModel:
    targets = LowRankTargets.fit(training, N_PATTERNS)
    Y = np.concatenate([targets.to_patterns(s) for s in training])
    spots = spot_features(training, features)
    stack = fit_stack(spots, Y, spatial_groups(training), nuisance=nuisance)
    return DenseModel(features, stack.affine, targets, stack.penalties)


def _dropout_covariance(training: Sequence[TrainingSection], features: MultiscaleFeatures) -> Floats:
    """Return the covariance of the shifts when one component at a time is zeroed, in all of its moments."""
    values = spot_features(training, features).features
    covariance = np.cov(values.T, bias=True)
    component = np.arange(values.shape[1]) % (values.shape[1] // len(MOMENTS))
    return np.asarray(covariance * (component[:, None] == component))


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
