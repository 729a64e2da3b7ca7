"""The `view` command."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.wording import counted
from histosge_cli.console import Console, out, size
from histosge_cli.places import output_file, output_folder, readable_place
from histosge_cli.shared_options import Log, Overwrite, Quiet, StoreArg

if TYPE_CHECKING:
    from histosge.viewer.collection import Collection


SERVE = "python -m http.server --bind 127.0.0.1 --directory"


def _is_file(place: Path) -> bool:
    """Tell whether a page goes into one file, by its name."""
    return place.suffix.lower() in {".html", ".htm"}


def _page_place(value: Path | None) -> Path | None:
    """Refuse a place that neither a folder nor a file can be written to."""
    return output_file(value) if value is not None and _is_file(value) else output_folder(value)


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
            metavar="DIR|FILE.html",
            callback=_page_place,
            help="Write the page, and end: a folder for any web server, or one file that opens by a double click.",
        ),
    ] = None,
    genes: Annotated[
        str | None, typer.Option("--genes", metavar="A,B", help="With --static: only these genes.")
    ] = None,
    slide: Annotated[
        list[str] | None, typer.Option("--slide", metavar="ID", help="Only this slide; repeat for several.")
    ] = None,
    gene_sets: Annotated[
        Path | None,
        typer.Option("--gene-sets", metavar="FILE.gmt", help="Named gene sets, as MSigDB has them."),
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
    slides = slide or []
    if static is not None:
        from histosge.viewer.static_page import export_one_file, export_page

        is_file = _is_file(static)

        # Before stores are opened, which may take a while over a network.
        if not 0.01 <= tiles_mpp <= 1000:
            raise ViewError(
                f"--tiles-mpp {tiles_mpp:g} is no scale; give microns per pixel from 0.01 to 1000, such as 2"
            )
        collection = Collection.open(store, expression, samples, domains, tiles_mpp, gene_sets, slides)
        names = [name.strip() for name in (genes or "").split(",") if name.strip()]
        write = export_one_file if is_file else export_page
        done = write(collection, static, names, on_message=console.message, overwrite=overwrite)
        console.record("exported", **vars(done))
        todo = "nothing to do, " if done.was_there else ""
        how = "open it with a double click" if is_file else f"look at it with: {SERVE} {static}"
        out.print(
            f"{static}: {todo}{counted(done.slides, 'slide')}, {counted(done.tiles, 'tile')}, "
            f"{counted(done.genes, 'gene')}, {size(done.n_bytes)}; {how}",
            markup=False,
        )
        return
    if genes:
        raise ViewError("--genes chooses what --static writes; on the live page every gene can be searched")
    collection = Collection.open(store, expression, samples, domains, gene_sets=gene_sets, slides=slides)
    _serve(collection, port, open_browser=not no_open)


def _serve(collection: "Collection", port: int, *, open_browser: bool) -> None:
    from histosge.viewer.server import HOST, listen, require_packages, serve

    require_packages()  # first: a missing package is named before a port is taken
    taken = listen(port)
    out.print(f"http://{HOST}:{taken.getsockname()[1]}/  (Ctrl-C ends it)", markup=False)
    serve(collection, taken, open_browser=open_browser)
