"""The pages whose marked blocks are written from the record."""

import re

from _results import catalogue
from _results.part import Record
from _results.record import ROOT

PAGES = ("README.md", "docs/results.md", "docs/morphology.md")
_BLOCK = re.compile(r"(<!-- results:(\w+) -->\n).*?(\n<!-- /results -->)", re.DOTALL)


def rendered(text: str, record: Record) -> str:
    """Return a page with its blocks written from a record; a block with a part that was never run stays as it is."""

    def block(found: re.Match[str]) -> str:
        table = catalogue.render(found[2], record)
        # Empty lines around it: not every Markdown reader ends a comment at the end of its line.
        return found[0] if table is None else f"{found[1]}\n{table}\n{found[3]}"

    return _BLOCK.sub(block, text)


def write_pages(record: Record) -> None:
    """Write the blocks of all pages."""
    for name in PAGES:
        page = ROOT / name
        page.write_text(rendered(page.read_text(), record))
