"""How often smooth fields and genes tied to morphology are called trusted, and what intervals cover."""

from collections.abc import Mapping
from pathlib import Path

import calibration

from _results.part import Part, Record, Table, Values, source, values_of


def measure(folder: Path, quick: bool) -> Values:
    """Measure how often smooth fields are called trusted, and what intervals cover."""
    return values_of(calibration.measure(quick=quick))


def trust_table(record: Record) -> str:
    """How often smooth fields, and genes tied to morphology, are called trusted; what intervals cover."""
    value = record["trust"]["values"]

    def table(title: str, columns: tuple[str, ...], rows: Mapping[str, str]) -> list[str]:
        """Make a table with a column for each part and preset; rows are title -> name with {part} and {preset}."""
        cells = [(part, preset) for part in columns for preset in calibration.PRESETS]
        lines = [
            f"| {title} | {' | '.join(f'{part}, `{preset}`' for part, preset in cells)} |",
            "|---|" + "---|" * len(cells),
        ]
        for label, name in rows.items():
            shares = [value[name.format(part=part, preset=preset)] for part, preset in cells]
            lines.append(f"| {label} | {' | '.join(f'{share:.1%}' for share in shares)} |")
        return lines

    lengths = {
        f"smooth fields, length {length:g} spots": f"length {length}: trusted"
        for length in calibration.LENGTHS
    }
    made = {label: f"fields, {{part}}, {{preset}}, {name}" for label, name in lengths.items()}
    tied = {"genes tied to morphology": "tied to morphology, {part}, {preset}: trusted"}
    lines = table("called trusted, synthetic cohort", ("1 section", "3 sections"), made | tied)
    if any(name.startswith("fields on") for name in value):
        public = {label: f"fields on {{part}}, {{preset}}, {name}" for label, name in lengths.items()}
        lines += ["", *table("on the spots and `morphology` embeddings of", ("C2", "C2-C4"), public)]
    public = []
    if "public, as chosen: coverage" in value:
        thirds = ("low", "middle", "high")
        chosen, one = (
            " / ".join(f"{value[f'public, {name}: {third} predicted depth']:.3f}" for third in thirds)
            for name in ("as chosen", "one width")
        )
        public = [
            (
                f"On C2-C4, each held out, they cover {value['public, as chosen: coverage']:.3f}; by thirds of predicted "
                f"depth, from the lowest, {chosen} (with one width per gene for all depths {one})."
            )
        ]
    # Records of before this was measured have no such figure.
    if "public: genes trusted, mean of folds" in value:
        share = value["public: genes trusted, mean of folds"]
        public.append(f"Of the 250 genes there, {share:.0%} are trusted, within donor C only.")
    lines += [
        "",
        (
            f"90 % intervals of `dense` cover {value['coverage_sections']:.3f} of the spots of synthetic sections that took "
            f"no part, and {value['coverage_donors']:.3f} with at least 9 donors in the training, by limits "
            "that are taken over donors."
        ),
        *public,
        "",
        source(record, "trust"),
    ]
    return "\n".join(lines)


PARTS = (
    Part(
        "trust",
        "`python benchmarks/calibration.py`: smooth fields called trusted, coverage of intervals; about 5 minutes",
        measure,
        (Table("trust", trust_table),),
    ),
)
