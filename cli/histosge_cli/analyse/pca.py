"""`analyse pca`: principal components of all patches."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.analyse.options import OutFile, Scheduler, Slides, Workers
from histosge_cli.analyse.stream import StreamChoice, open_stream
from histosge_cli.analyse.tables import print_table, staged_folder
from histosge_cli.model_options import EncoderKey, Grid
from histosge_cli.places import output_folder
from histosge_cli.shared_options import OUTPUT, Json, Log, Overwrite, Quiet


def pca(
    context: typer.Context,
    components: Annotated[
        int | None, typer.Option(help="Number of components (default: 50, or as many as there are).")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option(
            "--scores",
            metavar="DIR",
            callback=output_folder,
            help="Write one parquet file per slide with the scores of each patch.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    slide: Slides = None,
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
    """Compute the exact principal components of all patches in one pass; --scores needs a second one.

    Example: histosge analyse store.zarr pca --components 20 --out components.parquet --scores scores
    """
    from featurestore.analysis.pca import fit_pca, write_scores

    choice = StreamChoice(slide, grid, encoder, workers, scheduler, quiet=quiet, log=log)
    with open_stream(context.obj, choice, out_file=out_file, folder=scores) as stream:
        fitted = fit_pca(stream, components)
        with staged_folder(scores, overwrite=overwrite) as staged:
            if staged is not None:
                write_scores(fitted, stream, staged)
    print_table(
        fitted.to_frame(), as_json=as_json, out_file=out_file, overwrite=overwrite, genes=fitted.columns
    )
