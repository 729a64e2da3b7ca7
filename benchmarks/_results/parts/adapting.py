"""Models of many donors on a new donor: as they are, trained anew on a few sections, and adapted to these."""

from pathlib import Path

import adapting

from _results.part import Part, Record, Table, Values, source, values_of

GAINS = (("earlier", "the earlier model"), ("alone", "the two sections alone"))


def measure(folder: Path, quick: bool) -> Values:
    """Score models of many donors adapted to sections of a new one."""
    return values_of(adapting.measure(folder, adapting.SEEDS, quick=quick))


def table(record: Record) -> str:
    """The three ways on the new donor's held-out sections, from one section and from two."""
    value = record["adapting"]["values"]
    columns = [(encoder, preset) for encoder in adapting.ENCODERS for preset in adapting.PRESETS]
    lines = [
        "| Pearson / depth-adjusted / squared error | "
        + " | ".join(f"`{one}` on `{on}`" for on, one in columns)
        + " |",
        "|---|" + "---|" * len(columns),
    ]
    rows = [("earlier", "model of eight other donors")]
    for n, sections in enumerate(("one section", "two sections"), start=1):
        rows.append((f"alone, {n}", f"training on {sections} of the new donor alone"))
        rows.append((f"adapted, {n}", f"earlier model adapted to {sections} (`--from`)"))
    for name, title in rows:
        cells = [
            f"{value[f'{encoder}, {preset}, {name}: Pearson']:z.3f} / "
            f"{value[f'{encoder}, {preset}, {name}: after depth']:z.3f} / "
            f"{value[f'{encoder}, {preset}, {name}: squared error']:.3f}"
            for encoder, preset in columns
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    gains = ", ".join(f"{value[f'gain_over_{way}']:+.3f} over {title}" for way, title in GAINS)
    found = f"`dense` adapted to two sections: {gains}. {source(record, 'adapting')}"
    return "\n".join([*lines, "", found])


PARTS = (
    Part(
        "adapting",
        "`python benchmarks/adapting.py`: models of many donors adapted to a new one; about 15 minutes",
        measure,
        (Table("adapting", table),),
    ),
)
