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

from featurestore.credentials import redact
from featurestore.errors import OutputError
from featurestore.events import OnProgress, Progress
from featurestore.wording import counted

# A table that is piped is for a program or a log: nothing may be cut.
out = rich_console.Console(soft_wrap=True, highlight=False)
err = rich_console.Console(stderr=True, soft_wrap=True, highlight=False)

MAX_FINISHED_BARS = 8
"""Finished bars that stay on the screen: a cohort's would push the running ones off it."""
PLAIN_INTERVAL_S = 10.0
FEW_STEPS = 10
"""The steps of `demo` are fewer, the fits of an evaluation are more: its log would be all progress."""
"""Least time between two plain lines, where there is no terminal: a log file must stay readable."""
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
    """Prints messages and progress, and writes the same as JSON lines to a log.

    Parameters
    ----------
    quiet
        Print no messages and no progress.
    log
        File to append JSON lines to.
    """

    quiet: bool = False
    log: Path | None = None

    def __post_init__(self) -> None:
        # Now, not at the first message, which may come after an hour. A device, such as /dev/stderr, is fine for a log.
        if self.log is not None:
            try:
                self.log.open("a").close()
            except (OSError, ValueError) as error:
                reason = getattr(error, "strerror", None) or error
                raise OutputError(
                    f"cannot write the log to {self.log}: {reason}; give a file with --log"
                ) from error

    def message(self, message: str, **facts: Any) -> None:
        """Print a message and log it."""
        if not self.quiet:
            err.print(redact(message), markup=False)
        self.record(message, **facts)

    def record(self, message: str, **facts: Any) -> None:
        """Log without printing."""
        if self.log is not None:
            with self.log.open("a") as stream:
                # A fact may be another library's message, with the URL that failed.
                safe = {key: redact(fact) if isinstance(fact, str) else fact for key, fact in facts.items()}
                line = json.dumps({"time": time.time(), "message": redact(message), **safe})
                stream.write(line + "\n")

    @contextmanager
    def bars(self, unit: str, slides: int = 0) -> Iterator["ProgressBars"]:
        """Show progress: bars on a terminal, plain lines elsewhere, nothing when quiet.

        Parameters
        ----------
        unit
            What is counted.
        slides
            Number of slides, for a line over all of them; 0 if it is not known.
        """
        with rich_progress.Progress(
            *COLUMNS, console=err, disable=self.quiet or not err.is_terminal
        ) as shown:
            yield ProgressBars(shown, self, unit, slides)

    @contextmanager
    def steps(self, name: str) -> Iterator[OnProgress]:
        """Yield a callback that shows one bar for work in steps.

        Where there is no terminal, each of `FEW_STEPS` is a line; of more there is a line every `PLAIN_INTERVAL_S`.
        """
        with self.bars("steps") as bars:

            def on_progress(progress: Progress) -> None:
                if bars.is_shown or progress.total > FEW_STEPS:
                    bars.update(replace(progress, label=name), note=progress.label)
                else:
                    self.message(f"{progress.done}/{progress.total} {progress.label}")

            bars.begin(name)
            yield on_progress


@contextmanager
def resumable() -> Iterator[None]:
    """Turn Ctrl-C into one line that tells how to go on; exit with 130, as shells do."""
    try:
        yield
    except KeyboardInterrupt:
        err.print("\nstopped; what is written is complete: run the same command again to go on")
        raise typer.Exit(130) from None


class ProgressBars:
    """One bar per name, and one over all slides. Beyond `MAX_FINISHED_BARS` finished bars are hidden."""

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
        """Show a bar for work whose length is not known yet."""
        self._tasks[name] = self._progress.add_task(name, total=None, unit=self._unit, note="")
        self._begun[name] = self._last

    def update(self, progress: Progress, note: str = "") -> None:
        """Update the bar of a label, or print a plain line every `PLAIN_INTERVAL_S`."""
        name, done, total, patches = progress.label, progress.done, progress.total, progress.patches
        now = time.monotonic()
        if name not in self._tasks:
            self.begin(name)
        self._last = now
        if patches:
            self._patches[name] = patches
            note = (
                f"{counted(patches, 'patch')}, {patches / max(now - self._begun[name], 1e-3):.0f} patches/s"
            )
        task = self._tasks[name]
        self._progress.update(task, completed=done, total=total, note=note)
        if patches and self._all is not None:
            self._progress.update(self._all, note=self._cohort_note(now))
        is_end = done >= total
        if is_end and len(self._tasks) > MAX_FINISHED_BARS:
            self._progress.update(task, visible=False)
        if not self.is_shown and (is_end or now - self._last_line >= PLAIN_INTERVAL_S):
            self._last_line = now
            self._print_plain(
                f"{name}: {done}/{total} {self._unit}", note, _time_left(done, total, now - self._begun[name])
            )
        # Each update, also where nothing is printed: the log is for programs.
        self._console.record(
            "progress", name=name, done=done, total=total, unit=self._unit, patches=patches or None
        )

    def finish(self, name: str, *, failed: bool = False, unreadable: int = 0) -> None:
        """Count a slide as finished or failed, and its patches that could not be read."""
        self._done += 1
        self._failed += failed
        self._unreadable += unreadable
        if self._all is not None:
            note = self._cohort_note(time.monotonic())
            self._progress.update(self._all, completed=self._done, note=note)
            if not self.is_shown:
                self._print_plain(
                    f"slides: {self._done}/{self._slides}", note, f"{name} failed" if failed else ""
                )

    def _cohort_note(self, now: float) -> str:
        parts = []
        if self._patches:
            parts.append(f"{sum(self._patches.values()) / max(now - self._start, 1e-3):.0f} patches/s")
        if self._failed:
            parts.append(f"{self._failed} failed")
        if self._unreadable:
            parts.append(f"{counted(self._unreadable, 'patch')} unreadable")
        return ", ".join(parts)

    def _print_plain(self, *parts: str) -> None:
        if not self._console.quiet:
            err.print(", ".join(part for part in parts if part), markup=False)


def _time_left(done: int, total: int, seconds: float) -> str:
    return f"{duration(seconds / done * (total - done))} left" if 0 < done < total else ""


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print aligned columns. Nothing is wrapped or cut, so that programs can read it, too."""
    cells = [list(header), *(["" if cell is None else str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        out.print(line.rstrip(), markup=False)


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it: s, min or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


def size(n_bytes: int) -> str:
    """Return bytes in the unit that suits them, powers of 1,000."""
    value = float(n_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"
