"""What a map shows between and below spots, against the dense truth of a synthetic cohort.

All contenders know the same spots; the score is the mean Pearson over genes at squares of a stated side that
lie on tissue, on one section, between log1p of the true and of the mapped mean rate.

python benchmarks/superresolution.py [--quick] [--json FILE]
"""

import tempfile
from pathlib import Path

import numpy as np
from _common import Result, options, report
from numpy.typing import NDArray
from scipy.interpolate import LinearNDInterpolator, NearestNDInterpolator
from scipy.spatial import cKDTree

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import Patches, Section
from histosge.data.spot_overlap import spots_from_patches
from histosge.heldout.metrics import correlate
from histosge.models.registry import load_preset
from histosge.prediction.conditioning import ConditionedModel
from histosge.synthetic import SyntheticSpec, load_truth, make_cohort, truth_at
from histosge.training.model_card import ModelCard
from histosge.training.saved_model import SavedModel

SPEC = GridSpec(mpp=0.5, patch_px=112, stride_px=32)
SIDES_UM = (8.0, 16.0, 55.0, 110.0)
PRESETS = ("ridge", "dense", "dense+spots")
MOST = 6000
"""Squares scored at one side, at most."""


def main() -> None:
    """Make a cohort, train on its spots, and score maps of its first section."""
    asked = options(__doc__)
    n_sections, side = (2, 2000) if asked.quick else (4, 2600)
    encoder = "colour" if asked.quick else "morphology"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        cohort = make_cohort(folder, SyntheticSpec(size_px=(side, side)), n_sections)
        embed(str(cohort.sheet), str(folder / "store"), EmbedSettings(encoders=(encoder,), spec=SPEC))
        loaded = load_sections(str(cohort.sheet), str(folder / "store"), Selection())
        truth = load_truth(cohort.sections[0].truth)
        sections = [item.section for item in loaded]
    results = score_maps(sections, truth)
    report(f"superresolution ({encoder}, {n_sections} sections)", results, asked)


def score_maps(sections: list[Section], truth) -> list[Result]:  # type: ignore[no-untyped-def]
    """Return one figure per contender and side, and how well discs keep their values."""
    first, genes = sections[0], truth.genes
    training = [training_section(s, genes) for s in sections]
    models = {preset: load_preset(preset).fit(training) for preset in PRESETS}
    rates = {name: np.expm1(model.predict(first.patches)) for name, model in models.items()}
    xy_um, measured = first.spots.xy_um, np.expm1(training[0].target)
    near, linear = NearestNDInterpolator(xy_um, measured), LinearNDInterpolator(xy_um, measured)
    rates["nearest spot"] = near(first.patches.xy_um)
    between = linear(first.patches.xy_um)
    # Beyond the outermost spots there is nothing to interpolate between.
    rates["linear interpolation"] = np.where(np.isnan(between), rates["nearest spot"], between)
    predictable = np.array([not gene.startswith("NOISE") for gene in genes])
    results, scores = [], {}
    for side_um in SIDES_UM:
        squares = _squares(first.patches, side_um)
        true = truth_at(truth, squares, side_um)
        there = np.isfinite(true).all(axis=1)
        for name, values in rates.items():
            mapped = _over_squares(first.patches, values, squares[there], side_um)
            pearson, _ = correlate(np.log1p(true[there]), np.log1p(mapped), np.zeros(there.sum()))
            scores[name, side_um] = float(pearson.mean())
            results.append(Result(f"{name}, {side_um:.0f} um: all genes", pearson.mean(), "Pearson"))
            results.append(
                Result(f"{name}, {side_um:.0f} um: all but noise", pearson[predictable].mean(), "Pearson")
            )
    gain = scores["dense", 16.0] - scores["ridge", 16.0]
    results.append(Result("dense - ridge at 16 um", gain, "Pearson", ">= 0.05"))
    return [*results, *_discs(first, models["dense"], genes)]


def _discs(section: Section, model, genes: tuple[str, ...]) -> list[Result]:  # type: ignore[no-untyped-def]
    """Condition a map on its spots, and compare the mean over each disc with the spot's value."""
    card = ModelCard("dense", genes, {}, {}, {}, (), 0)
    conditioned = ConditionedModel.fit(SavedModel(model, card, ""), section)
    found = np.expm1(spots_from_patches(section.overlap, conditioned.predict(section.patches)).astype(float))
    off = np.abs(found / np.maximum(conditioned.spot_rates, 1e-3) - 1)
    return [
        Result("disc means off the spot's value: median", float(np.median(off)), "share"),
        Result("disc means off the spot's value: most", float(off.max()), "share", "<= 0.01"),
    ]


def _squares(patches: Patches, side_um: float) -> NDArray[np.float64]:
    """Return centres of squares on the patches' tissue, thinned evenly to `MOST`."""
    low, high = patches.xy_um.min(axis=0), patches.xy_um.max(axis=0)
    x, y = (np.arange(a + side_um / 2, b, side_um) for a, b in zip(low, high, strict=True))
    grid = np.stack([axis.ravel() for axis in np.meshgrid(x, y)], axis=1)
    distance, _ = cKDTree(patches.xy_um).query(grid)
    grid = grid[np.asarray(distance) <= patches.stride_um]
    return grid[:: -(-len(grid) // MOST)]


def _over_squares(
    patches: Patches, rates: NDArray[np.floating], squares: NDArray[np.float64], side_um: float
) -> NDArray[np.float64]:
    """Return the mean rate of the patches in each square; of the nearest where a square holds none."""
    tree = cKDTree(patches.xy_um)
    inside = tree.query_ball_point(squares, side_um / 2, p=np.inf)
    _, nearest = tree.query(squares)
    return np.stack([rates[some or [i]].mean(axis=0) for some, i in zip(inside, nearest, strict=True)])


if __name__ == "__main__":
    main()
