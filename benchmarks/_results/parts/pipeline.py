"""The pipeline without a network beside bare decoding, and where its time goes."""

from pathlib import Path

import embedding

from _results.part import Part, Record, Table, Values, source, values_of


def measure(folder: Path, quick: bool) -> Values:
    """Embed a 16k x 16k slide without a network, and decode its tiles."""
    return values_of(embedding.share_of_decoding(folder, 2 if quick else 4, 3))


def pipeline_table(record: Record) -> str:
    """The pipeline without a network beside bare decoding, and where its time goes."""
    value = record["pipeline"]["values"]
    decoding = value["bare decoding of JPEG tiles"]
    rows = (
        ("bare decoding of the tiles", "bare decoding of JPEG tiles"),
        ("`embed`, no network: bytes in, zeros out", "embed, no network"),
        ("`embed`, no network, with an encoder's floats", "embed, preprocessing"),
        ("`embed --encoder colour`", "embed, colour"),
        ("`embed --encoder morphology`", "embed, morphology"),
    )
    lines = ["| | patches per CPU-second | share of decoding |", "|---|---|---|"]
    lines += [f"| {title} | {value[what]:,.0f} | {value[what] / decoding:.2f} |" for title, what in rows]
    parts = [
        f"{what.removeprefix('profile: ')} {share:.0f} %"
        for what, share in value.items()
        if what.startswith("profile: ")
    ]
    lines += [
        "",
        f"With an encoder's floats, the CPU time goes to: {', '.join(parts)}.",
        "",
        source(record, "pipeline"),
    ]
    return "\n".join(lines)


PARTS = (
    Part(
        "pipeline",
        "part of `python benchmarks/embedding.py`: the pipeline without a network beside bare decoding; 3 minutes",
        measure,
        (Table("pipeline", pipeline_table),),
    ),
)
