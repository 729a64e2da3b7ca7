"""What attention gains, from how many sections on, and what of it needs no attention: the JSON of `attention.py`."""

import re
from collections.abc import Mapping

from _results.part import Part, Record, Table, source

TRUTHS = {"long": "long-range", "local": "local", "permuted": "permuted"}
FIGURES = (
    "dense",
    "attention",
    "one ridge on all scales",
    "dense with the places of nests",
    "added at mixed nests",
    "added at nests apart",
    "added elsewhere",
)


def attention_table(record: Record) -> str:
    """One row a truth, means over its seeds; a figure that an earlier record lacks is a dash."""
    value = record["attention"]["values"]

    def mean(truth: str, figure: str) -> str:
        each = [v for what, v in value.items() if re.fullmatch(rf"{truth}, seed \d+: {figure}", what)]
        return f"{sum(each) / len(each):.3f}" if each else "-"

    lines = [
        (
            "| truth | `dense` | `attention` | one ridge on all scales | `dense` with the places of nests "
            "| added at mixed nests | at nests apart | elsewhere |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {name} | " + " | ".join(mean(truth, figure) for figure in FIGURES) + " |"
        for truth, name in TRUTHS.items()
    ]
    if curve := gain_by_sections(value):
        lines += ["", *curve]
    seeds = sorted({found[1] for what in value if (found := re.match(r"long, seed (\d+):", what))})
    return "\n".join([*lines, "", f"Seeds: {', '.join(seeds)}. {source(record, 'attention')}"])


def gain_by_sections(value: Mapping[str, float]) -> list[str]:
    """Return the rows of the gain on long-range genes by training sections; none where the curve was not measured."""
    gains = {
        int(found[1]): gain
        for what, gain in value.items()
        if (found := re.fullmatch(r"long, (\d+) sections: attention - dense", what))
    }
    if not gains:
        return []
    sizes = sorted(gains)
    return [
        "| long-range, training sections | " + " | ".join(map(str, sizes)) + " |",
        "|---" * (len(sizes) + 1) + "|",
        "| `attention` - `dense`, first seed | " + " | ".join(f"{gains[size]:.3f}" for size in sizes) + " |",
    ]


PARTS = (
    Part(
        "attention",
        "`python benchmarks/attention.py --json FILE`, and --take FILE",
        tables=(Table("attention", attention_table),),
    ),
)
