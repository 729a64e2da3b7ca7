"""`analyse moran`: genes of maps ranked by how much neighbouring patches agree."""

import typer

from histosge_cli.analyse.options import OutFile, Slides
from histosge_cli.analyse.tables import print_table, write_out
from histosge_cli.console import Console, resumable
from histosge_cli.model_options import Grid
from histosge_cli.shared_options import Json, Log, Overwrite, Quiet

MAX_PRINTED_ROWS = 20
"""Genes of each slide that a terminal has room for; the file and --json have all of them."""


def moran(
    context: typer.Context,
    slide: Slides = None,
    grid: Grid = None,
    out_file: OutFile = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Rank the genes of maps by Moran's I: how much neighbouring patches agree.

    A map is smooth by construction, so the values rank genes and are no test.

    Example: histosge analyse maps.zarr moran --out moran.parquet
    """
    import polars as pl

    from featurestore.analysis.patch_tables import check_file
    from histosge.analysis.cohort_maps import CohortMaps
    from histosge.analysis.variable_genes import moran_table

    if out_file is not None:
        check_file(out_file)
    console = Console(quiet, log)
    with resumable(), console.bars("slides") as bars:
        frame = moran_table(CohortMaps(context.obj, slide or (), grid, bars.update))
    shown = frame if as_json else frame.group_by("slide", maintain_order=True).head(MAX_PRINTED_ROWS)
    # JSON has no NaN: a gene that is constant has no index.
    print_table(shown.with_columns(pl.col("moran").fill_nan(None)), as_json=as_json, out_file=None)
    if out_file is not None:
        write_out(frame, out_file, overwrite=overwrite)
