"""What commands print: results on standard output, progress and remarks on standard error."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

# A table that is piped is for a program or a log: nothing may be cut.
out = Console(soft_wrap=True, highlight=False)
err = Console(stderr=True, soft_wrap=True, highlight=False)


@dataclass
class Voice:
    """Remarks to the user, and the same as JSON lines in a log.

    Parameters
    ----------
    quiet
        Print no remarks and no progress.
    log
        File to append JSON lines to.
    """

    quiet: bool = False
    log: Path | None = None

    def say(self, message: str, **facts: Any) -> None:
        """Print a remark and log it."""
        if not self.quiet:
            err.print(message, markup=False)
        self.record(message, **facts)

    def record(self, message: str, **facts: Any) -> None:
        """Log without printing."""
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(json.dumps({"time": time.time(), "message": message, **facts}) + "\n")

    @contextmanager
    def bars(self, unit: str) -> Iterator["Bars"]:
        """Show one progress bar per slide; nothing when not a terminal."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=err, disable=self.quiet or not err.is_terminal) as progress:
            yield Bars(progress)


@contextmanager
def resumable() -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on; exit 130, as a shell expects."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("\nstopped; what is written is whole: run the same command again to go on")
        raise typer.Exit(130) from None


class Bars:
    """One bar per name, made when it is first heard of."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, TaskID] = {}

    def update(self, name: str, done: int, total: int) -> None:
        """Set a bar."""
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total)
        self._progress.update(self._tasks[name], completed=done)


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print columns side by side; nothing is wrapped or cut, so that a program may read it too."""
    cells = [list(header), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        out.print(line.rstrip(), markup=False)


def duration(seconds: float) -> str:
    """Return a time as a person says it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def size(n_bytes: int) -> str:
    """Return bytes as a person reads them."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
