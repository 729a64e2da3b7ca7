"""Commands that analyse a feature store or expression maps: analyse summary, pca, clusters, similar ..."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.wording import counted
from histosge_cli.console import Console, err, out, resumable, table
from histosge_cli.model_options import EncoderKey, Grid
from histosge_cli.places import output_file, output_folder, readable_place
from histosge_cli.shared_options import OUTPUT, Json, Log, Overwrite, Quiet, StoreArg
from histosge_cli.worker_count import worker_count

if TYPE_CHECKING:
    import polars as pl

    from featurestore.analysis.class_summary import SizeOf
    from featurestore.analysis.patch_stream import PatchStream
    from featurestore.analysis.slide_source import SlideSource
    from featurestore.events import OnProgress

WHERE = "Where it runs"
Slides = Annotated[
    list[str] | None, typer.Option("--slide", metavar="ID", help="Only this slide; repeat for several.")
]
OutFile = Annotated[
    Path | None,
    typer.Option(
        "--out",
        metavar="FILE",
        callback=output_file,
        help="Also write the table with all columns, as parquet.",
        rich_help_panel=OUTPUT,
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="N|auto",
        help="Share the reading and adding out among N processes of this machine; auto: one per core.",
        rich_help_panel=WHERE,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        "--scheduler",
        metavar="ADDRESS",
        help="Use the workers of a running dask cluster, such as tcp://host:8786; they must see the same store.",
        rich_help_panel=WHERE,
    ),
]


def register(app: typer.Typer) -> None:
    """Add these commands, as a group that takes the store first."""
    group = typer.Typer(no_args_is_help=True)
    group.callback()(analyse)
    for command in (summary, pca, clusters, similar, signatures, pseudobulk, moran):
        group.command()(command)
    app.add_typer(group, name="analyse")


def analyse(context: typer.Context, store: StoreArg) -> None:
    """Analyse all slides of a feature store: summary, principal components, clusters, similar patches.

    An expression store, as predict writes it, is analysed in the same way: genes take the place of the embedding's features.
    Of maps alone there are signatures, pseudobulk, and spatially variable genes (moran).

    The store is read where it is, local or on S3; each block is read once a pass, and memory does not grow with the slides.

    Example: histosge analyse s3://bucket/store clusters --k 8
    """
    context.obj = store


@contextmanager
def _open_stream(
    context: typer.Context,
    slides: list[str] | None,
    grid: str | None,
    encoder: str | None,
    *,
    quiet: bool,
    log: Path | None,
    out_file: Path | None,
    run_on: tuple[str | None, str | None],
    folder: Path | None = None,
) -> "Iterator[PatchStream]":
    """Open the store, and afterwards report what was left out; check first that the results can be written.

    `run_on` is what was typed as --workers and --scheduler.
    """
    from featurestore.analysis.patch_tables import check_file, check_folder

    if out_file is not None:
        check_file(out_file)
    if folder is not None:
        check_folder(folder)
    console = Console(quiet, log)
    source = _source(context.obj, slides or None, grid, encoder)
    with (
        resumable(),
        console.bars("slides") as bars,
        _stream(source, *run_on, bars.update) as stream,
    ):
        yield stream
    what = "embedding" if stream.columns is None else "map"
    if stream.skipped:
        console.message(
            f"{counted(len(stream.skipped), 'slide')} left out, without this {what}: {_first_few(stream.skipped)}"
        )
    absent = stream.counts.absent
    if absent.total():
        affected = [name for name, count in absent.items() if count]
        why = "no embedding (unreadable, or not embedded yet)" if stream.columns is None else "no prediction"
        console.message(
            f"{counted(absent.total(), 'tissue patch')} left out, with {why}: {_first_few(affected)}; see: histosge ls"
        )


def _source(url: str, slides: list[str] | None, grid: str | None, encoder: str | None) -> "SlideSource":
    """Return the embeddings of a feature store, or the maps of an expression store: whichever is there."""
    from featurestore.analysis.slide_source import EmbeddingSource
    from featurestore.errors import StoreError
    from histosge.prediction.expression_source import ExpressionSource
    from histosge.prediction.expression_store import is_expression_store

    if not is_expression_store(url):
        return EmbeddingSource(url, slides, grid, encoder)
    if encoder is not None:
        raise StoreError(
            f"{url} holds expression maps, which have no encoder to choose: leave out --encoder {encoder[:60]}"
        )
    return ExpressionSource(url, slides, grid)


@contextmanager
def _stream(
    source: "SlideSource", workers: str | None, scheduler: str | None, on_progress: "OnProgress"
) -> "Iterator[PatchStream]":
    """Open a stream whose passes are made here, by worker processes, or by a running cluster."""
    from featurestore.analysis.patch_stream import PatchStream
    from featurestore.errors import ClusterError

    processes = worker_count(workers)
    if processes is None and scheduler is None:
        yield PatchStream(source, on_progress)
        return
    if processes is not None and scheduler is not None:
        raise ClusterError(
            "--workers starts processes on this machine and --scheduler uses a running cluster; give one of them"
        )
    from featurestore.analysis.cluster_stream import ClusterStream, connect

    source.names()  # a store that is not there is refused before processes are started
    with connect(processes, scheduler) as client:
        yield ClusterStream(client, source, on_progress)


def _first_few(names: "list[str] | tuple[str, ...]") -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


@contextmanager
def _staged_folder(folder: Path | None, *, overwrite: bool) -> "Iterator[Path | None]":
    """Yield a folder for tables of slides beside the final one, and move them when all of them may stand there."""
    from featurestore.earlier_results import check_content
    from featurestore.whole_file import put_in_place

    if folder is None:
        yield None
        return
    with TemporaryDirectory(dir=folder, prefix=".tables-", ignore_cleanup_errors=True) as beside:
        yield Path(beside)
        tables = {table_file: folder / table_file.name for table_file in sorted(Path(beside).iterdir())}
        # All are compared before the first is moved: a folder must not hold tables of two analyses.
        changed = {
            table_file: place
            for table_file, place in tables.items()
            if not check_content(table_file, place, overwrite=overwrite)
        }
        for table_file, place in changed.items():
            put_in_place(table_file, place)


MAX_PRINTED_GENES = 8
"""Columns of genes that a table on a terminal has room for."""


def _print_table(
    frame: "pl.DataFrame",
    *,
    as_json: bool,
    out_file: Path | None,
    overwrite: bool = False,
    genes: "tuple[str, ...] | None" = None,
) -> None:
    """Print a table without its columns of vectors, and of genes if they are many; the file has all columns."""
    import polars as pl

    from featurestore.analysis.patch_tables import write_table
    from featurestore.earlier_results import staged_result

    plain = frame.select(name for name, dtype in frame.schema.items() if not isinstance(dtype, pl.Array))
    if as_json:
        out.print(json.dumps(plain.to_dicts()), markup=False)
    else:
        # The row of the whole cohort has no slide id.
        named = (
            {**row, "slide": row["slide"] or "(all)"} if "slide" in row else row for row in plain.to_dicts()
        )
        hidden = set() if genes is None else {f"sd_{gene}" for gene in genes}
        hidden |= set(genes or ()) if len(genes or ()) > MAX_PRINTED_GENES else set()
        shown = [name for name in plain.columns if name not in hidden]
        table(shown, ([_as_text(row[name]) for name in shown] for row in named))
    if out_file is not None:
        with staged_result(out_file, overwrite=overwrite) as staged:
            write_table(frame, staged.path)
        err.print(f"{out_file}{': nothing to do' if staged.was_there else ''}", markup=False)


def _as_text(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


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
    with _open_stream(
        context,
        slide,
        grid,
        encoder,
        quiet=quiet,
        log=log,
        out_file=out_file,
        run_on=(workers, scheduler),
    ) as stream:
        if annotations is None:
            frame = summarise(stream)
        else:
            files = annotation_files(annotations, stream.names)
            if absent := [name for name in stream.names if name not in files]:
                Console(quiet, log).message(
                    f"{counted(len(absent), 'slide')} left out, without annotations: {_first_few(absent)}"
                )
            frame = summarise_classes(stream, files, _sizes(context.obj, maps=stream.columns is not None))
    _print_table(frame, as_json=as_json, out_file=out_file, overwrite=overwrite, genes=stream.columns)


def _sizes(url: str, *, maps: bool) -> "SizeOf":
    """Return what tells the size of a slide: of a feature store its metadata, of maps nothing."""
    from featurestore.storage.store import Store

    if maps:
        return lambda slide_id: None
    store = Store.open(url)
    return lambda slide_id: store.slide(slide_id).size_px


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

    with _open_stream(
        context,
        slide,
        grid,
        encoder,
        quiet=quiet,
        log=log,
        out_file=out_file,
        run_on=(workers, scheduler),
        folder=scores,
    ) as stream:
        fitted = fit_pca(stream, components)
        with _staged_folder(scores, overwrite=overwrite) as staged:
            if staged is not None:
                write_scores(fitted, stream, staged)
    _print_table(
        fitted.to_frame(), as_json=as_json, out_file=out_file, overwrite=overwrite, genes=fitted.columns
    )


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
    with (
        _open_stream(
            context,
            slide,
            grid,
            encoder,
            quiet=quiet,
            log=log,
            out_file=out_file,
            run_on=(workers, scheduler),
            folder=labels,
        ) as stream,
        _staged_folder(labels, overwrite=overwrite) as staged,
    ):
        fitted = fit_kmeans(stream, settings, staged)
    # On standard error: standard output is a table, or JSON for a program.
    if not quiet:
        state = "converged" if fitted.converged else "not converged; more --passes may help"
        err.print(f"inertia {fitted.inertia:.6g} after {fitted.passes} passes, centres {state}", markup=False)
    _print_table(fitted.counts, as_json=as_json, out_file=out_file, overwrite=overwrite)


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

    with _open_stream(
        context,
        None,
        grid,
        encoder,
        quiet=quiet,
        log=log,
        out_file=out_file,
        run_on=(workers, scheduler),
    ) as stream:
        if row is not None and col is not None and x_um is None and y_um is None:
            query = neighbours.patch_at(stream, slide, row, col)
        elif x_um is not None and y_um is not None and row is None and col is None:
            query = neighbours.patch_at_um(stream, slide, x_um, y_um)
        else:
            raise StoreError("give the patch: --row R --col C, or --x-um X --y-um Y")
        frame = neighbours.similar(stream, query, n, neighbours.as_metric(metric), exclude_um)
    _print_table(frame, as_json=as_json, out_file=out_file, overwrite=overwrite)


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
        with _staged_folder(folder, overwrite=overwrite) as staged:
            assert staged is not None
            frame = write_signatures(maps, kept, staged)
    if not as_json:
        # Of a single slide the mean is 0 but for rounding, which would be printed as 3e-10; and -0 as "-0".
        mean = frame["mean"].round(6)
        frame = frame.with_columns(
            mean.zip_with(mean != 0, mean.clear(len(mean)).fill_null(0.0)).alias("mean")
        )
    _print_table(frame, as_json=as_json, out_file=None)


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

    from featurestore.analysis.patch_tables import check_file, write_table
    from featurestore.earlier_results import staged_result
    from histosge.analysis.cohort_maps import CohortMaps
    from histosge.analysis.variable_genes import moran_table

    if out_file is not None:
        check_file(out_file)
    console = Console(quiet, log)
    with resumable(), console.bars("slides") as bars:
        frame = moran_table(CohortMaps(context.obj, slide or (), grid, bars.update))
    shown = frame if as_json else frame.group_by("slide", maintain_order=True).head(MAX_PRINTED_ROWS)
    # JSON has no NaN: a gene that is constant has no index.
    _print_table(shown.with_columns(pl.col("moran").fill_nan(None)), as_json=as_json, out_file=None)
    if out_file is not None:
        with staged_result(out_file, overwrite=overwrite) as staged:
            write_table(frame, staged.path)
        err.print(f"{out_file}{': nothing to do' if staged.was_there else ''}", markup=False)
