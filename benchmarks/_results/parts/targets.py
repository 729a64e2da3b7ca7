"""Every figure with a target, of benchmarks whose JSON was taken."""

from _common import Result

from _results.part import Part, Record, Table, source

OWN_TABLES = ("gpu", "tissue", "quality")
"""Benchmarks whose JSON is taken into tables of their own."""


def targets_table(record: Record) -> str:
    """One row a figure, by benchmark; benchmarks with tables of their own are left out."""
    names = [name for name, part in record.items() if name not in OWN_TABLES and part.get("targets")]
    lines = ["| benchmark | figure | measured | target | |", "|---|---|---|---|---|"]
    for name in sorted(names):
        part = record[name]
        for what, target in sorted(part["targets"].items()):
            result = Result(what, part["values"][what], part["units"].get(what, ""), target)
            verdict = "met" if result.met else "**missed**"
            value = f"{result.value:.3g} {result.unit}".strip()
            lines.append(f"| `{name}` | {what} | {value} | {target} | {verdict} |")
    return "\n".join([*lines, "", *(f"- {source(record, name)}" for name in sorted(names))])


PARTS = (
    # It is made of whatever was taken, so nothing has to be there.
    Part(
        "targets",
        "`python benchmarks/NAME.py --json FILE` of any other benchmark, and --take FILE",
        tables=(Table("targets", targets_table, needs=()),),
    ),
)
