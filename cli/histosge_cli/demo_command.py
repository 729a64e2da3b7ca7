"""The `demo` command."""

import time
from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.console import Console, out
from histosge_cli.places import output_folder
from histosge_cli.shared_options import Log, Quiet


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(demo)


def demo(
    out_dir: Annotated[
        Path, typer.Option("--out", metavar="DIR", callback=output_folder, help="Where to put everything.")
    ] = Path("demo"),
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Run the whole job offline on a synthetic slide with a known truth, and write a report.

    Example: histosge demo --out demo
    """
    from histosge.demo import run_demo

    console = Console(quiet, log)
    begun = time.monotonic()
    with console.steps("demo") as on_progress:
        result = run_demo(out_dir, on_message=console.message, on_progress=on_progress)
    out.print("\nheld-out spots (buffered blocks), mean Pearson over genes:")
    for name, value in result.held_out.items():
        out.print(f"  {name:10} {value:6.3f}")
    out.print("dense map against the dense truth, mean Pearson by gene family:")
    for name, value in result.truth.items():
        out.print(f"  {name:10} {value:6.3f}")
    out.print(f"\ndone in {time.monotonic() - begun:.0f} s:")
    for name, path in result.paths.items():
        out.print(f"  {name:14}  {path}", markup=False)
