"""Help of options whose values are registered: made from the records when it is shown, not when a module is imported."""

from collections.abc import Callable, Iterable
from typing import Any

from rich.markup import escape
from typer.core import TyperCommand

from featurestore.extensions import Record


def with_registry_help(**texts: Callable[[], str]) -> type[TyperCommand]:
    """Return a class of commands, for ``app.command(cls=...)``, that computes the help of some options.

    Parameters
    ----------
    texts
        Name of an option in Python -> function that returns its help. It is called when the command's parameters are
        looked at, so for this command alone, and not while the others are built.
    """

    class Command(TyperCommand):
        # Typer makes every command of the app on each call, and reads the parameters of the one that is used.
        @property
        def params(self) -> list[Any]:
            """The command's parameters, their help filled in."""
            for parameter in self._parameters:
                if parameter.name in texts and not parameter.help:
                    parameter.help = texts[parameter.name]()
            return self._parameters

        @params.setter
        def params(self, value: list[Any]) -> None:
            self._parameters = value

    return Command


def listed(records: Iterable[Record]) -> str:
    """Return records as one line of help: "name: what it is; name: what it is"."""
    # Help is shown as markup: what another package writes in brackets is text all the same.
    return escape("; ".join(f"{record.name}: {record.help.rstrip('.')}" for record in records))
