"""Options that the commands of `analyse` share."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.places import output_file
from histosge_cli.shared_options import OUTPUT

WHERE = "Where it runs"
Slides = Annotated[
    list[str] | None, typer.Option("--slide", metavar="ID", help="Only this slide; repeat for several.")
]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        callback=output_file,
        help="Also write the table with all columns, as parquet.",
        rich_help_panel=OUTPUT,
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="N|auto",
        help="Share the reading and adding out among N processes of this machine; auto: one per core.",
        rich_help_panel=WHERE,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Use the workers of a running dask cluster, such as tcp://host:8786; they must see the same store.",
        rich_help_panel=WHERE,
    ),
]
