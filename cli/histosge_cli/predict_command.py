"""The command that predicts maps of gene expression."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featurestore.wording import counted
from histosge_cli.console import Console, out, resumable
from histosge_cli.model_options import (
    DATA,
    OUTPUT,
    RUN,
    EncoderKey,
    Force,
    Grid,
    Page,
    find_own_class,
    split_names,
)
from histosge_cli.places import (
    model_place,
    new_store,
    output_file,
    readable_place,
)
from histosge_cli.shared_options import Log, Overwrite, Quiet, StoreArg
from histosge_cli.worker_count import worker_count

if TYPE_CHECKING:
    from histosge.data.expression.loaded_expression import SlideFrame
    from histosge.prediction.slide_prediction import PredictResult


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(predict)


def predict(
    store: StoreArg,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            callback=model_place,
            help="A trained model's folder, or hf://OWNER/NAME on the hub.",
        ),
    ],
    out_store: Annotated[
        str,
        typer.Argument(metavar="OUT", callback=new_store, help="Expression store to write, a folder or URL."),
    ],
    slide: Annotated[
        list[str] | None,
        typer.Option(
            "--slide", metavar="ID", help="Only this slide; repeat for several.", rich_help_panel=DATA
        ),
    ] = None,
    genes: Annotated[
        str | None,
        typer.Option(
            "--genes",
            metavar="A,B",
            help="Only these genes of the model; --report shows them large, on one scale.",
            rich_help_panel=DATA,
        ),
    ] = None,
    condition_on: Annotated[
        str | None,
        typer.Option(
            "--condition-on",
            metavar="FILE",
            callback=readable_place,
            help="Spots measured on the slide: .h5ad or Space Ranger folder.",
            rich_help_panel=DATA,
        ),
    ] = None,
    force: Force = False,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="module:Class",
            help="The class of a model of your own; it is imported only if it is named here.",
            rich_help_panel=DATA,
        ),
    ] = None,
    cells: Annotated[
        Path | None,
        typer.Option(
            "--cells",
            metavar="FILE",
            callback=readable_place,
            help="Outlines of cells (one slide): GeoJSON of QuPath or CellViT, Xenium's cell_boundaries.parquet. Their "
            "expression is written to --h5ad FILE, or beside OUT.",
            rich_help_panel=DATA,
        ),
    ] = None,
    h5ad: Annotated[
        Path | None,
        typer.Option(
            "--h5ad",
            metavar="FILE",
            callback=output_file,
            help="Also write AnnData (one slide): one row per patch, or per cell with --cells.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    report: Page = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Processes that share the blocks of all slides out among themselves; auto: one per core.",
            rich_help_panel=RUN,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Instead, the workers of a running dask cluster, such as tcp://host:8786; they see the same paths.",
            rich_help_panel=RUN,
        ),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            metavar="D",
            help="Where dense projects and attention computes: cpu, cuda, or auto for a GPU where there is one.",
            rich_help_panel=RUN,
        ),
    ] = "cpu",
    overwrite: Overwrite = False,
    grid: Grid = None,
    encoder: EncoderKey = None,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Predict a dense expression map for slides of a store.

    Example: histosge predict store.zarr model maps.zarr --slide C4 --h5ad c4.h5ad
    """
    from featurestore.whole_file import check_output
    from histosge.data.section_loading import Selection
    from histosge.errors import ModelError
    from histosge.prediction.predict import PredictSettings
    from histosge.prediction.predict import predict as run

    console = Console(quiet, log)
    processes = worker_count(workers, scheduler)
    find_own_class(preset)
    # Before anything is predicted: a store of a thousand slides takes hours.
    for option, value in (("--h5ad", h5ad), ("--cells", cells)):
        if value is not None and len(slide or []) != 1:
            raise ModelError(f"{option} writes one slide; name it with --slide ID")
    frame: SlideFrame | None = None
    if cells is not None:
        h5ad = h5ad or _cells_place(out_store, (slide or [""])[0])
        frame = _checked_cells(store, (slide or [""])[0], cells)
    for path in (h5ad, report):
        if path is not None:
            check_output(path, folder=path == h5ad and path.suffix == ".zarr")
    selection, names = Selection(grid, encoder), split_names(genes)
    made_with: dict[str, Any] = {}
    if report is not None:
        from histosge.prediction.made_with import describe_maps
        from histosge.reporting.page import is_page_there

        made_with = describe_maps(
            store, model, selection, slide_ids=slide or [], genes=names, condition_on=condition_on
        )
        if is_page_there(report, made_with, overwrite=overwrite):
            report = None  # whole already, of these very maps
    with resumable(), console.bars("blocks") as bars:
        results = run(
            store,
            model,
            out_store,
            PredictSettings(selection, processes or 1, preset, scheduler, device),
            slide_ids=slide or [],
            genes=names,
            condition_on=condition_on,
            overwrite=overwrite,
            force=force,
            on_progress=bars.update,
            on_message=console.message,
        )
    _print_results(console, results)
    if h5ad is not None:
        _write_table(console, out_store, results[0], h5ad, cells, frame, overwrite=overwrite, force=force)
    failed = sum(bool(result.failed) for result in results)
    if failed and report is not None:
        # A page records its slides, and is not made again for the same: it must not be missing some of them.
        console.message(f"{report} is written once all slides are predicted; {failed} failed")
    elif report is not None:
        _write_report(out_store, results, model, preset, report, made_with, names)
    if failed:
        raise typer.Exit(1)


