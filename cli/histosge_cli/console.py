"""What commands print: results on standard output, progress and messages on standard error."""

import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import typer
from rich import console as rich_console
from rich import progress as rich_progress

from featurestore.events import OnProgress, Progress

# A table that is piped is for a program or a log: nothing may be cut.
out = rich_console.Console(soft_wrap=True, highlight=False)
err = rich_console.Console(stderr=True, soft_wrap=True, highlight=False)

KEPT = 8
"""Bars that stay on the screen when they are full."""
PLAIN_SECONDS = 10.0
"""Between two plain lines about one slide."""
COLUMNS = (
    rich_progress.TextColumn("{task.description}", markup=False),
    rich_progress.BarColumn(bar_width=24),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TextColumn("{task.fields[unit]}"),
    rich_progress.TimeRemainingColumn(elapsed_when_finished=True),
    rich_progress.TextColumn("{task.fields[note]}", markup=False),
)


@dataclass
class Console:
    """Messages to the user, and the same as JSON lines in a log.

    Parameters
    ----------
    quiet
        Print no messages and no progress.
    log
        File to append JSON lines to.
    """

    quiet: bool = False
    log: Path | None = None

    def message(self, message: str, **facts: Any) -> None:
        """Print a message and log it."""
        if not self.quiet:
            err.print(message, markup=False)
        self.record(message, **facts)

    def record(self, message: str, **facts: Any) -> None:
        """Log without printing."""
        if self.log is not None:
            with self.log.open("a") as stream:
                stream.write(json.dumps({"time": time.time(), "message": message, **facts}) + "\n")

    @contextmanager
    def bars(self, unit: str, slides: int = 0) -> Iterator["Bars"]:
        """Show what is going on: bars on a terminal, plain lines elsewhere, nothing when quiet.

        Parameters
        ----------
        unit
            What is counted.
        slides
            How many slides there will be, for a line over all of them; 0 if unknown.
        """
        with rich_progress.Progress(
            *COLUMNS, console=err, disable=self.quiet or not err.is_terminal
        ) as shown:
            yield Bars(shown, self, unit, slides)

    @contextmanager
    def steps(self, name: str) -> Iterator[OnProgress]:
        """Yield what shows one bar for work that counts steps; elsewhere than on a terminal each step is a line."""
        with self.bars("steps") as bars:

            def on_progress(progress: Progress) -> None:
                if bars.is_shown:
                    bars.update(replace(progress, label=name), note=progress.label)
                else:
                    self.message(f"{progress.done}/{progress.total} {progress.label}")

            bars.begin(name)
            yield on_progress


@contextmanager
def resumable() -> Iterator[None]:
    """Turn Ctrl-C into one line that says how to go on; exit 130, as a shell expects."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("\nstopped; what is written is whole: run the same command again to go on")
        raise typer.Exit(130) from None


class Bars:
    """One bar per name, made when it is first heard of; finished ones make room, and a line over all slides stays."""

    def __init__(self, shown: rich_progress.Progress, console: "Console", unit: str, slides: int = 0) -> None:
        self._progress, self._console, self._unit = shown, console, unit
        self._tasks: dict[str, rich_progress.TaskID] = {}
        self._patches: dict[str, int] = {}
        self._begun: dict[str, float] = {}
        self._last = self._start = time.monotonic()
        self._last_line = self._start
        self._slides, self._done, self._failed, self._unreadable = slides, 0, 0, 0
        self._all = (
            self._progress.add_task("all", total=slides, unit="slides", note="") if slides > 1 else None
        )

    @property
    def is_shown(self) -> bool:
        """Whether bars are drawn: on a terminal, unless quiet."""
        return not self._progress.disable

    def begin(self, name: str) -> None:
        """Show that something runs whose length is not known yet."""
        self._tasks[name] = self._progress.add_task(name, total=None, unit=self._unit, note="")
        self._begun[name] = self._last

    def update(self, progress: Progress, note: str = "") -> None:
        """Set the bar of a label, or print a plain line now and then."""
        name, done, total, patches = progress.label, progress.done, progress.total, progress.patches
        now = time.monotonic()
        if name not in self._tasks:
            self.begin(name)
        self._last = now
        if patches:
            self._patches[name] = patches
            note = f"{patches} patches, {patches / max(now - self._begun[name], 1e-3):.0f} patches/s"
        task = self._tasks[name]
        self._progress.update(task, completed=done, total=total, note=note)
        if patches and self._all is not None:
            self._progress.update(self._all, note=self._overall(now))
        is_end = done >= total
        if is_end and len(self._tasks) > KEPT:
            self._progress.update(task, visible=False)
        if not self.is_shown and (is_end or now - self._last_line >= PLAIN_SECONDS):
            self._last_line = now
            self._plain(
                f"{name}: {done}/{total} {self._unit}", note, _left(done, total, now - self._begun[name])
            )
        self._console.record(
            "progress", name=name, done=done, total=total, unit=self._unit, patches=patches or None
        )

    def finish(self, name: str, *, failed: bool = False, unreadable: int = 0) -> None:
        """Count a slide as finished: whole, or failed; and its patches that could not be read."""
        self._done += 1
        self._failed += failed
        self._unreadable += unreadable
        if self._all is not None:
            note = self._overall(time.monotonic())
            self._progress.update(self._all, completed=self._done, note=note)
            if not self.is_shown:
                self._plain(f"slides: {self._done}/{self._slides}", note, f"{name} failed" if failed else "")

    def _overall(self, now: float) -> str:
        parts = []
        if self._patches:
            parts.append(f"{sum(self._patches.values()) / max(now - self._start, 1e-3):.0f} patches/s")
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._unreadable:
            parts.append(f"{self._unreadable} patches unreadable")
        return ", ".join(parts)

    def _plain(self, *parts: str) -> None:
        if not self._console.quiet:
            err.print(", ".join(part for part in parts if part), markup=False)


def _left(done: int, total: int, seconds: float) -> str:
    return f"{duration(seconds / done * (total - done))} left" if 0 < done < total else ""


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
