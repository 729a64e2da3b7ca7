"""The `preview` command."""

from pathlib import Path
from typing import Annotated

import typer

from featurestore.wording import counted
from histosge_cli.console import Console, out, resumable
from histosge_cli.places import output_folder
from histosge_cli.shared_options import Log, Overwrite, Quiet, StoreArg


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(preview)


def preview(
    store: StoreArg,
    out_dir: Annotated[
        Path,
        typer.Argument(
            metavar="OUT_DIR", callback=output_folder, help="Folder for the page; open its index.html."
        ),
    ],
    no_outliers: Annotated[
        bool,
        typer.Option(
            "--no-outliers",
            help="Do not read the embeddings, which shows the slides that look unlike the others.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Write a page of all slides: outline of the tissue, quality flags, what is embedded, what failed and why.

    It is a folder of files that opens without a server. Again for the same store it is brought up to date.

    Example: histosge preview store.zarr page
    """
    from featurestore.preview.store_preview import write_preview

    console = Console(quiet, log)
    with resumable(), console.bars("slides") as bars:
        done = write_preview(
            store,
            out_dir,
            outliers=not no_outliers,
            overwrite=overwrite,
            on_progress=bars.update,
            on_message=console.message,
        )
    console.record("preview", **vars(done))
    todo = "nothing to do, " if done.was_there else ""
    far = f", {done.outliers} far from the others" if done.outliers else ""
    out.print(
        f"{out_dir}/index.html: {todo}{counted(done.slides, 'slide')}, {done.failed} failed{far}",
        markup=False,
    )
