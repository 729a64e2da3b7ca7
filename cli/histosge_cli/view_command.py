"""The `view` command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histosge_cli.console import Console, out, size
from histosge_cli.places import output_folder, readable_place
from histosge_cli.store_commands import Log, Overwrite, Quiet, StoreArg

if TYPE_CHECKING:
    from histosge.viewer.collection import Collection


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(view)


def view(
    store: StoreArg,
    expression: Annotated[
        str | None,
        typer.Option(
            "--expression",
            metavar="P",
            callback=readable_place,
            help="Expression store, as histosge predict writes it.",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            "--samples",
            metavar="CSV",
            callback=readable_place,
            help="Sample sheet: its measured spots, and where slides lie now.",
        ),
    ] = None,
    domains: Annotated[
        Path | None,
        typer.Option(
            "--domains",
            metavar="DIR",
            callback=readable_place,
            help="Labels, as histosge analyse STORE clusters --labels writes.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on this machine; 0 means a free one.")] = 8765,
    no_open: Annotated[bool, typer.Option("--no-open", help="Do not open a browser.")] = False,
    static: Annotated[
        Path | None,
        typer.Option(
            "--static",
            metavar="DIR",
            callback=output_folder,
            help="Write the page as files for any web server, and end.",
        ),
    ] = None,
    genes: Annotated[
        str | None, typer.Option("--genes", metavar="A,B", help="With --static: only these genes.")
    ] = None,
    tiles_mpp: Annotated[
        float,
        typer.Option("--tiles-mpp", metavar="F", help="With --static: finest tiles, microns per pixel."),
    ] = 2.0,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Look at slides with gene maps on them, in a browser on this machine.

    Example: histosge view store.zarr --expression maps.zarr --samples cohort.csv
    """
    from histosge.errors import ViewError
    from histosge.viewer.collection import Collection

    console = Console(quiet, log)
    if static is not None:
        from histosge.viewer.static_page import export_page

        # Before stores are opened, which may take a while over a network.
        if not 0.01 <= tiles_mpp <= 1000:
            raise ViewError(
                f"--tiles-mpp {tiles_mpp:g} is no scale; give microns per pixel from 0.01 to 1000, such as 2"
            )
        collection = Collection.open(store, expression, samples, domains, tiles_mpp)
        names = [name.strip() for name in (genes or "").split(",") if name.strip()]
        done = export_page(collection, static, names, on_message=console.message, overwrite=overwrite)
        console.record("exported", **vars(done))
        todo = "nothing to do, " if done.was_there else ""
        out.print(
            f"{static}: {todo}{done.slides} slides, {done.tiles} tiles, {done.genes} genes, {size(done.n_bytes)}; "
            f"look at it with: python -m http.server --bind 127.0.0.1 --directory {static}",
            markup=False,
        )
        return
    if genes:
        raise ViewError("--genes chooses what --static writes; on the live page every gene can be searched")
    _serve(Collection.open(store, expression, samples, domains), port, open_browser=not no_open)


def _serve(collection: "Collection", port: int, *, open_browser: bool) -> None:
    from histosge.viewer.server import HOST, listen, require_packages, serve

    require_packages()  # first: a missing package is named before a port is taken
    taken = listen(port)
    out.print(f"http://{HOST}:{taken.getsockname()[1]}/  (Ctrl-C ends it)", markup=False)
    serve(collection, taken, open_browser=open_browser)
