"""What the benchmarks share: options, a slide to work on, a table and its JSON."""

import argparse
import datetime as dt
import json
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from featurestore.cores import count_cores
from histosge.synthetic import SyntheticSection, SyntheticSpec, make_section

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """One figure.

    Parameters
    ----------
    value
        None where this machine cannot measure it; `unit` then holds the reason.
    target
        What it should reach, such as ``>= 0.95``; empty if it only informs.
    """

    what: str
    value: float | None
    unit: str = ""
    target: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one, and where nothing was measured."""
        if not self.target or self.value is None:
            return None
        sign, _, bound = self.target.partition(" ")
        return {
            ">=": self.value >= float(bound),
            "<=": self.value <= float(bound),
            "=": self.value == float(bound),
        }[sign]


def options(about: str | None) -> argparse.Namespace:
    """Read --quick and --json."""
    return parser_of(about).parse_args()


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of --quick and --json, for a benchmark that has options of its own."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small case, in about half a minute")
    parser.add_argument("--json", metavar="FILE", type=Path, help="also write the figures here")
    return parser


def section(folder: Path, *, quick: bool) -> SyntheticSection:
    """Make the slide: 4.4 x 4.1 mm, or 1.5 mm a side for a quick look."""
    return make_section(folder, SyntheticSpec(size_px=(3000, 3000)) if quick else SyntheticSpec())


def timed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> tuple[float, T]:
    """Call, and return seconds and result."""
    begun = time.perf_counter()
    result = work(*args, **kwargs)
    return time.perf_counter() - begun, result


def report(benchmark: str, results: Sequence[Result], asked: argparse.Namespace) -> None:
    """Print a table, and write it as JSON where `asked` names a file, see `parser_of`."""
    print(f"\n{benchmark}, {machine()}")
    for result in results:
        verdict = {True: "met", False: "MISSED", None: ""}[result.met]
        print(
            f"  {result.what:42} {_shown(result.value):>9} {result.unit:14} {result.target:10} {verdict}".rstrip()
        )
    if asked.json is not None:
        write(benchmark, results, asked)


def write(benchmark: str, results: Sequence[Result], asked: argparse.Namespace) -> None:
    """Write figures as JSON with the machine, commit and date; `asked` is of `parser_of`."""
    document = {
        "benchmark": benchmark,
        "quick": asked.quick,
        "machine": machine(),
        "commit": commit(),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "results": [{**asdict(result), "met": result.met} for result in results],
    }
    asked.json.write_text(json.dumps(document, indent=1) + "\n")


def _shown(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def machine() -> str:
    """Return cores, processor, system and Python in words."""
    cores, python = count_cores().cores, platform.python_version()
    return f"{cores} cores {_processor() or platform.machine()}, {platform.system()}, python {python}"


def _processor() -> str:
    """Return the processor's name and architecture; empty where the system does not say."""
    processors = Path("/proc/cpuinfo")
    lines = processors.read_text().splitlines() if processors.is_file() else []
    names = [line.partition(":")[2] for line in lines if line.startswith("model name")]
    return " ".join([*names[0].split(), platform.machine()]) if names else ""


def commit() -> str:
    """Return the commit that is checked out; empty where that cannot be told."""
    here = Path(__file__).parent
    try:
        asked = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""  # a machine without git
    return asked.stdout.strip()
