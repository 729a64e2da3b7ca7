"""The record in benchmarks/results.json: what was measured, by which command, when, on which commit and machine."""

import datetime as dt
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _common import commit, machine

from _results.part import Values

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results.json"


def load() -> dict[str, Any]:
    """Read the record; an empty one where nothing was measured yet."""
    return json.loads(RECORD.read_text()) if RECORD.is_file() else {}


def store(name: str, entry: Mapping[str, Any]) -> None:
    """Replace one part of the record."""
    # Read again: parts may run side by side.
    record = load()
    record[name] = entry
    RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


def digits(value: float) -> float:
    """Return a value with seven digits; not so many decimals, since a difference may be 1e-7."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def measured_now(name: str, values: Values) -> dict[str, Any]:
    """Return the entry of a part that was just measured on this working tree."""
    return {
        "command": f"python benchmarks/results.py --parts {name}",
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "values": {what: digits(value) for what, value in values.items()},
    }
