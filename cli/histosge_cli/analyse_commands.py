"""Commands that ask a feature store something: analyse summary, pca, clusters, similar."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from histosge_cli.console import Console, err, out, resumable, table
from histosge_cli.model_commands import EncoderKey, Grid
from histosge_cli.store_commands import Json, Log, Quiet, StoreArg

if TYPE_CHECKING:
    import polars as pl

    from featurestore.analysis.patch_stream import PatchStream

Slides = Annotated[
    list[str] | None, typer.Option("--slide", metavar="ID", help="Only this slide; repeat for several.")
]
OutFile = Annotated[
    Path | None, typer.Option("--out", metavar="FILE", help="Also write the whole table, as parquet.")
]


def register(app: typer.Typer) -> None:
    """Add these commands, as a group that takes the store first."""
    group = typer.Typer(no_args_is_help=True)
    group.callback()(analyse)
    for command in (summary, pca, clusters, similar):
        group.command()(command)
    app.add_typer(group, name="analyse")


def analyse(context: typer.Context, store: StoreArg) -> None:
    """Ask a feature store something, where it lies: every block is read once a pass.

    Example: histosge analyse s3://bucket/store clusters --k 8
    """
    context.obj = store


@contextmanager
def _opened(
    context: typer.Context,
    slides: list[str] | None,
    grid: str | None,
    encoder: str | None,
    *,
    quiet: bool,
    log: Path | None,
    out_file: Path | None,
    folder: Path | None = None,
) -> "Iterator[PatchStream]":
    """Open the store; refuse early what cannot be written late."""
    from featurestore.analysis.patch_stream import open_stream
    from featurestore.analysis.patch_tables import check_file, check_folder

    if out_file is not None:
        check_file(out_file)
    if folder is not None:
        check_folder(folder)
    console = Console(quiet, log)
    with resumable(), console.bars("slides") as bars:
        stream = open_stream(
            context.obj,
            slides or None,
            grid=grid,
            encoder=encoder,
            on_progress=bars.update,
        )
        yield stream
    if stream.without:
        console.message(
            f"{len(stream.without)} slides lack this embedding and are left out: {_few(stream.without)}"
        )
    absent = stream.reads.absent
    if absent.total():
        slides_hit = [name for name, count in absent.items() if count]
        console.message(
            f"{absent.total()} tissue patches have no embedding (unreadable, or not embedded yet) and are left out: "
            f"{_few(slides_hit)}; see: histosge ls"
        )


def _few(names: "list[str] | tuple[str, ...]") -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _show(frame: "pl.DataFrame", *, as_json: bool, out_file: Path | None) -> None:
    """Print a table without its vectors, which only a file takes."""
    import polars as pl

    from featurestore.analysis.patch_tables import write_table

    plain = frame.select(name for name, dtype in frame.schema.items() if not isinstance(dtype, pl.Array))
    if as_json:
        out.print(json.dumps(plain.to_dicts()), markup=False)
    else:
        # The cohort's row has no slide.
        named = (
            {**row, "slide": row["slide"] or "(all)"} if "slide" in row else row for row in plain.to_dicts()
        )
        table(plain.columns, (list(map(_cell, row.values())) for row in named))
    if out_file is not None:
        write_table(frame, out_file)
        err.print(str(out_file), markup=False)


def _cell(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def summary(
    context: typer.Context,
    slide: Slides = None,
    grid: Grid = None,
    encoder: EncoderKey = None,
    out_file: OutFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Count patches and say how far each slide lies from the cohort; --out has mean and sd of every feature.

    Example: histosge analyse store.zarr summary --out summary.parquet
    """
    from featurestore.analysis.summary import summarise

    with _opened(context, slide, grid, encoder, quiet=quiet, log=log, out_file=out_file) as stream:
        frame = summarise(stream)
    _show(frame, as_json=as_json, out_file=out_file)


