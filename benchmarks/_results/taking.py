"""The JSON of another benchmark as a part of the record."""

from collections.abc import Mapping
from typing import Any

from _common import commit

from _results.catalogue import MEASURED
from _results.record import ROOT, digits


def taken(document: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the name and the part of a record that the JSON of another benchmark is."""
    # The first word is the benchmark's file, what follows says on what it ran.
    name, _, about = str(document["benchmark"]).partition(" ")
    if name in MEASURED or not (ROOT / "benchmarks" / f"{name}.py").is_file():
        raise SystemExit(
            f"--take needs the JSON of a benchmark that is no part of its own; this is of {name!r}"
        )
    if (name, about) == ("gpu", "(cpu)"):
        raise SystemExit("gpu.py found no GPU where this JSON was written; only figures of one are shown")
    figures = [one for one in document["results"] if one["value"] is not None]
    return name, {
        "command": f"python benchmarks/{name}.py{' --quick' if document['quick'] else ''}",
        # A machine with a GPU may have no git.
        "commit": document["commit"] or commit(),
        "date": document["date"][:10],
        "machine": f"{about.strip('()')}, {document['machine']}" if name == "gpu" else document["machine"],
        "values": {one["what"]: digits(one["value"]) for one in figures},
        "units": {one["what"]: one["unit"] for one in figures if one["unit"]},
        # The record sorts its keys.
        "order": [one["what"] for one in figures],
        "targets": {one["what"]: one["target"] for one in figures if one["target"]},
    }
