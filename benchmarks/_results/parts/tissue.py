"""How much tissue is found on made slides: the JSON of `tissue.py`."""

from _common import Result

from _results.part import Part, Record, Table, source

KINDS = {
    "usual": "usual",
    "faint": "faint: 0.35 of the usual density",
    "fainter": "0.2 of the usual density",
    "faintest": "0.1 of the usual density",
    "public_fainter": "public sections, diluted to 0.2",
    "public_faintest": "public sections, diluted to 0.1",
    "fatty": "fatty",
    "blood": "blood on the glass",
    "pen": "marks of a pen",
    "pen, with --skip pen": "the same with `--skip pen`",
    "fold": "a fold",
    "bubbles": "air bubbles",
    "dust": "dust and fibres",
    "two": "two sections",
}


def tissue_table(record: Record) -> str:
    """One row a kind of slide: how much of the tissue `texture` finds, and how much area."""
    value = record["tissue"]["values"]

    def cell(what: str) -> str:
        target = record["tissue"]["targets"].get(what, "")
        missed = Result(what, value[what], "", target).met is False
        return f"{value[what]:.3f}{' **missed**' if missed else ''}"

    lines = [
        (
            "| slides | tissue kept (target 0.95) | area over true area (target 1.3) | kept by Otsu of saturation "
            "| area by Otsu of saturation |"
        ),
        "|---|---|---|---|---|",
    ]
    for kind, title in KINDS.items():
        method = "texture"
        if kind == "pen, with --skip pen":
            kind, method = "pen", "texture_skip_pen"
        ours = " | ".join(cell(f"{what}_{method}_{kind}") for what in ("kept", "area"))
        otsu = " | ".join(
            cell(f"{what}_otsu_{kind}") if method == "texture" else "" for what in ("kept", "area")
        )
        lines.append(f"| {title} | {ours} | {otsu} |")
    return "\n".join([*lines, "", source(record, "tissue")])


PARTS = (
    Part(
        "tissue",
        "`python benchmarks/tissue.py --json FILE`, and --take FILE",
        tables=(Table("tissue", tissue_table),),
    ),
)
