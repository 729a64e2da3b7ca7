"""Commands that exchange embeddings and maps with other tools: import, export."""

from pathlib import Path
from typing import Annotated

import typer

from featurestore.wording import counted
from histosge.errors import ExportError
from histosge_cli.console import Console, out
from histosge_cli.places import exported_place, output_place, readable_place
from histosge_cli.registry_help import listed, with_registry_help
from histosge_cli.shared_options import Overwrite, Quiet, StoreArg


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(name="import")(import_)
    app.command(cls=with_registry_help(to=_formats))(export)


def _formats() -> str:
    from histosge.exporting.export_format import FORMATS

    return listed(FORMATS.records())


def import_(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            callback=readable_place,
            help="TRIDENT, CLAM or STAMP .h5, or a raw2features .embeddings.zarr.",
        ),
    ],
    store: StoreArg,
    slide: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The slide's file, for its size, scale and fingerprint."),
    ] = None,
    slide_id: Annotated[str | None, typer.Option(metavar="ID", help="The slide's name in the store.")] = None,
    slide_mpp: Annotated[float | None, typer.Option(help="Microns per pixel of the slide.")] = None,
    encoder: Annotated[
        str | None, typer.Option(metavar="K", help="The encoder that made the embeddings.")
    ] = None,
    mpp: Annotated[float | None, typer.Option(help="Microns per pixel of the patches.")] = None,
    patch: Annotated[int | None, typer.Option(help="Side of a patch, pixels at --mpp.")] = None,
    grid: Annotated[
        str | None, typer.Option(metavar="KEY", help="Which grid of a raw2features store with several.")
    ] = None,
    scale: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="Multiply vectors by F, such as 0.25, if their values exceed 65504; recorded."
        ),
    ] = None,
) -> None:
    """Import embeddings of another tool into a feature store, to train and predict on them.

    Example: histosge import features/A.h5 store.zarr --slide A.svs --encoder uni
    """
    from featurestore.exchange.importing import ImportOptions, import_embeddings

    options = ImportOptions(slide, slide_id, encoder, slide_mpp, mpp, patch, grid, scale)
    done = import_embeddings(file, store, options)
    line = f"{done.slide_id}: {counted(done.patches, 'patch')} imported as {done.grid_key}"
    if done.not_finite:
        line += f"; {done.not_finite} more have no finite vector in the file, and count as not readable"
    if done.grid_key.startswith("spots-"):
        line += (
            "; they are on no common grid, so each is stored at its own position: training and prediction need a grid "
            "(histosge embed)"
        )
    if done.off_grid:
        line += (
            f"; {counted(done.off_grid, 'patch')} of the first row or column left out: TRIDENT places them off the grid of "
            "all others"
        )
    out.print(line, markup=False)


def export(
    store: Annotated[
        str,
        typer.Argument(
            metavar="STORE",
            callback=exported_place,
            help="Expression store or feature store; or the .h5ad that predict --cells has written.",
        ),
    ],
    out_path: Annotated[
        Path, typer.Argument(metavar="OUT", callback=output_place, help="File or folder to write to.")
    ],
    to: Annotated[str, typer.Option()],  # its help is made from the registry
    slide: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="Only this slide; repeat for several.")
    ] = None,
    genes: Annotated[str | None, typer.Option(metavar="A,B", help="Only these genes of a map.")] = None,
    slides_of: Annotated[
        str | None,
        typer.Option(
            "--store", metavar="STORE", help="Feature store that knows the slides, for their picture."
        ),
    ] = None,
    picture_mpp: Annotated[
        float, typer.Option(help="Microns per pixel of the picture in SpatialData.")
    ] = 2.0,
    domains: Annotated[
        str,
        typer.Option(
            metavar="N|FOLDER",
            help="Domains in a GeoJSON or for QuPath, or a table of labels per slide (parquet).",
        ),
    ] = "7",
    ngff: Annotated[str, typer.Option(help="Version of OME-Zarr: 0.4 or 0.5.")] = "0.4",
    samples: Annotated[
        str | None,
        typer.Option(
            metavar="CSV",
            callback=readable_place,
            help="Sample sheet: its measured spots become a second table (SpatialData).",
        ),
    ] = None,
    grid: Annotated[str | None, typer.Option(metavar="KEY", help="Needed when there are several.")] = None,
    encoder: Annotated[str | None, typer.Option(metavar="K", help="Needed when there are several.")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write maps or embeddings as other tools read them.

    Example: histosge export maps.zarr c4.h5ad --to h5ad --slide C4 --store store.zarr
    """
    from histosge.exporting.cell_export import export_cells, is_cell_table
    from histosge.exporting.export import export as run
    from histosge.exporting.export_format import ExportSettings
    from histosge.exporting.open_tables import ExportSelection

    names = [g.strip() for g in genes.split(",") if g.strip()] if genes else []
    selection = ExportSelection(tuple(slide or ()), tuple(names), grid, encoder)
    # One option for both: a folder that is called like a number is given as ./7.
    wanted = int(domains) if domains.isdecimal() and len(domains) < 10 else Path(domains)
    settings = ExportSettings(slides_of, picture_mpp, wanted, ngff, samples)
    message = Console(quiet).message
    if is_cell_table(store):
        _refuse_unused(slide, slides_of, samples, grid, encoder)
        out.print(export_cells(store, out_path, to, names, overwrite=overwrite), markup=False)
        return
    for line in run(store, out_path, to, selection, settings, overwrite=overwrite, on_message=message):
        out.print(line, markup=False)


def _refuse_unused(*given: object) -> None:
    names = ("--slide", "--store", "--samples", "--grid", "--encoder")
    unused = [name for name, value in zip(names, given, strict=True) if value]
    if unused:
        raise ExportError(f"a table of cells is of one slide and map: leave out {', '.join(unused)}")
