"""Whether trust and 90 % intervals hold: on genes that are smooth in space alone, and on sections and donors held out.

python benchmarks/calibration.py [--quick] [--json FILE]

Smooth genes: Gaussian random fields at the spots' positions that have nothing to do with the picture. Fields are the genes
of a training of their own, which is calibrated as `histosge train` does; the table gives the share that is called trusted,
by correlation length (spot pitches), number of sections and preset. The covariance at distance d is
exp(-d^2 / (2 length^2)), without any noise: the hardest case. Beside it the genes of the synthetic cohort that are tied to
morphology, trained as they are. The same fields on the positions and `morphology` embeddings of the public sections stand
in a further table, where those are present (not with --quick).

Coverage is given over all held-out spots and per third of their own total counts and of predicted depth, with one
half width per gene and with those of the strata that calibration chose (the same where it chose one).
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from _common import Result, options, report
from _public import embed_public, public_sheet
from scipy.spatial.distance import cdist

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.calibration.conformal import Intervals, calibrate, coverage, predict_spots
from histosge.data.genes import choose_genes
from histosge.data.section_loading import LoadedSection, Selection, load_sections, training_section
from histosge.data.sections import Section, TrainingSection
from histosge.models.registry import load_preset
from histosge.synthetic import SyntheticSpec, make_cohort

SPEC = GridSpec(mpp=0.5, patch_px=112, stride_px=56)
GENES = 250
PRESETS = ("ridge", "dense")
LENGTHS = (0.5, 1.5, 3.0, 5.0)
# Fields a training: all of them are genes of one fit.
FIELDS, QUICK_FIELDS = 500, 200
SEEDS, QUICK_SEEDS = (0, 1, 2, 3, 4), (0, 1)
"""Of the cohorts; everything was developed on seeds from 100 on."""
SIDE_PX = 3000
SPOT_UM, PUBLIC_SPOT_UM = 55.0, 100.0

Held = tuple[list[TrainingSection], TrainingSection]


def main() -> None:
    """Print and record what `measure` gives."""
    asked = options(__doc__)
    report("calibration", measure(quick=asked.quick), asked)


def measure(*, quick: bool) -> list[Result]:
    """Measure trust on smooth fields, then coverage."""
    sheet = None if quick else public_sheet()
    results = smooth_table(QUICK_SEEDS if quick else SEEDS, QUICK_FIELDS if quick else FIELDS, quick=quick)
    public: list[Section] = []
    if sheet is not None:
        with tempfile.TemporaryDirectory() as name:
            public = [item.section for item in embed_public(sheet, Path(name))]
        for preset in PRESETS:
            for sections, label in ((public[:1], "C2"), (public, "C2-C4")):
                for length in LENGTHS:
                    share = trusted_fields(sections, preset, length, FIELDS, PUBLIC_SPOT_UM, seed=0)
                    results.append(
                        Result(f"fields on {label}, {preset}, length {length}: trusted", share, "share")
                    )
    results += coverage_table(quick=quick)
    if public:
        results += by_depth("public", _public_folds(public), PUBLIC_SPOT_UM)
    return results


def smooth_table(seeds: Sequence[int], n_fields: int, *, quick: bool) -> list[Result]:
    """Return the share of fields, and of genes tied to morphology, that are called trusted."""
    trusted: dict[tuple[str, int, float], list[float]] = {}
    tied: dict[tuple[str, int], list[float]] = {}
    for seed in seeds:
        sections = [item.section for item in made_cohort(seed, 3)]
        genes = sections[0].spots.genes
        own = np.array([gene.startswith("MORPH") for gene in genes])
        donors = [section.spots.donor for section in sections]
        for preset in PRESETS:
            for n_sections in (1, 3):
                some = sections[:n_sections]
                for length in LENGTHS:
                    share = trusted_fields(some, preset, length, n_fields, SPOT_UM, seed)
                    trusted.setdefault((preset, n_sections, length), []).append(share)
                training = [training_section(section, genes) for section in some]
                intervals = calibrate(load_preset(preset).fit, training, SPOT_UM, donors=donors[:n_sections])
                assert intervals is not None
                tied.setdefault((preset, n_sections), []).append(float(intervals.trusted[own].mean()))
    results = [
        Result(
            f"fields, {n} section{'s' * (n > 1)}, {preset}, length {length}: trusted",
            float(np.mean(shares)),
            "share",
        )
        for (preset, n, length), shares in sorted(
            trusted.items(), key=lambda cell: (cell[0][1], cell[0][0], cell[0][2])
        )
    ]
    results += [
        Result(
            f"tied to morphology, {n} section{'s' * (n > 1)}, {preset}: trusted",
            float(np.mean(shares)),
            "share",
        )
        for (preset, n), shares in sorted(tied.items(), key=lambda cell: cell[0][1])
    ]
    worst = max(float(np.mean(shares)) for shares in trusted.values())
    least = min(float(np.mean(shares)) for (_, n), shares in tied.items() if n == 3)
    return [
        *results,
        Result("smooth_trusted_max", worst, "share", f"<= {0.03 if quick else 0.02}"),
        Result("tied_trusted", least, "share", ">= 0.9"),
    ]


def made_cohort(seed: int, n_sections: int, side_px: int = SIDE_PX) -> list[LoadedSection]:
    """Make sections of a donor each, and encode them with `colour`."""
    with tempfile.TemporaryDirectory() as name:
        spec = SyntheticSpec(size_px=(side_px, side_px), seed=seed, programme_seed=seed)
        cohort = make_cohort(Path(name), spec, n_sections)
        embed(str(cohort.sheet), f"{name}/store", EmbedSettings(encoders=("colour",), spec=SPEC))
        return load_sections(str(cohort.sheet), f"{name}/store", Selection())


def trusted_fields(
    sections: Sequence[Section], preset: str, length: float, n_fields: int, spot_um: float, seed: int
) -> float:
    """Return the share of smooth fields that a training on them calls trusted."""
    rng = np.random.default_rng([seed, len(sections), round(10 * length)])
    training = []
    for section in sections:
        plain = training_section(section, section.spots.genes[:1])
        # From the covariance itself, not by the Fourier transform that makes the control: two hands.
        distance = cdist(plain.spot_xy_um, plain.spot_xy_um)
        pitch = np.median(np.sort(distance, axis=1)[:, 1])
        values, vectors = np.linalg.eigh(np.exp(-((distance / pitch) ** 2) / (2 * length**2)))
        draws = rng.standard_normal((len(values), n_fields))
        field = (vectors * np.sqrt(np.maximum(values, 0))) @ draws
        # Around 4, where log1p(CP10k) of an expressed gene lies: a prediction is not cut off at 0.
        training.append(replace(plain, target=(4 + 0.5 * field).astype(np.float32)))
    donors = [section.spots.donor for section in sections]
    intervals = calibrate(load_preset(preset).fit, training, spot_um, donors=donors)
    assert intervals is not None
    return float(intervals.trusted.mean())


def coverage_table(*, quick: bool) -> list[Result]:
    """Return the coverage on sections and donors that took no part."""
    # 9 donors to train on: the least that hierarchical limits take.
    n_sections, held_out, side = (5, 2, 2000) if quick else (12, 3, SIDE_PX)
    loaded = made_cohort(0, n_sections, side)
    genes = loaded[0].section.spots.genes
    sections = [training_section(item.section, genes) for item in loaded]
    donors = [item.section.spots.donor for item in loaded]
    training, unseen = sections[:-held_out], sections[-held_out:]
    results: list[Result] = []
    for preset in PRESETS:
        fit = load_preset(preset).fit
        model = fit(training)
        predicted = [(s.target, *predict_spots(model, s)) for s in unseen]
        # As if all were of one donor, and by donor.
        for who, names in (("sections", []), ("donors", donors[:-held_out])):
            intervals = calibrate(fit, training, SPOT_UM, donors=names)
            assert intervals is not None
            covered = [coverage(intervals, *each) for each in predicted]
            share = float(np.mean(covered))
            if who == "sections":
                results += [
                    Result(f"{preset}: coverage", share, "share", ">= 0.88"),
                    Result(f"{preset}: coverage, at most", share, "share", "<= 0.92"),
                    Result(
                        f"{preset}: coverage of the worst gene",
                        float(np.mean(covered, axis=0).min()),
                        "share",
                    ),
                ]
            else:
                results.append(
                    Result(f"{preset}: coverage, {intervals.method} ({intervals.claim})", share, "share")
                )
            if preset == "dense":
                results.append(Result(f"coverage_{who}", share, "share"))
    results += by_depth("made", ((training, s) for s in unseen), SPOT_UM)
    return results


def _public_folds(sections: Sequence[Section]) -> Iterator[Held]:
    for k in range(len(sections)):
        genes = choose_genes([s.spots for i, s in enumerate(sections) if i != k], GENES)
        every = [training_section(s, genes) for s in sections]
        yield every[:k] + every[k + 1 :], every[k]


def by_depth(what: str, folds: Iterator[Held], spot_um: float) -> list[Result]:
    """Compare one half width per gene with what calibration chose, for `dense`, over all folds together."""
    found: dict[str, list[tuple[np.ndarray, ...]]] = {"one width": [], "as chosen": []}
    fit, n_strata, trusted, known = load_preset("dense").fit, [], [], {}
    for training, held in folds:
        key = tuple(id(s) for s in training)
        if key not in known:
            known = {key: (calibrate(fit, training, spot_um), fit(training))}
        intervals, model = known[key]
        assert intervals is not None
        n_strata.append(intervals.config()["depth_strata"])
        trusted.append(float(intervals.trusted.mean()))
        values, depth = predict_spots(model, held)
        assert depth is not None
        assert held.library is not None
        for name, some in (("one width", replace(intervals, strata=None)), ("as chosen", intervals)):
            found[name].append((*_inside(some, held, values, depth), _third(held.library), _third(depth)))
    results = [
        Result(f"{what}: strata chosen, mean of folds", float(np.mean(n_strata))),
        Result(f"{what}: genes trusted, mean of folds", float(np.mean(trusted)), "share"),
    ]
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
