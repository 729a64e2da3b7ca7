"""Encoders x presets x splits on whatever sections there are, with controls and intervals: docs/leaderboard.md.

    python benchmarks/leaderboard.py [--quick] [--json FILE] [--encoders A,B] [--splits A,B]

Sections: the public ones of ``$HISTOSGE_DATA/cohort.csv``, and a synthetic cohort. Encoders: `colour`, `morphology`, and
EfficientNet-Lite0 where its weights are installed (`_pretrained.py`). Splits: whole sections, blocks, and a checkerboard.
Everything goes through `histosge.evaluate`, as the command line does. --encoders and --splits leave the others out of the
page; all take about an hour on two idle cores. Stores are kept under ``HISTOSGE_BENCH_CACHE`` where that is set. Without
--quick the page is written; with it (a small cohort, one encoder, few presets) nothing is written.
"""

import argparse
import datetime as dt
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import polars as pl
from _common import Result, commit, machine, report
from _pretrained import PRETRAINED, efficientnet_weights
from _public import SPEC, public_sheet

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.evaluation.results import NOISE, SMOOTH_NOISE, Scores
from histosge.synthetic import SyntheticSpec, make_cohort

PAGE = Path(__file__).parents[1] / "docs" / "leaderboard.md"
IMAGE = ("mean", "ridge", "mlp", "bleep", "triplex", "dense", "depth")
"""Presets that predict tissue without measured spots, and the oracle of library size."""
SPATIAL = ("nearest", "linear", "cubic", "knn", "gp", "dense+spots")
"""Presets that need measured spots on the slide: blocks and checkerboard only."""
SYNTHETIC_SPEC = GridSpec(mpp=1.0, patch_px=112, stride_px=56)
GENES = 250


@dataclass(frozen=True)
class Cohort:
    """Embedded sections.

    Parameters
    ----------
    title
        Heading on the page.
    sheet, store
        Where they are.
    encoders
        Keys in the store.
    splits
        In the order of the page.
    genes
        Chosen on the training part.
    """

    title: str
    sheet: str
    store: str
    encoders: tuple[str, ...]
    splits: tuple[str, ...]
    genes: int

    def only(self, encoders: str | None, splits: str | None) -> "Cohort":
        """Return the cohort with some of its encoders and splits, named as ``A,B``; None keeps all."""
        return replace(
            self,
            encoders=tuple(k for k in self.encoders if encoders is None or k in encoders.split(",")),
            splits=tuple(k for k in self.splits if splits is None or k in splits.split(",")),
        )


def public_cohort(folder: Path) -> Cohort | None:
    """Embed the public sections with every encoder at hand; None where they are not there."""
    sheet, kept = public_sheet(), Path(os.environ.get("HISTOSGE_BENCH_CACHE", folder))
    if sheet is None:
        return None
    # The store of ideas.py: the same sections, grid and encoders.
    encoders, store = ["morphology", "colour"], str(kept / "ideas")
    embed(str(sheet), store, EmbedSettings(encoders=tuple(encoders), spec=SPEC))
    weights = efficientnet_weights(kept)
    if weights is not None:
        encoders.insert(0, PRETRAINED)
        settings = EmbedSettings(encoders=(PRETRAINED,), spec=SPEC, weights=((PRETRAINED, str(weights)),))
        embed(str(sheet), store, settings)
    title = "Public sections: HER2ST, patient C (3 sections of one donor)"
    return Cohort(title, str(sheet), store, tuple(encoders), ("section", "block", "checkerboard"), GENES)


def synthetic_cohort(folder: Path, wanted: str | None, *, quick: bool) -> Cohort:
    """Make and embed synthetic sections, each of a donor of its own."""
    size, n = ((2400, 2400), 3) if quick else ((4200, 3800), 4)
    made = make_cohort(folder / "made", SyntheticSpec(size_px=size), n)
    encoders = ("colour",) if quick else ("morphology", "colour")
    encoders = tuple(key for key in encoders if wanted is None or key in wanted.split(",")) or ("colour",)
    embed(made.sheet, folder / "synthetic", EmbedSettings(encoders=encoders, spec=SYNTHETIC_SPEC))
    splits: tuple[str, ...] = ("section",) if quick else ("section", "checkerboard")
    return Cohort(
        f"Synthetic cohort ({n} sections)", str(made.sheet), str(folder / "synthetic"), encoders, splits, 60
    )


def run(cohort: Cohort, split: str, presets: Sequence[str], folder: Path) -> Scores:
    """Evaluate every preset on every encoder of a cohort."""
    settings = EvaluateSettings(split=split, presets=presets, genes=cohort.genes, encoders=cohort.encoders)
    return evaluate(cohort.sheet, cohort.store, folder, settings)


