"""What each coding of embeddings takes, and what it loses."""

from pathlib import Path

from _codings import CODINGS, codings

from _results.part import Part, Record, Table, Values, source, values_of


def measure(folder: Path, quick: bool) -> Values:
    """Write the public sections' store in each coding, and score `dense` on it."""
    return values_of(codings(folder, quick=quick))


def codings_table(record: Record) -> str:
    """What each coding of embeddings takes, and what it loses."""
    value = record["codings"]["values"]
    lines = [
        "| `--store-as` | size | write MB/s | read MB/s | 1 - cosine, mean / largest | held-out Pearson of `dense` |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | {value[f'{name}: size']:.2f} | {value[f'{name}: write']:.0f} | {value[f'{name}: read']:.0f} | "
        f"{abs(value[f'{name}: 1 - cosine, mean']):.1g} / {abs(value[f'{name}: 1 - cosine, largest']):.1g} | "
        f"{value[f'{name}: held-out Pearson of dense']:.4f} |"
        for name in CODINGS
        if f"{name}: size" in value
    ]
    return "\n".join([*lines, "", source(record, "codings")])


PARTS = (
    Part(
        "codings",
        "`python benchmarks/storage.py --part codings`: bytes, speed and accuracy of `embed --store-as`",
        measure,
        (Table("codings", codings_table),),
    ),
)
