"""`analyse signatures`: sets of genes scored on every patch of maps."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.analyse.options import Slides
from histosge_cli.analyse.tables import print_table, staged_folder
from histosge_cli.console import Console, resumable
from histosge_cli.model_options import Grid
from histosge_cli.places import output_folder, readable_place
from histosge_cli.shared_options import Json, Log, Overwrite, Quiet


def signatures(
    context: typer.Context,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="OUT_DIR",
            callback=output_folder,
            help="Folder for one parquet file per slide, a column per set.",
        ),
    ],
    gmt: Annotated[
        Path | None,
        typer.Option(
            "--gmt", metavar="FILE", callback=readable_place, help="Sets of genes, as MSigDB offers them."
        ),
    ] = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=A,B", help="A set of genes; repeat for several."),
    ] = None,
    slide: Slides = None,
    grid: Grid = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Score sets of genes on every patch of the maps: the mean of their z-scores over all patches of all slides.

    Example: histosge analyse maps.zarr signatures scores --gmt hallmark.gmt --set TLS=CXCL13,CD79A,MS4A1
    """
    from featurestore.analysis.patch_tables import check_folder
    from histosge.analysis.cohort_maps import CohortMaps
    from histosge.analysis.gene_sets import parse_sets, present, read_gmt
    from histosge.analysis.signatures import write_signatures
    from histosge.errors import ExportError

    typed = parse_sets(sets or [])
    named = read_gmt(gmt) if gmt is not None else {}
    if not typed and not named:
        raise ExportError("there is no set of genes to score: give --gmt FILE or --set NAME=A,B")
    if twice := sorted(set(typed) & set(named)):
        raise ExportError(f"the set {twice[0]!r} is in --gmt and in --set; rename one of them")
    check_folder(folder)
    console = Console(quiet, log)
    with resumable(), console.bars("slides") as bars:
        maps = CohortMaps(context.obj, slide or (), grid, bars.update)
        kept, remarks = present({**named, **typed}, maps.genes)
        for remark in remarks:
            console.message(remark)
        with staged_folder(folder, overwrite=overwrite) as staged:
            assert staged is not None
            frame = write_signatures(maps, kept, staged)
    if not as_json:
        # Of a single slide the mean is 0 but for rounding, which would be printed as 3e-10; and -0 as "-0".
        mean = frame["mean"].round(6)
        frame = frame.with_columns(
            mean.zip_with(mean != 0, mean.clear(len(mean)).fill_null(0.0)).alias("mean")
        )
    print_table(frame, as_json=as_json, out_file=None)
