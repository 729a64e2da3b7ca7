"""Help of options whose values are registered: made from the records when it is shown, not when a module is imported."""

from collections.abc import Callable, Iterable

from rich.markup import escape
from typer.core import TyperCommand

from featurestore.extensions import Record


def with_registry_help(**texts: Callable[[], str]) -> type[TyperCommand]:
    """Return a class of commands, for ``app.command(cls=...)``, that computes the help of some options.

    Parameters
    ----------
    texts
        Name of an option in Python -> function that returns its help. It is called whenever the command's
        parameters are looked at, so for this command alone, and not while the others are built.
    """

    class Command(TyperCommand):
        def get_params(self, ctx):  # type: ignore[no-untyped-def]  # typer vendors click, whose types it does not export
            for parameter in self.params:
                if parameter.name in texts:
                    parameter.help = texts[parameter.name]()  # type: ignore[attr-defined]
            return super().get_params(ctx)

    return Command


def listed(records: Iterable[Record]) -> str:
    """Return records as one line of help: "name: what it is; name: what it is"."""
    # Help is shown as markup: what another package writes in brackets is text all the same.
    return escape("; ".join(f"{record.name}: {record.help.rstrip('.')}" for record in records))
