"""All figures of one benchmark, beside their targets: for pages that say more of it than the table of targets holds."""

from functools import partial

from _common import Result

from _results.part import Part, Record, Table, source

NAMES = (
    "contention",
    "distributed",
    "faults",
    "planning",
    "reading",
    "retraining",
    "streaming",
    "training",
    "viewing",
)


def figures_table(name: str, record: Record) -> str:
    """One row a figure, in the order in which the benchmark prints them."""
    part = record[name]
    units, targets = part.get("units", {}), part.get("targets", {})
    lines = ["| | measured | target | |", "|---|---|---|---|"]
    for what in part.get("order", part["values"]):
        result = Result(what, part["values"][what], units.get(what, ""), targets.get(what, ""))
        verdict = {None: "", True: "met", False: "**missed**"}[result.met]
        value = f"{result.value:,.3g}" if abs(result.value or 0) < 1000 else f"{result.value:,.0f}"
        lines.append(f"| {what} | {value} {result.unit} | {result.target} | {verdict} |")
    return "\n".join([*lines, "", source(record, name)])


PARTS = (
    # Of whatever was taken: each table is written as soon as the JSON of its benchmark is there.
    Part(
        "figures",
        f"`python benchmarks/NAME.py --json FILE` of {', '.join(NAMES)}, and --take FILE",
        tables=tuple(Table(f"figures_{name}", partial(figures_table, name), needs=(name,)) for name in NAMES),
    ),
)
