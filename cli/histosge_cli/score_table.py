"""Scores as a table on the terminal."""

import polars as pl

from histosge.evaluation.bin_report import bin_header, bin_rows
from histosge.evaluation.results import NOISE, NOISE_LIMIT, Scores
from histosge_cli.console import out, table

COLUMNS = {
    "pearson_mean": "Pearson",
    "pearson_depth_adjusted": "depth-adjusted",
    "pearson_median": "median",
    "pearson_top50": "top 50",
    "mse": "MSE",
    "mae": "MAE",
}


SPREADS = {"pearson_mean", "paper_all_spots"}
ABLATION = {
    "pearson_mean": "held out",
    "paper_all_spots": "paper_all_spots",
    "as_reported": "as reported",
    "pearson_mean_on_noise": "noise: held out",
    "paper_all_spots_on_noise": "noise: paper_all_spots",
}
"""Metric -> column of the ablation's table; `paper_all_spots` counts spots that were trained on."""


def print_scores(scores: Scores) -> None:
    """Print one line a preset, mean and standard deviation over seeds, and a warning where the noise control fails."""
    rows = [
        [_label(scores, preset), *(_cell(scores, preset, metric) for metric in COLUMNS)]
        for preset in (*scores.presets, *scores.controls)
    ]
    table([f"held out by {scores.split}", *COLUMNS.values()], rows)
    variants = [p for p in scores.presets if len(scores.values(p, "as_reported"))]
    if variants:
        table(
            ["published code", *ABLATION.values()],
            [[name, *(_cell(scores, name, metric) for metric in ABLATION)] for name in variants],
        )
    means = scores.domain_means()
    if means:
        table(
            ["domains from", "ARI", "NMI"],
            [[name, f"{ari:z.3f} ± {sd:.3f}", f"{nmi:z.3f}"] for name, ari, sd, nmi in means],
        )
    if scores.bins is not None:
        table(
            [f"at bins of {scores.bins.side_um:g} µm", *bin_header(scores)],
            [list(row) for row in bin_rows(scores)],
        )
    for sentence in scores.left_out:
        out.print(f"note: {sentence}", markup=False)
    # After the table, where the eye is, since it overrules every figure in it.
    if not scores.noise_is_zero:
        found = scores.mean(NOISE, "pearson_mean")
        out.print(
            f"warning: the noise control scores {found:.3f}, beyond ±{NOISE_LIMIT}: do not trust these figures"
        )


def print_published(scores: Scores, task: str, metric: str) -> None:
    """Print the number of a benchmark's own protocol for each encoder: mean and standard deviation over its splits."""
    for encoder in scores.encoders:
        rows = scores.scores.filter((pl.col("metric") == metric) & (pl.col("encoder") == encoder))
        values = rows["value"].to_numpy()
        out.print(
            f"HEST-Benchmark {task}, {encoder}: {values.mean():.4f} ± {values.std():.4f} over {len(values)} splits (its own "
            "protocol)",
            markup=False,
        )


def _label(scores: Scores, preset: str) -> str:
    return f"{preset} (oracle)" if preset in scores.oracles else preset


def _cell(scores: Scores, preset: str, metric: str) -> str:
    values = scores.values(preset, metric)
    if not len(values):
        return ""
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 and metric in SPREADS else ""
    return f"{values.mean():z.3f}{spread}"
