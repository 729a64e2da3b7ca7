"""Commands on the feature store: ls, validate, rm, encoders, doctor."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histosge_cli.console import out, size, table
from histosge_cli.shared_options import Json, StoreArg

if TYPE_CHECKING:
    pass


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (ls, validate, rm, encoders, doctor):
        app.command()(command)


def ls(store: StoreArg, as_json: Json = False) -> None:
    """List a feature store or an expression store: slide, grid, done and planned blocks, size, what failed.

    Example: histosge ls s3://bucket/store
    """
    from featurestore.storage.catalogue import catalogue
    from histosge.prediction.expression_store import is_expression_store

    if is_expression_store(store):
        _list_maps(store, as_json=as_json)
        return
    frame = catalogue(store)
    if as_json:
        out.print(json.dumps(frame.to_dicts(), default=str), markup=False)
        return
    if not frame.height:
        out.print("the store is empty")
        return
    header = (
        "slide",
        "grid",
        "encoder",
        "state",
        "blocks",
        "patches",
        "size",
        "written",
        "unreadable",
        "flags",
        "reason",
    )
    table(header, (_cells(row) for row in frame.iter_rows(named=True)))


def _list_maps(store: str, *, as_json: bool) -> None:
    from histosge.prediction.expression_catalogue import expression_catalogue

    frame = expression_catalogue(store)
    if as_json:
        out.print(json.dumps(frame.to_dicts(), default=str), markup=False)
        return
    if not frame.height:
        out.print("the store is empty")
        return
    header = ("slide", "grid", "genes", "state", "blocks", "patches", "size", "written", "model", "reason")
    table(header, (_map_cells(row) for row in frame.iter_rows(named=True)))


def _map_cells(row: dict[str, Any]) -> list[object]:
    blocks = None if row["planned"] is None else f"{row['done']}/{row['planned']}"
    taken = None if row["bytes"] is None else size(row["bytes"])
    written = None if row["modified"] is None else f"{row['modified']:%Y-%m-%d %H:%M}"
    # The beginning of a fingerprint tells models apart, as in messages.
    model = (row["model"] or "")[:16]
    named = [row["slide"], row["grid"], row["genes"], row["state"], blocks, row["patches"], taken]
    return [*named, written, model, row["reason"]]


def _cells(row: dict[str, Any]) -> list[object]:
    blocks = None if row["planned"] is None else f"{row['done']}/{row['planned']}"
    taken = None if row["bytes"] is None else size(row["bytes"])
    named = [row["slide"], row["grid"], row["encoder"], row["state"], blocks, row["patches"], taken]
    written = None if row["modified"] is None else f"{row['modified']:%Y-%m-%d %H:%M}"
    return [*named, written, row["unreadable"], row["flags"], row["reason"]]


def validate(
    store: StoreArg,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also read every object and compare its checksum.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a feature store or an expression store against its specification; exit 1 if something is missing or damaged.

    Example: histosge validate store.zarr --deep
    """
    from featurestore.storage.validation import validate as run
    from histosge.prediction.expression_store import is_expression_store
    from histosge.prediction.expression_validation import validate_expression

    problems = (validate_expression if is_expression_store(store) else run)(store, deep=deep)
    if as_json:
        out.print(json.dumps([vars(problem) for problem in problems]), markup=False)
    else:
        for problem in problems:
            out.print(f"{problem.path}: {problem.what}. Fix: {problem.fix}", markup=False)
        out.print(f"{len(problems)} problems" if problems else "whole", markup=False)
    if problems:
        raise typer.Exit(1)


def rm(
    store: StoreArg,
    slide: Annotated[str | None, typer.Option("--slide", metavar="ID", help="Only this slide.")] = None,
    grid: Annotated[str | None, typer.Option("--grid", metavar="KEY", help="Only this grid.")] = None,
    encoder: Annotated[str | None, typer.Option("--encoder", metavar="K", help="Only this encoder.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Remove nothing; print what would be removed.")
    ] = False,
) -> None:
    """Remove slides, grids or encoders from a feature store. Give at least one of --slide, --grid, --encoder.

    Example: histosge rm store.zarr --slide C2 --dry-run
    """
    from featurestore.storage.removal import remove

    for path in remove(store, slide, grid, encoder, dry_run=dry_run):
        out.print(f"{'would remove' if dry_run else 'removed'} {path}", markup=False)


def encoders(
    key: Annotated[
        str | None, typer.Argument(metavar="KEY", help="Show all that is known of this encoder.")
    ] = None,
    golden: Annotated[
        bool,
        typer.Option(
            "--golden",
            help="Embed a fixed image and print a short digest: equal on two machines if they agree.",
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Compare the records, or the one named, with the published networks, by stand-in files and other "
            "implementations: minutes, no weights and no network needed.",
        ),
    ] = False,
    download: Annotated[
        Path | None,
        typer.Option("--download", metavar="DIR", help="Download the published weights into this folder."),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(metavar="FILE", help="Local file with weights (with --golden).")
    ] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Use random weights: for tests only.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32, fp16 or bf16.")] = "auto",
    as_json: Json = False,
) -> None:
    """List the encoders, or show one of them in detail.

    Example: histosge encoders virchow2
    """
    from featurestore.encoders.protocol import EncoderOptions
    from histosge_cli import encoder_tables as show

    if check:
        if not show.check(key, as_json=as_json):
            raise typer.Exit(1)
    elif key is None:
        if golden or download is not None:
            raise typer.BadParameter("name the encoder: histosge encoders KEY --golden, or --download DIR")
        show.list_all(as_json=as_json)
    elif download is not None:
        show.download(key, download)
    elif golden:
        show.golden(key, EncoderOptions(weights, random_weights, device, precision))
    else:
        show.show_one(key, EncoderOptions(weights, random_weights, device, precision), as_json=as_json)


def doctor(
    store: Annotated[
        str | None, typer.Argument(metavar="STORE", help="Also check that this store can be reached.")
    ] = None,
) -> None:
    """Show what is installed, the device, which encoders work here, and whether a store can be reached.

    Example: histosge doctor s3://bucket/store
    """
    from histosge_cli.doctor import examine

    lines, healthy = examine(store)
    for line in lines:
        out.print(line, markup=False)
    if not healthy:
        raise typer.Exit(1)