def pca(
    context: typer.Context,
    components: Annotated[
        int | None, typer.Option(help="How many; 50 if left out, or as many as there are.")
    ] = None,
    scores: Annotated[
        Path | None,
        typer.Option("--scores", metavar="DIR", help="Write one parquet per slide, one row per patch."),
    ] = None,
    slide: Slides = None,
    grid: Grid = None,
    encoder: EncoderKey = None,
    out_file: OutFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Principal components of all patches, exact, in one pass; --scores makes a second one.

    Example: histosge analyse store.zarr pca --components 20 --out components.parquet --scores scores
    """
    from featurestore.analysis.pca import fit_pca, write_scores

    with _opened(
        context, slide, grid, encoder, quiet=quiet, log=log, out_file=out_file, folder=scores
    ) as stream:
        fitted = fit_pca(stream, components)
        if scores is not None:
            write_scores(fitted, stream, scores)
    _show(fitted.to_frame(), as_json=as_json, out_file=out_file)


def clusters(
    context: typer.Context,
    k: Annotated[int, typer.Option("--k", help="How many clusters.")] = 8,
    seed: Annotated[int, typer.Option(help="Same seed, same store: the same clusters.")] = 0,
    passes: Annotated[
        int, typer.Option(help="Passes over the store at most, besides the first and last.")
    ] = 10,
    mini_batch: Annotated[
        bool, typer.Option("--mini-batch", help="Move centres after each block: fewer passes are needed.")
    ] = False,
    labels: Annotated[
        Path | None,
        typer.Option("--labels", metavar="DIR", help="Write one parquet per slide, one row per patch."),
    ] = None,
    slide: Slides = None,
    grid: Grid = None,
    encoder: EncoderKey = None,
    out_file: OutFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """K-means over all patches of the cohort: how much of each slide is in each cluster.

    Example: histosge analyse store.zarr clusters --k 12 --labels clusters
    """
    from featurestore.analysis.kmeans import KMeansSettings, fit_kmeans

    settings = KMeansSettings(k, seed, passes, mini_batch=mini_batch)
    with _opened(
        context, slide, grid, encoder, quiet=quiet, log=log, out_file=out_file, folder=labels
    ) as stream:
        fitted = fit_kmeans(stream, settings, labels)
    if not quiet:
        state = "at rest" if fitted.converged else "still moving; more --passes may help"
        err.print(f"inertia {fitted.inertia:.6g} after {fitted.passes} passes, centres {state}", markup=False)
    _show(fitted.counts, as_json=as_json, out_file=out_file)


def similar(
    context: typer.Context,
    slide: Annotated[str, typer.Option("--slide", metavar="ID", help="Slide of the patch to look for.")],
    row: Annotated[int | None, typer.Option(help="Its row on the grid, with --col.")] = None,
    col: Annotated[int | None, typer.Option(help="Its column on the grid, with --row.")] = None,
    x_um: Annotated[float | None, typer.Option(help="Or a place in microns, with --y-um.")] = None,
    y_um: Annotated[float | None, typer.Option(help="Microns from the slide's top, with --x-um.")] = None,
    n: Annotated[int, typer.Option("--n", help="How many patches to find.")] = 20,
    metric: Annotated[str, typer.Option(help="cosine or euclidean.")] = "cosine",
    exclude_um: Annotated[
        float | None,
        typer.Option(help="Leave out patches so near to it on its own slide; one patch side if left out."),
    ] = None,
    grid: Grid = None,
    encoder: EncoderKey = None,
    out_file: OutFile = None,
    as_json: Json = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Find more of this: the patches of the whole cohort that are nearest to one of them.

    Example: histosge analyse store.zarr similar --slide C2 --x-um 3400 --y-um 1200 --n 50
    """
    from featurestore.analysis import neighbours
    from featurestore.errors import StoreError

    with _opened(context, None, grid, encoder, quiet=quiet, log=log, out_file=out_file) as stream:
        if row is not None and col is not None and x_um is None and y_um is None:
            query = neighbours.patch_at(stream, slide, row, col)
        elif x_um is not None and y_um is not None and row is None and col is None:
            query = neighbours.patch_at_um(stream, slide, x_um, y_um)
        else:
            raise StoreError("say which patch: --row R --col C, or --x-um X --y-um Y")
        frame = neighbours.similar(stream, query, n, neighbours.as_metric(metric), exclude_um)
    _show(frame, as_json=as_json, out_file=out_file)
