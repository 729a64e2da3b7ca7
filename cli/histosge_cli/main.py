"""The `histosge` command: gathers the commands and turns the user's mistakes into one line.

Exit codes: 0 done; 1 ran, and the answer is no; 2 the user's mistake. A bug keeps its traceback.
"""

import errno
import sys

import typer

from featurestore.errors import FeatureStoreError
from histosge_cli import analyse, demo, exchange, model, store, view

app = typer.Typer(
    name="histosge",
    help=(
        "From an ordinary H&E slide to a spatial map of every gene.\n\n"
        "Encode a slide once (embed), into a store that lives anywhere; train in seconds (train); "
        "predict everywhere (predict); trust the number (evaluate). Start with: histosge demo"
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (demo, store, model, analyse, exchange, view):
    module.register(app)


def main() -> None:
    """Run the command line."""
    try:
        app()
    except FeatureStoreError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(  # noqa: T201
            f"error: cannot write{where}: {error.strerror}; what is written so far is whole, "
            "make room and run the same command again",
            file=sys.stderr,
        )
        sys.exit(2)
