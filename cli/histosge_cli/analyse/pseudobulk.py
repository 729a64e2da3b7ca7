"""`analyse pseudobulk`: one expression profile per slide or region."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.analyse.options import Slides
from histosge_cli.console import Console, out, resumable
from histosge_cli.model_options import Grid
from histosge_cli.places import output_file, readable_place
from histosge_cli.shared_options import Log, Overwrite, Quiet


def pseudobulk(
    context: typer.Context,
    out_file: Annotated[
        Path, typer.Argument(metavar="OUT", callback=output_file, help="AnnData to write, an .h5ad.")
    ],
    regions: Annotated[
        Path | None,
        typer.Option(
            "--regions",
            metavar="FILE|FOLDER",
            callback=readable_place,
            help="GeoJSON with regions of the slide, or a folder with SLIDE.geojson for each: a row per region.",
        ),
    ] = None,
    slide: Slides = None,
    grid: Grid = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Write one expression profile per slide, or per region that was drawn on it, for scanpy or pydeseq2.

    Example: histosge analyse maps.zarr pseudobulk c4.h5ad --slide C4 --regions c4_regions.geojson
    """
    from featurestore.earlier_results import staged_result
    from histosge.analysis.cohort_maps import CohortMaps
    from histosge.analysis.pseudobulk import pseudobulk as run
    from histosge.analysis.pseudobulk import write_profiles
    from histosge.errors import ExportError

    if out_file.suffix != ".h5ad":
        raise ExportError(
            f"{out_file.name} is no .h5ad; profiles are written as AnnData, such as profiles.h5ad"
        )
    console = Console(quiet, log)
    with resumable(), console.bars("slides") as bars:
        data = run(CohortMaps(context.obj, slide or (), grid, bars.update), regions)
    with staged_result(out_file, overwrite=overwrite) as staged:
        write_profiles(data, staged.path)
    todo = "nothing to do, " if staged.was_there else ""
    out.print(f"{out_file}: {todo}{data.n_obs} profiles x {data.n_vars} genes", markup=False)
