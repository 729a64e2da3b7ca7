"""`ridge` and `dense` on the public sections with both choices of genes, and two encoders together."""

from pathlib import Path

import ideas

from _results.part import Part, Record, Table, Values, source, values_of
from _results.parts.ideas import ENCODER_TITLES
from histosge.evaluation.results import NOISE


def measure(folder: Path, quick: bool) -> Values:
    """Score on the public sections."""
    every = ideas.load(folder, quick=quick, with_random=False)
    return values_of(ideas.score_choices(every))


def genes_table(record: Record) -> str:
    """`ridge` and `dense` for both choices of genes."""
    value = record["genes"]["values"]
    titles = {**ENCODER_TITLES, "two encoders": "`morphology` and EfficientNet-Lite0, a fit each, averaged"}
    lines = ["| Pearson / depth-adjusted | genes | `ridge` | `dense` | noise |", "|---|---|---|---|---|"]
    for encoder, title in titles.items():
        for prefix, choice in (("", "variance of log1p"), ("seurat_v3 ", "`seurat_v3`")):
            if f"{encoder}, {prefix}dense: Pearson" not in value:
                continue
            cells = [
                f"{value[f'{name}: Pearson']:z.3f} / {value[f'{name}: after depth']:z.3f}"
                if f"{name}: Pearson" in value
                else ""
                for name in (f"{encoder}, {prefix}{preset}" for preset in ("ridge", "dense", NOISE))
            ]
            lines.append(f"| {title} | {choice} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", source(record, "genes")])


PARTS = (
    Part(
        "genes",
        "ridge and `dense` on the same sections with both choices of genes, and two encoders together; 3 minutes",
        measure,
        tables=(Table("genes", genes_table),),
    ),
)