def _print_results(console: Console, results: "list[PredictResult]") -> None:
    for result in results:
        console.record("slide", **vars(result))
        if result.failed:
            out.print(f"{result.slide_id}: failed: {result.failed}", markup=False)
            continue
        # The same again, finished, is no error: it says so, and exits with 0.
        todo = (
            f"{result.computed} of {result.planned} blocks computed" if result.computed else "nothing to do"
        )
        out.print(f"{result.slide_id}: {todo}, {counted(result.patches, 'patch')}", markup=False)


def _write_report(
    out_store: str,
    results: "list[PredictResult]",
    model: str,
    preset: str | None,
    report: Path,
    made_with: dict[str, Any],
    names: list[str],
) -> None:
    from histosge.prediction.report import write_prediction_report
    from histosge.training.saved_model import load_model

    shown = [(result.slide_id, result.grid_key) for result in results]
    write_prediction_report(out_store, shown, load_model(model, preset), report, made_with, names)
    out.print(str(report), markup=False)


def _cells_place(out_store: str, slide_id: str) -> Path:
    """Return where the expression of cells goes where no file is named: beside the maps."""
    from histosge.errors import ModelError

    if "://" in out_store:
        raise ModelError("--cells writes a file on this machine; name it with --h5ad FILE")
    place = Path(out_store)
    return place.with_name(f"{place.name.removesuffix('.zarr')}_{slide_id}_cells.h5ad")


def _checked_cells(store: str, slide_id: str, cells: Path) -> "SlideFrame":
    """Read the first outlines before anything is predicted; return the slide that they are placed on."""
    from featurestore.storage.store import Store
    from histosge.data.expression.loaded_expression import SlideFrame
    from histosge.exporting.cell_table import check_outlines

    opened = Store.open(store)
    # A slide that the store does not hold is refused by `predict`, with the nearest names.
    if slide_id not in opened.slide_ids():
        return SlideFrame(slide_id, "", 1.0)
    record = opened.slide(slide_id)
    frame = SlideFrame(slide_id, "", record.mpp, record.size_px)
    check_outlines(cells, frame)
    return frame


def _write_table(
    console: Console,
    out_store: str,
    result: "PredictResult",
    path: Path,
    cells: Path | None,
    frame: "SlideFrame | None",
    *,
    overwrite: bool,
    force: bool,
) -> None:
    """Write a slide's map as AnnData: a row for each patch, or for each outlined cell."""
    from featurestore.earlier_results import staged_result
    from histosge.exporting.cell_table import write_cells
    from histosge.exporting.formats.anndata_files import write_h5ad
    from histosge.prediction.expression_store import ExpressionStore

    # From the store, not from memory: a map that was there already is written, too.
    stored = ExpressionStore.open(out_store).map(result.slide_id, result.grid_key)
    if cells is not None and frame is not None:
        done = write_cells(
            stored, cells, path, frame, overwrite=overwrite, force=force, on_message=console.message
        )
        todo = "nothing to do, " if done.was_there else ""
        out.print(
            f"{path}: {todo}{counted(done.cells, 'cell')} x {counted(len(stored.genes), 'gene')}. {done.resolution}",
            markup=False,
        )
        return
    with staged_result(path, overwrite=overwrite) as staged:
        rows = write_h5ad(stored, staged.path)
    todo = "nothing to do, " if staged.was_there else ""
    out.print(f"{path}: {todo}{counted(rows, 'patch')} x {counted(len(stored.genes), 'gene')}", markup=False)
