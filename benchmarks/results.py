"""The scores in README.md and docs/: run what they come from, keep one record, and write the pages from the record.

python benchmarks/results.py [--parts demo,sections,ideas,...] [--take FILE] [--render] [--quick] [--json FILE]

Runs the parts (all without --parts) on this working tree, stores what they give in benchmarks/results.json with
commit, date, machine and command, and writes the blocks between ``<!-- results:NAME -->`` and ``<!-- /results -->`` of
the pages anew. --take FILE stores the JSON of another benchmark: its figures that have a target stand in the table of
targets, and those of `tissue.py`, `quality.py` and `gpu.py`, which needs a machine with a GPU, in tables of their own.
--render writes the pages from the record alone. --quick runs the demo's slide at a quarter of its size and writes nothing.

A part, with its tables, is one module of benchmarks/_results/parts; --help lists them all.
"""

import argparse
import json
import tempfile
from pathlib import Path

from _common import Result, report
from _results import record
from _results.catalogue import MEASURED, help_lines
from _results.pages import write_pages
from _results.taking import taken


def main() -> None:
    """Run parts, and write record and pages."""
    parser = argparse.ArgumentParser(
        description=f"{__doc__}\nParts\n{help_lines()}\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(MEASURED), help="which, separated by commas")
    parser.add_argument("--render", action="store_true", help="write the pages from the record; run nothing")
    parser.add_argument("--quick", action="store_true", help="a small demo; write neither record nor pages")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures of this run here")
    parser.add_argument(
        "--take",
        metavar="FILE",
        type=Path,
        nargs="+",
        default=[],
        help="store JSON of benchmarks; run nothing",
    )
    given = parser.parse_args()
    for path in given.take:
        record.store(*taken(json.loads(path.read_text())))
    if given.render or given.take:
        write_pages(record.load())
        return
    names = ["demo"] if given.quick else given.parts.split(",")
    if unknown := [name for name in names if name not in MEASURED]:
        parser.error(f"no part {', '.join(unknown)}; the parts are {', '.join(MEASURED)}")
    report("results", measure(names, quick=given.quick), given)
    if not given.quick:
        write_pages(record.load())


def measure(names: list[str], *, quick: bool) -> list[Result]:
    """Measure parts, and store each as soon as it is there: a run of all takes most of an hour."""
    results = []
    for name in names:
        # One folder a part: a store of the sections is 20 MB.
        with tempfile.TemporaryDirectory() as folder:
            values = MEASURED[name](Path(folder), quick)
        results += [Result(f"{name}: {what}", value) for what, value in values.items()]
        if not quick:
            record.store(name, record.measured_now(name, values))
    return results


if __name__ == "__main__":
    main()
