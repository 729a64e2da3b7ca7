"""Whether 90 % intervals cover 90 % of spots on sections that had no say, and which genes are trusted.

python benchmarks/calibration.py [--quick] [--json FILE]
"""

import tempfile
from pathlib import Path

import numpy as np
from _common import Result, options, report

from featurestore.embedding import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.conformal import calibrate, coverage
from histosge.models.presets import load_preset
from histosge.synthetic import SyntheticSpec, make_cohort
from histosge.training import Selection, load_sections, training_section
from histosge.windows import spots_from_patches

SPEC = GridSpec(mpp=0.5, patch_px=112, stride_px=56)


def main() -> None:
    """Calibrate on most sections of a synthetic cohort, and look at the others."""
    asked = options(__doc__)
    n_sections, held_out, side = (5, 2, 2000) if asked.quick else (10, 3, 3000)
    with tempfile.TemporaryDirectory() as name:
        cohort = make_cohort(Path(name), SyntheticSpec(size_px=(side, side)), n_sections)
        embed(str(cohort.sheet), f"{name}/store", EmbedSettings(encoders=("colour",), spec=SPEC))
        loaded = load_sections(str(cohort.sheet), f"{name}/store", Selection())
    genes = loaded[0].section.spots.genes
    sections = [training_section(item.section, genes) for item in loaded]
    results = []
    for preset in ("ridge", "dense"):
        fit, training = load_preset(preset).fit, sections[:-held_out]
        intervals, model = calibrate(fit, training, 55.0), fit(training)
        assert intervals is not None
        covered = [
            coverage(intervals, s.target, spots_from_patches(s.overlap, model.predict(s.patches)))
            for s in sections[-held_out:]
        ]
        results += [
            Result(f"{preset}: coverage", float(np.mean(covered)), "share", ">= 0.88"),
            Result(f"{preset}: coverage, at most", float(np.mean(covered)), "share", "<= 0.92"),
            Result(f"{preset}: coverage of the worst gene", float(np.mean(covered, axis=0).min()), "share"),
        ]
        for family, target in (("NOISE", "<= 0.1"), ("MORPH", ">= 0.9"), ("GRAD", "")):
            own = np.array([gene.startswith(family) for gene in genes])
            share = float(intervals.trusted[own].mean())
            results.append(Result(f"{preset}: {family} genes trusted", share, "share", target))
    report(f"coverage ({n_sections} sections, {held_out} held out)", results, asked.json)


if __name__ == "__main__":
    main()
