"""Every message that the troubleshooting page quotes is one that the code can print."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("featurestore", "histosge", "cli/histosge_cli")
VARIES = "…"
"""What stands on the page, and here, for a part of a message that differs from case to case."""
ROW = re.compile(r"^\| `(?P<message>.+?)` \| (?P<reason>[^|]+) \| (?P<fix>.+) \|$", re.MULTILINE)
LEAST = 14
"""Characters of a quotation that must be constant: fewer would fit anything."""


def quoted() -> list[str]:
    return [row["message"] for row in ROW.finditer((ROOT / "docs" / "troubleshooting.md").read_text())]


def _text(node: ast.AST) -> str | None:
    """Return a string of the source, with its variable parts as one character."""
    match node:
        case ast.Constant(value=str() as text):
            return text
        case ast.JoinedStr(values=parts):
            return "".join(_text(part) or VARIES for part in parts)
        case ast.BinOp(op=ast.Add()):
            return (_text(node.left) or VARIES) + (_text(node.right) or VARIES)
    return None


def strings() -> Iterator[str]:
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                text = _text(node)
                if text is not None and len(text) >= LEAST:
                    yield re.sub(r"\s+", " ", text)


def test_each_quotation_is_part_of_a_message() -> None:
    known = "\n".join(strings())
    gone = [message for message in quoted() if message.strip(VARIES + " ") not in known]
    assert gone == []


def test_quotations_say_enough_to_be_found() -> None:
    messages = quoted()
    assert len(messages) >= 50
    assert len(set(messages)) == len(messages)
    assert all(len(message.replace(VARIES, "")) >= LEAST for message in messages)


def test_every_row_of_the_page_is_seen() -> None:
    """A row that the pattern does not know would pass silently."""
    lines = (ROOT / "docs" / "troubleshooting.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("|") and not line.startswith(("|---", "| message |"))]
    assert len(rows) == len(quoted())
