"""Commands on the feature store: ls, validate, rm, encoders, doctor."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histosge_cli.console import out, size, table
from histosge_cli.shared_options import Json, StoreArg

if TYPE_CHECKING:
    import polars as pl

HEADER = (
    *("slide", "grid", "encoder", "state", "blocks", "patches", "size", "written"),
    *("unreadable", "flags", "reason"),
)
MAPS_HEADER = ("slide", "grid", "genes", "state", "blocks", "patches", "size", "written", "model", "reason")
"""Columns of `ls`, of a feature store and of an expression store."""


def register(app: typer.Typer) -> None:
    """Add these commands."""
    for command in (ls, validate, rm, encoders, doctor):
        app.command()(command)


def ls(store: StoreArg, as_json: Json = False) -> None:
    """List a feature store or an expression store: slide, grid, done and planned blocks, size, what failed.

    Example: histosge ls s3://bucket/store
    """
    from featurestore.storage.catalogue import catalogue
    from histosge.prediction.expression_catalogue import expression_catalogue
    from histosge.prediction.expression_store import is_expression_store

    if is_expression_store(store):
        _print_catalogue(expression_catalogue(store), MAPS_HEADER, as_json=as_json)
    else:
        _print_catalogue(catalogue(store), HEADER, as_json=as_json)


def _print_catalogue(frame: "pl.DataFrame", header: tuple[str, ...], *, as_json: bool) -> None:
    if as_json:
        out.print(json.dumps(frame.to_dicts(), default=str), markup=False)
    elif not frame.height:
        out.print("the store is empty")
    else:
        rows = (row | _in_words(row) for row in frame.iter_rows(named=True))
        table(header, ([row[name] for name in header] for row in rows))


def _in_words(row: dict[str, Any]) -> dict[str, object]:
    """Return the columns of a catalogue that are printed otherwise than they are stored."""
    return {
        "blocks": None if row["planned"] is None else f"{row['done']}/{row['planned']}",
        "size": None if row["bytes"] is None else size(row["bytes"]),
        "written": None if row["modified"] is None else f"{row['modified']:%Y-%m-%d %H:%M}",
        # The beginning of a fingerprint tells models apart, as in messages.
        "model": (row.get("model") or "")[:16],
    }


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