def table(scores: Scores) -> pl.DataFrame:
    """Return a row for each preset on each encoder, best first; controls last."""
    means = (
        scores.scores.filter(pl.col("metric").is_in(["pearson_mean", "pearson_depth_adjusted"]))
        .group_by("preset", "encoder", "metric")
        .agg(pl.col("value").mean())
        .pivot(on="metric", index=["preset", "encoder"], values="value")
    )
    control = pl.col("preset").is_in([NOISE, SMOOTH_NOISE])
    return means.sort(control, -pl.col("pearson_mean"), "preset", "encoder")


def difference_to_ridge(scores: Scores, preset: str, encoder: str) -> str:
    """Return the paired difference to `ridge` on the same embeddings with its 95 % interval; empty where there is none."""
    if scores.differences is None:
        return ""
    rows = scores.differences.filter(
        (pl.col("metric") == "pearson_mean")
        & (pl.col("encoder_a") == encoder)
        & (pl.col("encoder_b") == encoder)
    )
    for sign, one, other in ((1, "a", "b"), (-1, "b", "a")):
        found = rows.filter((pl.col(f"preset_{one}") == preset) & (pl.col(f"preset_{other}") == "ridge"))
        if len(found):
            value, low, high = (float(found[name][0]) * sign for name in ("difference", "low", "high"))
            low, high = sorted((low, high))
            return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return ""


def section_of_page(cohort: Cohort, split: str, scores: Scores) -> str:
    """Return one table of the page."""
    lines = [
        f"### `--split {split}`",
        "",
        "| preset | encoder | Pearson | after depth | difference to `ridge` on the same encoder |",
        "|---|---|---|---|---|",
    ]
    for row in table(scores).iter_rows(named=True):
        name, encoder = row["preset"], row["encoder"]
        kind = " (control)" if name in (NOISE, SMOOTH_NOISE) else " (oracle)" if name == "depth" else ""
        difference = "" if name == "ridge" or kind else difference_to_ridge(scores, name, encoder)
        lines.append(
            f"| `{name}`{kind} | `{encoder}` | {row['pearson_mean']:z.3f} | {row['pearson_depth_adjusted']:z.3f} "
            f"| {difference} |"
        )
    return "\n".join(lines)


def page(parts: Sequence[str]) -> str:
    """Return the page."""
    date = dt.datetime.now(dt.UTC).date().isoformat()
    made = f"commit {commit()[:12]}, {date}, {machine()}"
    head = f"""# Leaderboard

Every preset on every encoder, by [the same evaluation](evaluation.md). `python benchmarks/leaderboard.py` writes this page
from the sections at hand; {made}.

- *Pearson* is the mean over genes of the correlation over held-out spots, within sections; *after depth*: library size
  regressed out first.
- Differences are paired, with 95 % bootstrap intervals over genes and spots. Sections and donors are not resampled, so the
  intervals are too narrow for new tissue. One seed.
- `noise` must be 0. `smooth_noise` has embeddings that are smooth in space and know nothing of the picture: where training
  spots surround held-out ones, smoothness alone scores that much. `depth` knows the measured library sizes.
- Presets that need measured spots on the slide are missing where whole sections are held out.
- `bleep` and `triplex` are written from the papers and use frozen embeddings: their scores are not those of the published
  software ([differences](method.md#networks-mlp-bleep-triplex)).

A row holds for the sections of its table only."""
    return "\n\n".join([head, *parts]) + "\n"


def main() -> None:
    """Score, print, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a small case; writes no page")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    parser.add_argument("--encoders", metavar="A,B", help="only these")
    parser.add_argument("--splits", metavar="A,B", help="only these")
    asked = parser.parse_args()
    results: list[Result] = []
    parts: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        public = None if asked.quick else public_cohort(folder)
        cohorts = [public] if public else []
        cohorts.append(synthetic_cohort(folder, asked.encoders, quick=asked.quick))
        for number, whole in enumerate(cohorts):
            cohort = whole.only(asked.encoders, asked.splits)
            if not cohort.encoders or not cohort.splits:
                continue
            parts.append(
                f"## {cohort.title}\n\n{cohort.genes} genes, chosen on the training part of each fold."
            )
            for split in cohort.splits:
                within = split in ("block", "checkerboard")
                presets = IMAGE[:4] if asked.quick else (*IMAGE, *(SPATIAL if within else ()))
                scores = run(cohort, split, presets, folder / f"report-{number}-{split}")
                parts.append(section_of_page(cohort, split, scores))
                results += [
                    Result(f"{split}, {row['preset']} on {row['encoder']}", row["pearson_mean"])
                    for row in table(scores).iter_rows(named=True)
                ]
    if not asked.quick:
        PAGE.write_text(page(parts))
    report("leaderboard", results, asked)


if __name__ == "__main__":
    main()
