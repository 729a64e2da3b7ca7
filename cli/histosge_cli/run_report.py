"""The report of `embed --report`: a page to read, and the same as JSON."""

import datetime as dt
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featurestore.errors import EarlierResultError, OutputError
from featurestore.whole_file import check_output, whole_file
from featurestore.wording import counted
from histosge_cli.console import duration, size

if TYPE_CHECKING:
    from featurestore.embedding.embed import EmbedSettings, SlideResult
    from histosge.reporting.page import Block

SUFFIXES = (".html", ".json")
MAX_ROWS = 2000
"""Slides in the page's tables: a browser lays out as many at once; the JSON has all of them."""
STAGES = {
    "plan": "opening slides, finding tissue",
    "read": "fetching compressed pixels",
    "decode": "decoding, cutting patches",
    "encode": "waiting for the encoders",
    "write": "rounding, checksums, storing",
}


@dataclass
class ReportFiles:
    """Where the report of a run goes. Make one with `ReportFiles.open`, before the run.

    Parameters
    ----------
    base
        The path without its suffix.
    begun
        When the run started (UTC).
    """

    base: Path
    begun: dt.datetime = field(default_factory=lambda: dt.datetime.now(dt.UTC))
    _started: float = field(default_factory=time.monotonic)

    @classmethod
    def open(cls, path: Path) -> "ReportFiles":
        """Check that a report may be written. An earlier report gives way; anything else is left alone.

        Raises
        ------
        OutputError, EarlierResultError
            If it may not.
        """
        if path.suffix not in SUFFIXES:
            raise OutputError(f"--report {path} must end in .html or .json; both are written, side by side")
        files = cls(path.with_suffix(""))
        for file in files.paths:
            check_output(file)
            if file.exists() and b"histosge-embed-report" not in file.read_bytes()[:4096]:
                raise EarlierResultError(
                    f"{file} is there and is no report of embed; give another path with --report"
                )
        return files

    @property
    def paths(self) -> tuple[Path, ...]:
        """The page and the JSON."""
        return tuple(self.base.with_name(self.base.name + suffix) for suffix in SUFFIXES)

    def write(
        self,
        store: str,
        settings: "EmbedSettings",
        results: "Sequence[SlideResult]",
        *,
        is_complete: bool = True,
    ) -> None:
        """Write both files.

        Parameters
        ----------
        results
            Of the slides that were finished.
        is_complete
            Whether these are all slides of the run.
        """
        from featurestore.embedding.run_report import describe_run
        from histosge.reporting.page import render_report, write_page

        report = describe_run(
            store,
            settings,
            results,
            self.begun,
            time.monotonic() - self._started,
            is_complete=is_complete,
        ).to_json()
        page, document = self.paths
        write_page(
            page,
            render_report(
                "Embedding run",
                _blocks(report),
                subtitle=f"{report['store']}, begun {report['begun'].replace('T', ' ').replace('+00:00', ' UTC')}",
                footer="The same values, with all slides, are in the JSON file of the same name.",
                record={"spec": report["spec"]},
            ),
        )
        with whole_file(document) as partial:
            partial.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


@contextmanager
def report_of_stopped_run(
    files: ReportFiles | None, store: str, settings: "EmbedSettings", finished: "Sequence[SlideResult]"
) -> Iterator[None]:
    """Write the report of a run that ends by an error or Ctrl-C, if any slide was finished.

    Parameters
    ----------
    files
        Where it goes; None for no report.
    finished
        Grows while the run goes on.
    """
    try:
        yield
    except BaseException:
        if files is not None and finished:
            files.write(store, settings, finished, is_complete=False)
        raise


def _blocks(report: dict[str, Any]) -> "list[Block]":
    from histosge.reporting.page import Block, Table

    slides, failures = report["slides"], report["failures"]
    done = f"{counted(slides['done'], 'slide')} done, {slides['failed']} failed"
    if slides["planned"]:
        done = (
            f"{counted(slides['planned'], 'slide')} planned, {slides['failed']} failed; nothing was embedded"
        )
    status = done if report["complete"] else f"stopped before its end: {done}"
    summary = Block(
        "Summary",
        points=(
            f"{report['patches']:,} patches encoded in {duration(report['seconds'])}",
            f"{report['patches_per_second']:,} patches per second",
            f"{report['unreadable_patches']:,} patches have no vector",
            _read_from_slides(report),
            f"stored: {report['objects_written']:,} objects, {size(report['bytes_written'])} of vectors",
        ),
        status="bad" if slides["failed"] or not report["complete"] else "good",
        status_text=status,
    )
    seconds = report["stage_seconds"]
    total = sum(seconds.values()) or 1.0
    where = Block(
        "Where the time went",
        "Seconds of all threads and processes; stages run at the same time, so they add up to more than the clock shows.",
        tables=(
            Table(
                ("stage", "what", "seconds", "share"),
                tuple(
                    (name, text, f"{seconds[name]:.1f}", f"{seconds[name] / total:.0%}")
                    for name, text in STAGES.items()
                ),
                "Seconds by stage",
            ),
        ),
    )
    return [summary, *_failures(failures), where, *_slides(report["per_slide"]), _made_with(report)]


def _read_from_slides(report: dict[str, Any]) -> str:
    if report["bytes_read"] is None:
        return "read from slides: their readers do not count bytes, and their fetching is part of decoding"
    return f"read from slides: {size(report['bytes_read'])} in {report['requests']:,} requests"


def _failures(failures: list[dict[str, str]]) -> "list[Block]":
    from histosge.reporting.page import Block, Table

    if not failures:
        return []
    rows = tuple((failure["slide_id"], failure["reason"]) for failure in failures[:MAX_ROWS])
    return [Block("Slides that failed", tables=(Table(("slide", "reason"), rows, _count(failures)),))]


def _slides(slides: list[dict[str, Any]]) -> "list[Block]":
    from histosge.reporting.page import Block, Table

    header = ("slide_id", "state", "patches", "encoded", "objects", "planned", "unreadable", "skipped")
    rows = tuple(tuple(str(slide[name]) for name in header) for slide in slides[:MAX_ROWS])
    table = Table(("slide", *header[1:]), rows, _count(slides), folded=True)
    return [Block("Slides", tables=(table,))] if slides else []


def _count(rows: list[Any]) -> str:
    return (
        f"the first {MAX_ROWS:,} of {len(rows):,} slides"
        if len(rows) > MAX_ROWS
        else counted(len(rows), "slide")
    )


def _made_with(report: dict[str, Any]) -> "Block":
    from histosge.reporting.page import Block, Table

    encoders = tuple(
        (e["key"], str(e.get("dim", "")), e.get("fingerprint", "not stored")[:16]) for e in report["encoders"]
    )
    facts = {**report["settings"], **report["software"]}
    return Block(
        "Made with",
        tables=(
            Table(("encoder", "features", "fingerprint"), encoders, "Encoders"),
            Table(("name", "value"), tuple((k, str(v)) for k, v in facts.items()), "Settings and software"),
        ),
    )
