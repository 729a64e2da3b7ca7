"""What the benchmarks share: options, a slide to work on, a table and its JSON."""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from histosge.synthetic import SyntheticSection, SyntheticSpec, make_section

P = ParamSpec("P")
T = TypeVar("T")


def options(about: str) -> argparse.Namespace:
    """Read --quick and --json."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--quick", action="store_true", help="a small case, in well under a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    return parser.parse_args()


def section(folder: Path, *, quick: bool) -> SyntheticSection:
    """Make the slide: 4.4 x 4.1 mm, or 1.5 mm a side for a quick look."""
    return make_section(folder, SyntheticSpec(size_px=(3000, 3000)) if quick else SyntheticSpec())


def timed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[float, T]:
    """Call, and return seconds and result."""
    begun = time.perf_counter()
    result = work(*args, **kwargs)
    return time.perf_counter() - begun, result


def report(title: str, rows: Sequence[dict[str, Any]], to: Path | None) -> None:
    """Print a table, and write it as JSON with the machine it was measured on."""
    columns = list(rows[0])
    cells = [columns, *([_text(row[c]) for c in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print(f"\n{title}")
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if to is not None:
        machine = f"{platform.machine()} {platform.system()} python {platform.python_version()}"
        to.write_text(json.dumps({"title": title, "machine": machine, "rows": list(rows)}, indent=1) + "\n")


def _text(value: object) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and abs(value) < 100
        else (f"{value:.0f}" if isinstance(value, float) else str(value))
    )
