"""Options and arguments that commands of every kind share."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.places import log_file, store_place

OUTPUT = "Output"
"""The panel of ``--help`` for what is written and printed."""

StoreArg = Annotated[
    str,
    typer.Argument(metavar="STORE", callback=store_place, help="Folder or URL of the feature store."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print no progress and no messages.", rich_help_panel=OUTPUT)
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log",
        metavar="FILE",
        callback=log_file,
        help="Append messages and progress as JSON lines.",
        rich_help_panel=OUTPUT,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier result that was made with other settings or inputs.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=OUTPUT)]
