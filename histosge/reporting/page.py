"""The page that people read: one HTML file with everything inside, pictures included.

`render_report` lays out any list of blocks; what an evaluation found, `evaluation_report` puts into blocks.
"""

import base64
import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from featurestore.earlier_results import MadeWith, is_same_result
from featurestore.whole_file import check_output, whole_file
from histosge.reporting.value_maps import ValueMaps, script_json

_NUMBER = re.compile(r"[-+±<>≤≥~]? ?\d|-?$|nan$|none$")
"""How a cell of a column of numbers begins: a sign and a digit; or it says that there is no number."""
_RECORD = re.compile(rb'<meta name="record" content="([^"]*)">')


@dataclass(frozen=True)
class Picture:
    """An SVG with what it shows, for those who see it and those who do not.

    Parameters
    ----------
    svg, alt, caption
        The picture, the same in words, and what stands under it.
    name
        Printed bold before the caption.
    anchor
        By which links on the page find it.
    """

    svg: bytes
    alt: str
    caption: str
    name: str = ""
    anchor: str = ""

    @property
    def base64(self) -> str:
        """Return the SVG as text for a data URL."""
        return base64.b64encode(self.svg).decode("ascii")

    @property
    def file_stem(self) -> str:
        """Return the name, without a suffix, under which a reader saves it."""
        words = re.sub(r"[^A-Za-z0-9.-]+", "_", self.name or self.alt).strip("._-")
        return words[:60] or "figure"


@dataclass(frozen=True)
class Table:
    """Text in rows; the first entry of a row names it.

    Parameters
    ----------
    header, rows
        All rows are as long as the header.
    caption
        What the numbers are.
    controls
        Names of rows that are controls, set apart from the rest.
    folded
        Show only the caption until the reader opens it.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str
    controls: frozenset[str] = frozenset()
    folded: bool = False

    @property
    def is_text(self) -> tuple[bool, ...]:
        """Whether each column holds text, which is set from the left; columns of numbers are set from the right."""
        columns = list(zip(*self.rows, strict=True)) or [()] * len(self.header)
        return tuple(any(_NUMBER.match(cell) is None for cell in column) for column in columns)


@dataclass(frozen=True)
class Lookup:
    """A long table of which the reader sees the rows that a search finds.

    Parameters
    ----------
    label, what
        Of the search box; and what a row's name is, the heading of the first column.
    columns, rows
        Headings; and names with one number a column, None where there is none. Rows come in the order in which they are
        shown.
    anchors
        Name of a row -> `Picture.anchor` of a picture of it on the same page.
    maps
        Maps of the rows' names, drawn for the one that the reader chooses; None: there are none.
    """

    label: str
    what: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    anchors: Mapping[str, str]
    maps: ValueMaps | None = None

    @property
    def json(self) -> str:
        """Return the table for the page's script; no text in it can end the script."""
        values = {"columns": [self.what, *self.columns], "rows": self.rows, "anchors": dict(self.anchors)}
        return script_json(values)


@dataclass(frozen=True)
class Block:
    """One part of a page, under its own title; all parts are optional.

    Parameters
    ----------
    title, text
        Headline and one paragraph.
    pictures, points, tables
        Shown in this order; points are a list of sentences.
    status, status_text
        ``good`` or ``bad`` and one sentence; a bad one is repeated at the top of the page, in red.
    lookup
        A table to search, below the text.
    links
        Label and name of files beside the page.
    """

    title: str
    text: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()
    points: tuple[str, ...] = ()
    status: str = ""
    status_text: str = ""
    lookup: Lookup | None = None
    links: tuple[tuple[str, str], ...] = ()


def render_report(
    title: str,
    blocks: Sequence[Block],
    *,
    subtitle: str = "",
    footer: str = "",
    record: Mapping[str, Any] | None = None,
) -> str:
    """Lay out blocks as one self-contained HTML page, readable on light and dark screens.

    Everything is escaped; nothing is loaded from anywhere. A `record`, JSON for programs, stands in the page's head; its
    entry ``made_with`` is what `is_page_there` compares.
    """
    # Names, paths and gene lists come from users' files: everything is escaped. A missing value is an error, not a gap.
    environment = Environment(
        loader=PackageLoader("histosge.reporting", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,  # with the next: the template may be indented, the page has no empty lines
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    return template.render(
        title=title,
        blocks=list(blocks),
        subtitle=subtitle,
        footer=footer,
        record=json.dumps(record) if record else "",
    )


def write_page(path: Path, page: str) -> None:
    """Write a page, whole or not at all."""
    with whole_file(path) as partial:
        partial.write_text(page, encoding="utf-8")


def is_page_there(path: Path, made_with: MadeWith, *, overwrite: bool) -> bool:
    """Tell whether a page is there that was made with the same; called before the work that it shows.

    Raises
    ------
    EarlierResultError
        If the file was made with something else, and `overwrite` is not set.
    OutputError
        If no page can be written there.
    """
    check_output(path)
    if not path.exists():
        return False
    return is_same_result(path, read_record(path).get("made_with"), made_with, overwrite=overwrite)


def read_record(path: Path) -> dict[str, Any]:
    """Return the record of a page; empty if it has none."""
    # It stands in the page's head, but a cohort's is long, and pictures make any page large.
    found = _RECORD.search(path.read_bytes())
    if found is None:
        return {}
    try:
        record = json.loads(html.unescape(found[1].decode()))
    except (ValueError, RecursionError):  # somebody else's page
        return {}
    return record if isinstance(record, dict) else {}
