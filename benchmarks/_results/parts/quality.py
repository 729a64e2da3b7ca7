"""How well quality flags find what was painted: the JSON of `quality.py`."""

from _common import Result

from _results.part import Part, Record, Table, source
from featurestore.tissue.flags import NAMES


def quality_table(record: Record) -> str:
    """One row a quality flag."""
    value, target = record["quality"]["values"], record["quality"]["targets"]

    def area(name: str) -> str:
        result = Result(name, value[f"auc_{name}"], "", target[f"auc_{name}"])
        return f"{result.value:.3f}{'' if result.met else ' **missed**'}"

    lines = [
        "| flag | area under the ROC curve (target 0.9) | found | flagged wrongly |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {area(name)} | {value[f'found_{name}']:.0%} | {value[f'false_{name}']:.1%} |"
        for name in NAMES
    ]
    lines += [
        "",
        f"Of the patches of clean slides {value['clean_flagged']:.1%} have a flag. {value['patches']:,.0f} patches.",
        "",
        source(record, "quality"),
    ]
    return "\n".join(lines)


PARTS = (
    Part(
        "quality",
        "`python benchmarks/quality.py --json FILE`, and --take FILE",
        tables=(Table("quality", quality_table),),
    ),
)
