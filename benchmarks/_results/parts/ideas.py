"""What each part of `dense` gives, on every encoder at hand."""

from pathlib import Path

import ideas

from _results.part import Part, Record, Table, Values, source, values_of
from histosge.evaluation.results import NOISE

METHODS = tuple(
    f"{prefix}{name}"
    for prefix in ideas.CHOICES
    for name in ("ridge", *(variant.name for variant in ideas.VARIANTS), NOISE)
)
"""Rows of the table, in its order."""
_QUOTED = ("ridge", "dense", "seurat_v3")

ENCODER_TITLES = {
    "colour": "`colour`, 6 numbers",
    "morphology": "`morphology`, 164 numbers",
    "random": "ResNet-18 with random weights, 512 numbers",
    "pretrained": "EfficientNet-Lite0 (ImageNet), 1,280 numbers",
}
"""Label of an encoder in the record -> how pages name it."""


def measure(folder: Path, quick: bool) -> Values:
    """Score the variants of `dense` on the public sections, for every encoder at hand."""
    return values_of(ideas.measure(ideas.load(folder, quick=quick), quick=quick))


def ideas_table(record: Record) -> str:
    """What each part of `dense` gives, by encoder."""
    value, titles = record["ideas"]["values"], ENCODER_TITLES
    encoders = [name for name in titles if f"{name}, dense: Pearson" in value]
    lines = [
        "| Pearson / depth-adjusted | " + " | ".join(titles[name] for name in encoders) + " |",
        "|---|" + "---|" * len(encoders),
    ]
    methods = [
        what.removeprefix(f"{encoders[0]}, ").removesuffix(": Pearson")
        for what in value
        if what.startswith(f"{encoders[0]}, ") and what.endswith(": Pearson")
    ]
    for method in sorted(methods, key=METHODS.index):
        cells = [
            f"{value[f'{name}, {method}: Pearson']:z.3f} / {value[f'{name}, {method}: after depth']:z.3f}"
            for name in encoders
        ]
        title = " ".join(f"`{word}`" if word in _QUOTED else word for word in method.split(" "))
        lines.append(f"| {title} | {' | '.join(cells)} |")
    for key, title in (("", ""), ("_seurat_v3", "`seurat_v3` ")):
        if f"gain_{encoders[0]}{key}" in value:
            gains = [f"{value[f'gain_{name}{key}']:+.3f}" for name in encoders]
            lines.append(f"| {title}`dense` - `ridge` | {' | '.join(gains)} |")
    if (both := "two encoders, dense: Pearson") in value:
        adjusted = value["two encoders, dense: after depth"]
        lines += [
            "",
            f"`dense` on the pretrained network and `morphology` averaged: {value[both]:z.3f} / {adjusted:z.3f}.",
        ]
    lines += [
        "",
        f"The least gain of `dense` over `ridge` on a section is {value['worst_fold']:+.3f}.",
        "",
        source(record, "ideas"),
    ]
    return "\n".join(lines)


PARTS = (
    Part(
        "ideas",
        "`python benchmarks/ideas.py`: what each part of `dense` gives, on every encoder at hand",
        measure,
        (Table("ideas", ideas_table),),
    ),
)
