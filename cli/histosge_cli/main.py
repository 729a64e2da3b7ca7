"""The `histosge` command: gathers the commands and turns the user's mistakes into one line.

Exit codes: 0 done; 1 ran, and the answer is no; 2 the user's mistake. A bug keeps its traceback.
"""

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Annotated, Any, TextIO

import typer
from typer.models import CommandInfo, TyperInfo

from featurestore.collector import skip_collection_at_exit
from featurestore.credentials import redact
from featurestore.errors import (
    ClusterWarning,
    ExtensionWarning,
    FeatureStoreError,
    SlideWarning,
    first_line,
)
from featurestore.server_errors import access_reason, is_client_error
from featurestore.threads import keep_to_own_cores, spin_briefly
from histosge_cli import (
    demo_command,
    embed_command,
    evaluate_command,
    exchange_commands,
    figure_command,
    predict_command,
    preview_command,
    samples_command,
    store_commands,
    train_command,
    view_command,
)
from histosge_cli.analyse import commands as analyse_commands
from histosge_cli.anonymous_option import add_anonymous_option
from histosge_cli.console import out
from histosge_cli.places import refuse_empty
from histosge_cli.repeated_options import refusing_repeats

PANELS = {
    "Start here": ("demo", "doctor"),
    "1. Encode slides once": ("samples", "encoders", "embed", "import"),
    "2. Train and predict": ("train", "predict"),
    "3. Know how good it is": ("evaluate",),
    "4. Look, and take it elsewhere": ("view", "preview", "figure", "analyse", "export"),
    "Care for a store": ("ls", "validate", "rm"),
}
"""Panels of ``--help``, in the order of use."""
HELP = """
From an ordinary H&E slide to a spatial map of every gene.

Encode a slide once into a store that lives anywhere; train in seconds; predict everywhere; trust the number.
A first session, on a sample sheet (CSV: slide_id, slide, expression, mpp, donor):

\b
  histosge demo                                            all of it, offline, on a made slide
  histosge embed cohort.csv store.zarr --mpp 0.5 --stride 112
  histosge train cohort.csv store.zarr model --genes 250
  histosge predict store.zarr model maps.zarr --h5ad maps.h5ad --slide C4
  histosge evaluate cohort.csv store.zarr report --split section
  histosge ls store.zarr

Every command can be repeated: only what is missing is computed. STORE is a folder or a URL (s3://bucket/store).
Each command's own help ends with an example: histosge COMMAND --help.
"""


def _in_order(app: typer.Typer) -> None:
    """Put commands into their panels, in the order in which they are used; a new one goes last, under no heading."""
    order = {name: i for i, name in enumerate(name for names in PANELS.values() for name in names)}
    panel_of = {name: panel for panel, names in PANELS.items() for name in names}
    infos: list[CommandInfo | TyperInfo] = [*app.registered_commands, *app.registered_groups]
    for info in infos:
        info.rich_help_panel = panel_of.get(_name(info), info.rich_help_panel)
        for command in [info] if isinstance(info, CommandInfo) else _commands_of(info):
            command.cls = refusing_repeats(command.cls)
    # typer prints panels in the order of their first commands, so sorting the commands orders both.
    app.registered_commands.sort(key=lambda info: order.get(_name(info), len(order)))


def _commands_of(group: TyperInfo) -> list[CommandInfo]:
    return group.typer_instance.registered_commands if group.typer_instance is not None else []


def _name(info: CommandInfo | TyperInfo) -> str:
    callback = getattr(info, "callback", None)
    return info.name or str(getattr(callback, "__name__", ""))


app = typer.Typer(
    name="histosge",
    help=HELP,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a bug's traceback is for a report, and theirs shows the values of variables
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(is_asked: bool) -> None:
    if is_asked:
        import histosge

        out.print(f"histosge {histosge.__version__}", markup=False)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        # Eager: it is answered also where no command is given.
        typer.Option("--version", is_eager=True, callback=_print_version, help="Show the version and exit."),
    ] = False,
) -> None:
    pass


for module in (
    demo_command,
    samples_command,
    embed_command,
    store_commands,
    train_command,
    predict_command,
    evaluate_command,
    analyse_commands,
    exchange_commands,
    preview_command,
    figure_command,
    view_command,
):
    module.register(app)
_in_order(app)
add_anonymous_option(app)


# Typer brings a copy of click from 0.2x on, and used the package before: this is the class of the one that it uses.
_UsageError: Any = typer.BadParameter.__mro__[1]


@contextmanager
def _short_warnings() -> Iterator[None]:
    """Print a warning for the user as one line; Python's own form adds a line of our source."""
    with warnings.catch_warnings():
        # zarr (3.1) starts several writes and awaits none of the others once one was refused.
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        usual = warnings.showwarning

        def show(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, (ClusterWarning, ExtensionWarning, SlideWarning)):
                print(f"warning: {redact(str(message))}", file=sys.stderr)  # noqa: T201
            else:
                usual(message, category, filename, lineno, file, line)

        warnings.showwarning = show
        yield


def _os_error_line(error: OSError) -> str:
    """Return what a disk or a permission refused, and what to do about it."""
    where = f" {error.filename}" if error.filename else ""
    reason = error.strerror or first_line(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS):
        return (
            f"cannot write{where and f' at{where}'}: {reason}; what is written so far is whole, "
            "make room and run the same command again"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"cannot read or write{where}: {reason}; correct its permissions, or name another place"
    return f"cannot use{where}: {reason}" if where else reason


def _print_bug(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    """Print a traceback as Python does, without the credentials that a library's message may hold."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, frames))))


def _show_usage_error(error: Any) -> None:
    if type(error).__name__ == "NoArgsIsHelpError":  # a group without a command: its help, not an error
        error.show()
        return
    command = error.ctx.command_path if error.ctx else "histosge"
    text = " ".join(error.format_message().split()).rstrip(".")
    print(f"error: {redact(text)}; see: {command} --help", file=sys.stderr)  # noqa: T201


def main() -> None:
    """Run the command line."""
    sys.excepthook = _print_bug
    skip_collection_at_exit()
    try:
        with _short_warnings():
            refuse_empty(sys.argv[1:])
            spin_briefly()
            keep_to_own_cores()
            # Not standalone: a mistyped option is one line then, in place of a box of five.
            code = app(standalone_mode=False)
    except _UsageError as error:
        _show_usage_error(error)
        sys.exit(2)
    except typer.Abort:
        sys.exit(130)
    except BrokenPipeError:  # `histosge ls | head`: the reader has what it wanted
        # Python would flush standard output once more when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        # What a server, a disk or a permission does is no bug. A client library's error gets here only where a file is
        # not opened by `featurestore.location`.
        if isinstance(error, FeatureStoreError):
            line = str(error)
        elif is_client_error(error):
            line = access_reason(error, "")
        elif isinstance(error, OSError):
            line = _os_error_line(error)
        else:
            raise
        print(f"error: {redact(line)}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
