"""The option ``--anonymous``, added to every command that opens a store or a slide."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

HELP = "Read public buckets (S3, GCS, Azure) without credentials; what is written still uses them."
_WITHOUT_PLACES = ("demo", "encoders")
_WRITTEN = {"embed": "store", "import": "store", "rm": "store", "predict": "out"}
"""Command -> its parameter that is written: there, credentials are used where there are any."""

Anonymous = Annotated[bool, typer.Option("--anonymous", help=HELP)]


def add_anonymous_option(app: typer.Typer) -> None:
    """Add the option to the commands of an app, and of its groups."""
    for info in app.registered_commands:
        assert info.callback is not None
        name = info.name or info.callback.__name__
        if name not in _WITHOUT_PLACES:
            info.callback = _with_option(info.callback, _WRITTEN.get(name))
    for group in app.registered_groups:
        assert group.typer_instance is not None
        add_anonymous_option(group.typer_instance)


def _with_option(command: Callable[..., Any], written: str | None) -> Callable[..., Any]:
    @functools.wraps(command)
    def run(*args: Any, anonymous: bool = False, **options: Any) -> Any:
        if not anonymous:
            return command(*args, **options)
        from featurestore.file_systems import anonymous_access

        place = options.get(written) if written else None
        with anonymous_access(signed=[str(place)] if place else []):
            return command(*args, **options)

    signature = inspect.signature(command)
    option = inspect.Parameter(
        "anonymous", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Anonymous
    )
    # Typer reads a command's parameters from its signature and its annotations, not from what it wraps.
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])  # type: ignore[attr-defined]
    run.__annotations__ = {**command.__annotations__, "anonymous": Anonymous}
    return run
