"""Scores as a table on the terminal."""

from histosge.scores import NOISE, NOISE_LIMIT, Scores
from histosge_cli.show import out, table

COLUMNS = {
    "pearson_mean": "Pearson",
    "pearson_depth_adjusted": "depth-adjusted",
    "pearson_median": "median",
    "pearson_top50": "top 50",
    "mse": "MSE",
    "mae": "MAE",
}


def print_scores(scores: Scores) -> None:
    """Print one line a preset, mean and sd over seeds, and what the noise control says."""
    rows = []
    for preset in (*scores.presets, NOISE):
        cells = []
        for metric in COLUMNS:
            values = scores.values(preset, metric)
            spread = f" ± {values.std():.3f}" if len(values) > 1 and metric == "pearson_mean" else ""
            cells.append(f"{values.mean():.3f}{spread}")
        rows.append([preset, *cells])
    table([f"held out by {scores.split}", *COLUMNS.values()], rows)
    if not scores.noise_is_zero:
        found = scores.mean(NOISE, "pearson_mean")
        out.print(
            f"warning: the noise control scores {found:.3f}, beyond ±{NOISE_LIMIT}: do not trust these figures"
        )
