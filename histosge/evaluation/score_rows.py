"""Rows of scores.csv and genes.csv, gathered while methods are fitted."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.events import OnProgress, Progress
from histosge.evaluation.annotated_domains import HeldOutDomains, domain_rows
from histosge.evaluation.bin_scores import BinScores
from histosge.evaluation.methods import (
    DEPTH,
    AblationMethod,
    LibrarySizeMethod,
)
from histosge.evaluation.paired_bootstrap import PairedBootstrap
from histosge.evaluation.task_scorer import MethodScore, TaskScorer
from histosge.evaluation.tasks import Task
from histosge.heldout.metrics import GeneScores

SCORE_SCHEMA = {
    "preset": pl.String,
    "split": pl.String,
    "fold": pl.String,
    "seed": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
}


@dataclass
class ScoreTable:
    """Collects the rows of scores.csv and genes.csv while fits go by.

    Parameters
    ----------
    n_fits
        How many there will be, for `on_progress`.
    halo_um
        Preset -> how far beyond a patch it looked, at most.
    bin_suffix
        Ends the names of metrics at bins; empty where none are scored.
    """

    split: str
    n_fits: int
    on_progress: OnProgress
    bootstrap: PairedBootstrap
    rows: list[tuple[str, str, str, int, str, float]] = field(default_factory=list)
    genes: list[pl.DataFrame] = field(default_factory=list)
    halo_um: dict[str, float] = field(default_factory=dict)
    done: int = 0
    domains: HeldOutDomains | None = None
    bin_suffix: str = ""

    def report_progress(self, preset: str, task: Task | None) -> None:
        """Report how far it is, before a fit; without a task: at the end."""
        label = f"{preset}, fold {task.fold.name}, seed {task.seed}" if task else "scored"
        self.on_progress(Progress(self.done, self.n_fits, label))

    def add(self, preset: str, result: MethodScore) -> None:
        """Add the rows of one fit."""
        top = result.task.top_genes()
        values = result.genes.summary(top)
        if result.all_spots is not None:
            values["paper_all_spots"] = result.all_spots
        if result.bins is not None:
            values |= result.bins.values
        key = self.add_rows(preset, result.task, values)
        rows = _gene_rows(key, result.task.genes, result.genes, top)
        self.genes.append(rows.with_columns(self._bin_columns(result.bins)))
        # It may differ from fold to fold: that of the published network follows the distance between spots.
        self.halo_um[preset] = max(result.fitted.halo_um, self.halo_um.get(preset, 0.0))
        self.done += 1

    def add_depth_at_bins(self, scorer: TaskScorer) -> None:
        """Add what depth alone scores at bins, also where nobody asked for it."""
        # At few counts a gene's logarithm follows the depth most of all.
        fitted = LibrarySizeMethod().fit(scorer.task, scorer.epochs)
        scores = scorer.bins.score_method(scorer.task, fitted) if scorer.bins else None
        if scores is not None:
            self.add_rows(DEPTH, scorer.task, scores.values)

    def _bin_columns(self, bins: BinScores | None) -> list[pl.Series | pl.Expr]:
        """Return the columns of genes.csv at bins, empty where this fit was not scored there."""
        if not self.bin_suffix:
            return []
        names = (f"pearson_{self.bin_suffix}", f"pearson_within_spots_{self.bin_suffix}")
        if bins is None:
            return [pl.lit(None, dtype=pl.Float64).alias(name) for name in names]
        return [
            pl.Series(name, values)
            for name, values in zip(names, (bins.pearson, bins.within_spots), strict=True)
        ]

    def add_domains(self, preset: str, result: MethodScore, *, with_measured: bool = False) -> None:
        """Add held-out predictions to the domains, where an annotation was given; and what was measured there."""
        if self.domains is None:
            return
        # The seed of a control is its draw, as in its other rows.
        self.domains.add(preset, result.task.seed, result.held_out, result.predicted)
        if with_measured:
            self.domains.add_measured(result.task.seed, result.held_out)

    def score_domains(self) -> pl.DataFrame | None:
        """Return the table of domains, and add its means to the rows; None without an annotation."""
        if self.domains is None:
            return None
        found = self.domains.table()
        self.rows += domain_rows(found)
        return found

    def add_ablation(self, method: AblationMethod, result: MethodScore, on_noise: MethodScore | None) -> None:
        """Add what the published code would report, and what the same code makes of random embeddings."""
        values = {"as_reported": _reported(method, result)}
        if on_noise is not None:
            values["pearson_mean_on_noise"] = float(on_noise.genes.pearson.mean())
            values["paper_all_spots_on_noise"] = _published_figure(on_noise)
            values["as_reported_on_noise"] = _reported(method, on_noise)
        self.add_rows(method.name, result.task, values)

    def add_rows(self, preset: str, task: Task, values: Mapping[str, float]) -> tuple[str, str, str, int]:
        """Add a row for each value, and return what the rows begin with."""
        key = (preset, self.split, task.fold.name, task.seed)
        self.rows += [(*key, metric, value) for metric, value in values.items()]
        return key


def _reported(method: AblationMethod, result: MethodScore) -> float:
    return _published_figure(result) if method.reports_all_spots else float(result.genes.pearson.mean())


def _published_figure(result: MethodScore) -> float:
    return np.nan if result.all_spots is None else result.all_spots


def _gene_rows(
    key: tuple[str, str, str, int], genes: tuple[str, ...], scores: GeneScores, top: NDArray[np.bool_]
) -> pl.DataFrame:
    preset, split, fold, seed = key
    columns = {
        "gene": list(genes),
        "pearson": scores.pearson,
        "pearson_depth_adjusted": scores.pearson_depth_adjusted,
        "pearson_undefined": scores.undefined,
        **{metric.name: values for metric, values in scores.values.items()},
        "top50": top,
    }
    # Literals, not columns of their own: a table of 20 draws repeats each label as often as there are genes.
    labels = [
        pl.lit(preset).alias("preset"),
        pl.lit(split).alias("split"),
        pl.lit(fold).alias("fold"),
        pl.lit(seed, dtype=pl.Int64).alias("seed"),
    ]
    return pl.DataFrame(columns).select(*labels, pl.all())
