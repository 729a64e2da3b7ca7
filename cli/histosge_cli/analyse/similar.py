"""`analyse similar`: the patches of the cohort that are most similar to a given one."""

from typing import Annotated

import typer

from histosge_cli.analyse.options import OutFile, Scheduler, Workers
from histosge_cli.analyse.stream import StreamChoice, open_stream
from histosge_cli.analyse.tables import print_table
from histosge_cli.model_options import EncoderKey, Grid
from histosge_cli.shared_options import Json, Log, Overwrite, Quiet


def similar(
    context: typer.Context,
    slide: Annotated[str, typer.Option("--slide", metavar="ID", help="Slide of the given patch.")],
    row: Annotated[int | None, typer.Option(help="Row of the given patch in the grid, with --col.")] = None,
    col: Annotated[int | None, typer.Option(help="Column of the given patch, with --row.")] = None,
    x_um: Annotated[
        float | None, typer.Option(help="Instead: microns from the slide's left, with --y-um.")
    ] = None,
    y_um: Annotated[float | None, typer.Option(help="Microns from the slide's top, with --x-um.")] = None,
    n: Annotated[int, typer.Option("--n", help="Number of patches to find.")] = 20,
    metric: Annotated[str, typer.Option(help="cosine or euclidean.")] = "cosine",
    exclude_um: Annotated[
        float | None,
        typer.Option(
            help="Leave out patches of the same slide within this distance, microns (default: the side of a patch)."
        ),
    ] = None,
    grid: Grid = None,
    encoder: EncoderKey = None,
    workers: Workers = None,
    scheduler: Scheduler = None,
    out_file: OutFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Find the patches of the whole cohort that are most similar to a given one.

    Example: histosge analyse store.zarr similar --slide C2 --x-um 3400 --y-um 1200 --n 50
    """
    from featurestore.analysis import neighbours
    from featurestore.errors import StoreError

    choice = StreamChoice(None, grid, encoder, workers, scheduler, quiet=quiet, log=log)
    with open_stream(context.obj, choice, out_file=out_file) as stream:
        if row is not None and col is not None and x_um is None and y_um is None:
            query = neighbours.patch_at(stream, slide, row, col)
        elif x_um is not None and y_um is not None and row is None and col is None:
            query = neighbours.patch_at_um(stream, slide, x_um, y_um)
        else:
            raise StoreError("give the patch: --row R --col C, or --x-um X --y-um Y")
        frame = neighbours.similar(stream, query, n, neighbours.as_metric(metric), exclude_um)
    print_table(frame, as_json=as_json, out_file=out_file, overwrite=overwrite)
