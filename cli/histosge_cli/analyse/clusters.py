"""`analyse clusters`: k-means over all patches of the cohort."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.analyse.options import OutFile, Scheduler, Slides, Workers
from histosge_cli.analyse.stream import StreamChoice, open_stream
from histosge_cli.analyse.tables import print_table, staged_folder
from histosge_cli.console import err
from histosge_cli.model_options import EncoderKey, Grid
from histosge_cli.places import output_folder
from histosge_cli.shared_options import OUTPUT, Json, Log, Overwrite, Quiet


def clusters(
    context: typer.Context,
    k: Annotated[int, typer.Option("--k", help="Number of clusters.")] = 8,
    seed: Annotated[int, typer.Option(help="The same seed and store give the same clusters.")] = 0,
    passes: Annotated[
        int, typer.Option(help="Limit of passes over the store, besides the first and the last.")
    ] = 10,
    mini_batch: Annotated[
        bool,
        typer.Option(
            "--mini-batch",
            help="Update the centres after each block instead of each pass: needs fewer passes.",
        ),
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option(
            "--labels",
            metavar="DIR",
            callback=output_folder,
            help="Write one parquet file per slide with the cluster of each patch.",
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
    """Cluster all patches of the cohort by k-means, and count each cluster's share of each slide.

    Example: histosge analyse store.zarr clusters --k 12 --labels clusters
    """
    from featurestore.analysis.kmeans import KMeansSettings, fit_kmeans
    from featurestore.errors import StoreError

    if mini_batch and (workers or scheduler):
        raise StoreError(
            "--mini-batch moves the centres after each block, so one process reads them all; leave out --workers and "
            "--scheduler, or --mini-batch"
        )
    settings = KMeansSettings(k, seed, passes, mini_batch=mini_batch)
    choice = StreamChoice(slide, grid, encoder, workers, scheduler, quiet=quiet, log=log)
    with (
        open_stream(context.obj, choice, out_file=out_file, folder=labels) as stream,
        staged_folder(labels, overwrite=overwrite) as staged,
    ):
        fitted = fit_kmeans(stream, settings, staged)
    # On standard error: standard output is a table, or JSON for a program.
    if not quiet:
        state = "converged" if fitted.converged else "not converged; more --passes may help"
        err.print(f"inertia {fitted.inertia:.6g} after {fitted.passes} passes, centres {state}", markup=False)
    print_table(fitted.counts, as_json=as_json, out_file=out_file, overwrite=overwrite)
