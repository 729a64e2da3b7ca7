"""A grid of tokens beside overlapping patches: speed, and held-out scores."""

from pathlib import Path

import tokens

from _results.part import Part, Record, Table, Values, source, values_of


def measure_speed(folder: Path, quick: bool) -> Values:
    """Time a grid of tokens beside overlapping patches."""
    return values_of(tokens.speedups(folder, quick=quick))


def measure_accuracy(folder: Path, quick: bool) -> Values:
    """Score a grid of tokens beside overlapping patches, on the public sections."""
    return values_of(tokens.accuracy(folder, quick=quick))


def speed_table(record: Record) -> str:
    """Positions per second of tokens and of overlapping patches."""
    value = record["tokens"]["values"]
    lines = [
        "| network, K | tokens, positions/s | overlapping patches, positions/s | ratio | target | limit |",
        "|---|---|---|---|---|---|",
    ]
    for case in tokens.SPEEDS:
        name = f"{case.network.removeprefix('timm:')}, K = {case.k}"
        fine, overlap = value[f"{name}: tokens"], value[f"{name}: overlapping patches"]
        lines.append(
            f"| {name} | {fine:.1f} | {overlap:.2f} | {value[case.key]:.1f} | {case.target.removeprefix('>= ')} | "
            f"{case.k**2} |"
        )
    return "\n".join([*lines, "", source(record, "tokens")])


def accuracy_table(record: Record) -> str:
    """Held-out scores of tokens and of overlapping patches, by grid."""
    value = record["tokens_accuracy"]["values"]
    lines = [
        "| Pearson / depth-adjusted | `ridge` | `dense` | `dense` - `dense` on overlapping patches |",
        "|---|---|---|---|",
    ]
    for number, label in enumerate(tokens.grids(quick=False)):
        cells = [
            f"{value[f'{label}, {model}: Pearson']:z.3f} / {value[f'{label}, {model}: after depth']:z.3f}"
            for model in tokens.MODELS
        ]
        key = "pearson_difference" if number == 1 else f"pearson_difference, {label}"
        gap = (
            ""
            if number == 0
            else f"{value[key]:+.3f} [{value[f'{key}, low']:+.3f}, {value[f'{key}, high']:+.3f}]"
        )
        lines.append(f"| {label} | {' | '.join(cells)} | {gap} |")
    gap = value["pearson_difference"]
    verdict = "within" if gap >= -0.01 else "beyond"
    lines += ["", f"Tokens alone lose {-gap:.3f}, {verdict} the target of 0.01.", ""]
    return "\n".join([*lines, source(record, "tokens_accuracy")])


PARTS = (
    Part(
        "tokens",
        "`python benchmarks/tokens.py`: positions per second of tokens and of overlapping patches",
        measure_speed,
        (Table("tokens", speed_table),),
    ),
    Part(
        "tokens_accuracy",
        "the same command's held-out scores; ten minutes, most of them for the overlapping patches",
        measure_accuracy,
        (Table("tokens_accuracy", accuracy_table),),
    ),
)
