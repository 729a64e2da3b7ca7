"""Presets on synthetic donors that training has not seen, and stain normalisation there."""

from pathlib import Path

import donors

from _results.part import Part, Record, Table, Values, source, values_of
from histosge.evaluation.results import NOISE

STAIN_SEEDS = donors.SEEDS[:2]
"""Each is three times the work of another cohort."""


def measure(folder: Path, quick: bool) -> Values:
    """Score the presets that need no gradient descent on synthetic donors that training has not seen."""
    methods = donors.presets(with_networks=False)
    return values_of(donors.measure(folder, donors.SEEDS, quick=quick, methods=methods))


def measure_stains(folder: Path, quick: bool) -> Values:
    """Score ridge and `dense` on synthetic donors with and without stain normalisation."""
    return values_of(donors.measure_stains(folder, STAIN_SEEDS, quick=quick))


def donors_table(record: Record) -> str:
    """Presets on donors that training has not seen."""
    value = record["donors"]["values"]
    encoders = [name for name in donors.ENCODERS if f"{name}, dense: Pearson" in value]
    lines = [
        "| Pearson / depth-adjusted | " + " | ".join(f"`{name}`" for name in encoders) + " |",
        "|---|" + "---|" * len(encoders),
    ]
    prefix, end = f"{encoders[0]}, ", ": Pearson"
    for what in value:
        if what.startswith(prefix) and what.endswith(end):
            preset = what.removeprefix(prefix).removesuffix(end)
            cells = [
                f"{value[f'{name}, {preset}: Pearson']:z.3f} / {value[f'{name}, {preset}: after depth']:z.3f}"
                for name in encoders
            ]
            lines.append(f"| `{preset}` | {' | '.join(cells)} |")
    gain = (
        f"`dense` - `ridge` after depth, mean over encoders: {value['gain_over_ridge']:+.3f} (target 0.03)."
    )
    return "\n".join([*lines, "", gain, "", source(record, "donors")])


def stains_table(record: Record) -> str:
    """Donors that training has not seen, with and without stain normalisation."""
    value = record["stains"]["values"]
    columns = [(encoder, preset) for encoder in donors.ENCODERS for preset in ("ridge", "dense")]
    lines = [
        "| Pearson / depth-adjusted | " + " | ".join(f"`{one}` on `{on}`" for on, one in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for stain in ("none", *donors.STAINS):
        cells = [
            f"{value[f'{stain}, {encoder}, {preset}: Pearson']:z.3f} / "
            f"{value[f'{stain}, {encoder}, {preset}: after depth']:z.3f}"
            for encoder, preset in columns
        ]
        lines.append(f"| `--stain {stain}` | {' | '.join(cells)} |")
    noise = max(abs(score) for what, score in value.items() if f", {NOISE}: " in what)
    return "\n".join([*lines, "", f"Noise control: at most {noise:.3f} from 0. {source(record, 'stains')}"])


PARTS = (
    Part(
        "donors",
        "the presets without networks on synthetic donors that training has not seen; about 10 minutes",
        measure,
        (Table("donors", donors_table),),
    ),
    Part(
        "stains",
        "`python benchmarks/donors.py --stains`: the first two cohorts with and without stain normalisation",
        measure_stains,
        (Table("stains", stains_table),),
    ),
)
