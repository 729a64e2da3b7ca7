"""`analyse summary`: patches counted, and how far each slide's mean is from the cohort's."""

from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.wording import counted
from histosge_cli.analyse.options import OutFile, Scheduler, Slides, Workers
from histosge_cli.analyse.stream import StreamChoice, first_few, open_stream
from histosge_cli.analyse.tables import print_table
from histosge_cli.console import Console
from histosge_cli.model_options import EncoderKey, Grid
from histosge_cli.shared_options import Json, Log, Overwrite, Quiet

if TYPE_CHECKING:
    from featurestore.analysis.class_summary import SizeOf


def summary(
    context: typer.Context,
    annotations: Annotated[
        str | None,
        typer.Option(
            "--annotations",
            metavar="PLACE",
            help="Means of each annotated class: a mask or GeoJSON of the slide, a folder of them named by slide id, or a "
            "sample sheet with a column mask.",
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
    """Count patches, and measure how far each slide's mean is from the cohort's; --out adds mean and sd of every feature.

    Of expression maps it adds the mean of each gene, in a column of its name. With --annotations there is a row for each
    slide and class, and one for each class of all slides.

    Example: histosge analyse store.zarr summary --out summary.parquet
    """
    from featurestore.analysis.class_summary import annotation_files, summarise_classes
    from featurestore.analysis.summary import summarise
    from featurestore.errors import StoreError

    if annotations is not None and (workers or scheduler):
        raise StoreError("--annotations are read by one process; leave out --workers and --scheduler")
    choice = StreamChoice(slide, grid, encoder, workers, scheduler, quiet=quiet, log=log)
    with open_stream(context.obj, choice, out_file=out_file) as stream:
        if annotations is None:
            frame = summarise(stream)
        else:
            files = annotation_files(annotations, stream.names)
            if absent := [name for name in stream.names if name not in files]:
                Console(quiet, log).message(
                    f"{counted(len(absent), 'slide')} left out, without annotations: {first_few(absent)}"
                )
            frame = summarise_classes(stream, files, _sizes(context.obj, maps=stream.columns is not None))
    print_table(frame, as_json=as_json, out_file=out_file, overwrite=overwrite, genes=stream.columns)


def _sizes(url: str, *, maps: bool) -> "SizeOf":
    """Return what tells the size of a slide: of a feature store its metadata, of maps nothing."""
    from featurestore.storage.store import Store

    if maps:
        return lambda slide_id: None
    store = Store.open(url)
    return lambda slide_id: store.slide(slide_id).size_px
