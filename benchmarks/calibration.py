"""Whether 90 % intervals cover 90 % of spots on sections that had no say, shallow and deep, and which genes are trusted.

python benchmarks/calibration.py [--quick] [--json FILE]

Coverage is given over all held-out spots and per third of their own total counts and of predicted depth, with one
half width per gene and with those of the strata that calibration chose (the same where it chose one). Beside a
made cohort stand the public sections, each held out in turn, where they are present (not with --quick).
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import Result, options, report
from _public import embed_public, public_sheet

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.calibration.conformal import Intervals, calibrate, coverage, predict_spots
from histosge.data.genes import choose_genes
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import TrainingSection
from histosge.models.registry import load_preset
from histosge.synthetic import SyntheticSpec, make_cohort

SPEC = GridSpec(mpp=0.5, patch_px=112, stride_px=56)
GENES = 250

Held = tuple[list[TrainingSection], TrainingSection]


def main() -> None:
    """Calibrate on training sections, and look at the others."""
    asked = options(__doc__)
    n_sections, held_out, side = (5, 2, 2000) if asked.quick else (10, 3, 3000)
    with tempfile.TemporaryDirectory() as name:
        cohort = make_cohort(Path(name), SyntheticSpec(size_px=(side, side)), n_sections)
        embed(str(cohort.sheet), f"{name}/store", EmbedSettings(encoders=("colour",), spec=SPEC))
        loaded = load_sections(str(cohort.sheet), f"{name}/store", Selection())
    genes = loaded[0].section.spots.genes
    sections = [training_section(item.section, genes) for item in loaded]
    training = sections[:-held_out]
    results = []
    for preset in ("ridge", "dense"):
        fit = load_preset(preset).fit
        intervals, model = calibrate(fit, training, 55.0), fit(training)
        assert intervals is not None
        covered = [coverage(intervals, s.target, *predict_spots(model, s)) for s in sections[-held_out:]]
        results += [
            Result(f"{preset}: coverage", float(np.mean(covered)), "share", ">= 0.88"),
            Result(f"{preset}: coverage, at most", float(np.mean(covered)), "share", "<= 0.92"),
            Result(f"{preset}: coverage of the worst gene", float(np.mean(covered, axis=0).min()), "share"),
        ]
        for family, target in (("NOISE", "<= 0.1"), ("MORPH", ">= 0.9"), ("GRAD", "")):
            own = np.array([gene.startswith(family) for gene in genes])
            share = float(intervals.trusted[own].mean())
            results.append(Result(f"{preset}: {family} genes trusted", share, "share", target))
    results += by_depth("made", ((training, s) for s in sections[-held_out:]), 55.0)
    if (sheet := public_sheet()) is not None and not asked.quick:
        results += by_depth("public", _public_folds(sheet), 100.0)
    report(f"coverage ({n_sections} sections, {held_out} held out)", results, asked.json)


def _public_folds(sheet: Path) -> Iterator[Held]:
    with tempfile.TemporaryDirectory() as name:
        sections = [item.section for item in embed_public(sheet, Path(name))]
    for k in range(len(sections)):
        genes = choose_genes([s.spots for s in sections[:k] + sections[k + 1 :]], GENES)
        every = [training_section(s, genes) for s in sections]
        yield every[:k] + every[k + 1 :], every[k]


def by_depth(what: str, folds: Iterator[Held], spot_um: float) -> list[Result]:
    """Compare one half width per gene with what calibration chose, for `dense`, over all folds together."""
    found: dict[str, list[tuple[np.ndarray, ...]]] = {"one width": [], "as chosen": []}
    fit, n_strata, known = load_preset("dense").fit, [], {}
    for training, held in folds:
        key = tuple(id(s) for s in training)
        if key not in known:
            known = {key: (calibrate(fit, training, spot_um), fit(training))}
        intervals, model = known[key]
        assert intervals is not None
        n_strata.append(intervals.config()["depth_strata"])
        values, depth = predict_spots(model, held)
        assert depth is not None
        assert held.library is not None
        for name, some in (("one width", replace(intervals, strata=None)), ("as chosen", intervals)):
            found[name].append((*_inside(some, held, values, depth), _third(held.library), _third(depth)))
    results = [Result(f"{what}: strata chosen, mean of folds", float(np.mean(n_strata)))]
    for name, parts in found.items():
        inside, width, counted, predicted = (np.concatenate(part) for part in zip(*parts, strict=True))
        results += [
            Result(f"{what}, {name}: coverage", float(inside.mean()), "share"),
            Result(f"{what}, {name}: mean width", float(width.mean()), "log1p(CP10k)"),
        ]
        for label, third in (("total counts", counted), ("predicted depth", predicted)):
            for k, part in enumerate(("low", "middle", "high")):
                share = float(inside[third == k].mean())
                results.append(Result(f"{what}, {name}: {part} {label}", share, "share"))
    return results


def _inside(
    intervals: Intervals, held: TrainingSection, values: np.ndarray, depth: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    lower, upper = intervals.bounds(values, depth)
    return (held.target >= lower) & (held.target <= upper), upper - lower


def _third(values: Sequence[float] | np.ndarray) -> np.ndarray:
    return np.searchsorted(np.quantile(values, [1 / 3, 2 / 3]), values)


if __name__ == "__main__":
    main()
