"""What each idea in `dense` gives, on held-out sections: from one ridge to the whole, a step at a time.

python benchmarks/ideas.py [--quick] [--json FILE]

Leave-section-out on the sections of ``$HISTOSGE_DATA/cohort.csv`` where that is set, else on synthetic ones; 250
genes chosen on the training part, `morphology`. Mean Pearson per gene, and the same after depth is taken out. Every
variant goes through the scoring of `histosge evaluate`, the control on random embeddings beside them.
"""

import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _common import Result, options, report
from numpy.typing import NDArray

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.gaussian_pooling import Moment
from histosge.data.section_loading import Selection, load_sections
from histosge.data.sections import Section, TrainingSection
from histosge.evaluation.methods import MapModel, ModelMethod
from histosge.evaluation.results import NOISE, VARIANT
from histosge.evaluation.runner import noise_control, score_plan
from histosge.evaluation.tasks import Plan, Task
from histosge.models import dense
from histosge.models.dense import DenseModel
from histosge.models.estimators import find_estimator
from histosge.models.linear_algebra import Affine, RidgePath, Standardiser, choose_penalties, spatial_groups
from histosge.models.low_rank_targets import LowRankTargets
from histosge.models.multiscale import MOMENTS, MultiscaleFeatures, moment_columns, spot_features
from histosge.models.stacking import RIDGE_MOMENTS, fit_stack
from histosge.synthetic import SyntheticSpec, make_cohort

SPEC = GridSpec(mpp=0.7, patch_px=320, stride_px=80)
"""224 µm patches every 56 µm."""
GENES = 250
OWN = (Moment(0.0, "mean"),)
NEAR = (*OWN, Moment(80.0, "mean"), Moment(80.0, "sd"))


@dataclass(frozen=True)
class Variant:
    """A way to fit, under a name; `prepare` may change what it is given."""

    name: str
    how: Callable[[Sequence[TrainingSection], int], DenseModel]
    change: Callable[[Task], Task] = lambda task: task
    kind: str = VARIANT

    def prepare(self, task: Task) -> Task:
        """Return the task that it sees."""
        return self.change(task)

    def fit(self, task: Task, epochs: int | None) -> MapModel:
        """Fit on the training part."""
        return MapModel(self.how(task.training(), task.seed))


def ridges(
    inputs_of_ridges: Sequence[Sequence[Moment]],
    patterns: int = dense.N_PATTERNS,
    *,
    field: bool = False,
    equal: bool = False,
) -> Callable[[Sequence[TrainingSection], int], DenseModel]:
    """Return a fit of the mean of ridges on some moments each; with `field`, of the stack of `dense`, or its equal mean."""

    def fit(sections: Sequence[TrainingSection], seed: int) -> DenseModel:
        features, targets = MultiscaleFeatures.fit(sections), LowRankTargets.fit(sections, patterns)
        spots, groups = spot_features(sections, features), spatial_groups(sections)
        Y = np.concatenate([targets.to_patterns(s) for s in sections])
        if field:
            stack = fit_stack(spots, Y, groups)
            if equal:
                weights = (1 / len(stack.weights),) * len(stack.weights)
                stack = fit_stack(spots, Y, groups, replace(stack, weights=weights))
            return DenseModel(features, stack.affine, targets, ())
        weight, offset = np.zeros((spots.features.shape[1], Y.shape[1])), np.zeros(Y.shape[1])
        for moments in inputs_of_ridges:
            columns = moment_columns(moments, spots.features.shape[1] // len(MOMENTS))
            standardiser = Standardiser.fit(spots.features[:, columns])
            inputs = standardiser.apply(spots.features[:, columns])
            ridge = RidgePath.fit(inputs, Y).solve(choose_penalties(inputs, Y, groups)).after(standardiser)
            weight[columns] += ridge.weight / len(inputs_of_ridges)
            offset += ridge.offset / len(inputs_of_ridges)
        return DenseModel(features, Affine(weight, offset), targets, ())

    return fit


def whole(loss: str = "mse") -> Callable[[Sequence[TrainingSection], int], DenseModel]:
    """Return the fit of `dense` itself."""
    return lambda sections, seed: DenseModel.fit(sections, seed=seed, loss=loss)


def per_slide(task: Task) -> Task:
    """Bring every feature of every slide to mean 0 and spread 1: all of a slide's patches may be seen for that."""

    def standardised(section: Section) -> Section:
        values: NDArray[np.float32] = section.patches.embedding
        spread = values.std(axis=0)
        scaled = (values - values.mean(axis=0)) / np.where(spread > 0, spread, 1)
        return replace(section, patches=section.patches.with_embedding(scaled.astype(np.float32)))

    return task.with_sections([standardised(section) for section in task.sections])


VARIANTS = (
    Variant("patterns of genes, a penalty each", ridges([OWN])),
    Variant("+ what lies within 80 µm", ridges([NEAR])),
    Variant("+ what lies within 160 µm", ridges([MOMENTS])),
    Variant("three ridges on other moments, averaged", ridges(RIDGE_MOMENTS)),
    Variant("+ a Gaussian process, averaged", ridges(RIDGE_MOMENTS, field=True, equal=True)),
    Variant("+ weights from held-out spots = dense", whole()),
    Variant("dense, 3 patterns", ridges((), 3, field=True)),
    Variant("dense, 5 patterns", ridges((), 5, field=True)),
    Variant("dense, 30 patterns", ridges((), 30, field=True)),
    Variant("dense, embeddings standardised per slide", whole(), per_slide),
    Variant("dense, Poisson likelihood", whole("poisson")),
    Variant("dense, negative binomial likelihood", whole("nb")),
)


def load(folder: Path, *, quick: bool) -> tuple[str, list[Section]]:
    """Embed a cohort, and return its name and sections."""
    data = os.environ.get("HISTOSGE_DATA")
    if data and not quick:
        sheet, name = f"{data}/cohort.csv", "sections of HISTOSGE_DATA"
    else:
        made = make_cohort(folder, SyntheticSpec(size_px=(2400, 2400)), 3)
        sheet, name = str(made.sheet), "synthetic sections"
    encoder = "colour" if quick else "morphology"
    embed(sheet, str(folder / "store"), EmbedSettings(encoders=(encoder,), spec=SPEC))
    return name, [item.section for item in load_sections(sheet, str(folder / "store"), Selection())]


def main() -> None:
    """Score every step."""
    asked = options(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        name, sections = load(Path(folder), quick=asked.quick)
    variants = VARIANTS[:5] if asked.quick else VARIANTS
    methods = [ModelMethod(find_estimator("ridge"), "ridge, one penalty"), *variants]
    plan = Plan.from_sections(sections, "section", GENES)
    scores = score_plan(plan, methods, noise_control(), seeds=(0,))
    results = []
    for what in (*scores.presets, NOISE):
        results.append(Result(what, scores.mean(what, "pearson_mean"), "Pearson"))
        results.append(Result("  depth-adjusted", scores.mean(what, "pearson_depth_adjusted"), "Pearson"))
    report(f"ideas ({name}, {len(sections)} folds)", results, asked.json)


if __name__ == "__main__":
    main()
