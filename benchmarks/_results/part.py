"""A part of the record: how its figures are measured, and the tables that are written from them."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _common import Result

Values = dict[str, float]
Record = Mapping[str, Mapping[str, Any]]
"""Name of a part -> its command, commit, date, machine and values."""
Measure = Callable[[Path, bool], Values]
"""Takes an empty folder and whether the case is to be small."""


@dataclass(frozen=True)
class Table:
    """One block of a page, between ``<!-- results:NAME -->`` and ``<!-- /results -->``.

    Parameters
    ----------
    render
        Writes it in Markdown from the whole record.
    needs
        Parts that the record must hold; None for the part that it stands in. A block without them stays as it is.
    """

    name: str
    render: Callable[[Record], str]
    needs: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Part:
    """Figures that are measured together.

    Parameters
    ----------
    about
        One line for the help: the command that measures the same, and its time.
    measure
        None for a part that comes from the JSON of another benchmark.
    """

    name: str
    about: str
    measure: Measure | None = None
    tables: tuple[Table, ...] = ()


def values_of(results: Iterable[Result]) -> Values:
    """Return figure -> value, without figures that this machine cannot measure."""
    return {result.what: result.value for result in results if result.value is not None}


def source(record: Record, part: str) -> str:
    """Return the line below a table: command, commit and date."""
    entry = record[part]
    return f"`{entry['command']}`, commit {entry['commit'][:7]}, {entry['date']}."
