"""All parts and tables, as the modules of `parts/` declare them."""

import importlib
import pkgutil
from collections.abc import Iterator

from _results import parts
from _results.part import Measure, Part, Record, Table


def _declared() -> Iterator[Part]:
    for module in pkgutil.iter_modules(parts.__path__):
        yield from importlib.import_module(f"{parts.__name__}.{module.name}").PARTS


PARTS: dict[str, Part] = {part.name: part for part in _declared()}
MEASURED: dict[str, Measure] = {
    name: part.measure for name, part in PARTS.items() if part.measure is not None
}
"""The parts that `results.py` measures itself."""
TABLES: dict[str, tuple[Part, Table]] = {
    table.name: (part, table) for part in PARTS.values() for table in part.tables
}


def render(name: str, record: Record) -> str | None:
    """Write a table from a record; None if the record lacks a part that the table needs."""
    part, table = TABLES[name]
    needs = (part.name,) if table.needs is None else table.needs
    return table.render(record) if all(one in record for one in needs) else None


def help_lines() -> str:
    """Return one line a part, for the command's help."""
    width = max(map(len, PARTS))
    return "\n".join(f"    {name:{width}}  {part.about}" for name, part in PARTS.items())
