"""From how many spots on attention adds to the linear solution.

python benchmarks/attention.py [--quick] [--json FILE]

`dense+attention` is fitted on k sections of a synthetic cohort, for a weak embedding (`colour`, 6 numbers) and a richer
one (`morphology`, 164), and scored on sections that none has seen: its linear part alone, with networks that see the
patch alone (a curve in place of a line), and with networks that look around. Beside them stands what the true rates
under the spots would score: what counting noise leaves to be had, gradients included that no picture tells.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from _common import Result, options, report, timed
from numpy.typing import NDArray

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import TrainingSection
from histosge.data.spot_overlap import spots_from_patches
from histosge.heldout.metrics import correlate
from histosge.models.attention import RADIUS_UM
from histosge.models.dense_attention import DenseAttentionModel
from histosge.models.protocol import Model
from histosge.synthetic import SyntheticSpec, load_truth, make_cohort

SPEC = GridSpec(mpp=0.5, patch_px=112, stride_px=56)
ALONE_UM = 1.0
"""A window of nothing but the patch itself."""


def main() -> None:
    """Compare at growing numbers of sections."""
    asked = options(__doc__)
    sizes, n_test, side = ((2, 4), 2, 2000) if asked.quick else ((2, 4, 8, 16), 3, 2600)
    encoders = ("colour",) if asked.quick else ("colour", "morphology")
    results = []
    with tempfile.TemporaryDirectory() as name:
        cohort = make_cohort(Path(name), SyntheticSpec(size_px=(side, side)), max(sizes) + n_test)
        embed(str(cohort.sheet), f"{name}/store", EmbedSettings(encoders=encoders, spec=SPEC))
        for encoder in encoders:
            loaded = load_sections(str(cohort.sheet), f"{name}/store", Selection(encoder=encoder))
            genes = loaded[0].section.spots.genes
            sections = [training_section(item.section, genes) for item in loaded]
            for size in sizes:
                results += compare(encoder, sections[:size], sections[-n_test:])
        truth = [
            true_spots(load_truth(made.truth), one.spot_xy_um, genes)
            for made, one in zip(cohort.sections[-n_test:], sections[-n_test:], strict=True)
        ]
        results.append(Result("the true rates", score(sections[-n_test:], truth), "Pearson"))
    report(f"attention ({n_test} sections held out)", results, asked)


def compare(
    encoder: str, training: Sequence[TrainingSection], testing: Sequence[TrainingSection]
) -> list[Result]:
    """Return mean Pearson on the held-out sections: of the linear part, and with either kind of network on top."""
    seconds, model = timed(lambda: DenseAttentionModel.fit(training))
    alone = DenseAttentionModel.fit(training, radius_um=ALONE_UM)
    spots = f"{encoder}, {sum(len(s.target) for s in training)} spots"
    shown = {"dense": model.dense, "+ patch alone": alone, "+ attention": model}
    scores = {name: score(testing, _at_spots(one, testing)) for name, one in shown.items()}
    changes = model.facts["error_change"] if model.facts else [0.0]
    return [
        *(Result(f"{spots}: {name}", value, "Pearson") for name, value in scores.items()),
        Result(f"{spots}: error on parts left out, worst change", max(changes), "share"),
        Result(f"{spots}: attention - dense", scores["+ attention"] - scores["dense"], "Pearson", ">= 0"),
        Result(f"{spots}: fit, {RADIUS_UM:.0f} um windows", seconds, "s"),
    ]


def _at_spots(model: Model, sections: Sequence[TrainingSection]) -> list[NDArray[np.float32]]:
    return [spots_from_patches(s.overlap, model.predict(s.patches)) for s in sections]


def score(sections: Sequence[TrainingSection], guesses: Sequence[NDArray[np.floating]]) -> float:
    """Return the mean Pearson over genes and sections."""
    each = [
        correlate(s.target, guess, np.zeros(len(guess)))[0].mean()
        for s, guess in zip(sections, guesses, strict=True)
    ]
    return float(np.mean(each))


def true_spots(truth, xy_um: NDArray[np.float64], genes: Sequence[str]) -> NDArray[np.float64]:  # type: ignore[no-untyped-def]
    """Return log1p of the mean true rate within 27.5 um of each spot's centre, ``(n_spots, n_genes)``."""
    order = [truth.genes.index(gene) for gene in genes]
    rates = truth.rates[order]
    rows = []
    for x, y in xy_um:
        under = (truth.x_um[None] - x) ** 2 + (truth.y_um[:, None] - y) ** 2 < 27.5**2
        rows.append(np.log1p(np.nanmean(rates[:, under], axis=1)))
    return np.stack(rows)


if __name__ == "__main__":
    main()
