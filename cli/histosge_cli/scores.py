"""Scores as a table on the terminal."""

from histosge.protocol_hest import HEST, METRICS, HestResult
from histosge.report_blocks import ABLATION_COLUMNS
from histosge.scores import NOISE, NOISE_LIMIT, ORACLES, Ablation, Scores
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
        rows.append([f"{preset} (oracle)" if preset in ORACLES else preset, *cells])
    table([f"held out by {scores.split}", *COLUMNS.values()], rows)
    if not scores.noise_is_zero:
        found = scores.mean(NOISE, "pearson_mean")
        out.print(
            f"warning: the noise control scores {found:.3f}, beyond ±{NOISE_LIMIT}: do not trust these figures"
        )


def print_ablation(found: Ablation) -> None:
    """Print one line a variant of `paper`."""
    rows = [
        [variant, *(f"{found.mean(variant, metric):.3f}" for metric in ABLATION_COLUMNS)]
        for variant in found.variants
    ]
    table([f"ablation, {found.split}", *ABLATION_COLUMNS.values()], rows)
    for reason in found.left_out:
        out.print(f"left out: {reason}", markup=False)


def print_hest(found: HestResult) -> None:
    """Print the encoder's line, and that of the noise control."""
    rows = [
        [preset, *(f"{found.values(preset, metric).mean():.3f}" for metric in METRICS)]
        for preset in (HEST, "hest_noise")
    ]
    table([f"held out by {found.split}", "Pearson", "depth-normalised", "NaN genes"], rows)
