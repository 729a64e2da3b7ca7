"""Options that several commands on models share."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from histosge_cli.places import output_file, samples_place

DATA, TRAINING, OUTPUT, RUN = "Which data", "What is fitted", "What is written", "While it runs"
"""Panels of the options."""
SamplesArg = Annotated[
    str,
    typer.Argument(
        metavar="SAMPLES",
        callback=samples_place,
        help="Sample sheet (CSV, .xlsx) whose rows name slides and their expression.",
    ),
]
Grid = Annotated[
    str | None,
    typer.Option(
        "--grid", metavar="KEY", help="Needed when the store holds several grids.", rich_help_panel=DATA
    ),
]
EncoderKey = Annotated[
    str | None,
    typer.Option(
        "--encoder", metavar="K", help="Needed when the store holds several encoders.", rich_help_panel=DATA
    ),
]


def encoders_option(use_of_several: str) -> Any:
    """Return the option ``--encoder`` of a command that takes several."""
    return typer.Option(
        "--encoder",
        metavar="K",
        help=f"Needed when the store holds several; {use_of_several}",
        rich_help_panel=DATA,
    )


def genes_option(note: str = "") -> Any:
    """Return the option ``--genes``, with a note at the end of its help."""
    return typer.Option(
        "--genes",
        metavar="GENES",
        help="N: the N most variable genes; seurat_v3:N: by excess over the mean's trend; all; N+A,B: the N and the "
        "named ones; or a file, one gene a line." + note,
        rich_help_panel=DATA,
    )


Genes = Annotated[str, genes_option()]
Epochs = Annotated[
    int | None,
    typer.Option(
        metavar="N", help="Passes over the spots, for models that iterate.", rich_help_panel=TRAINING
    ),
]
Force = Annotated[
    bool,
    typer.Option(
        "--force",
        help="Take spots that seem to lie elsewhere on the slide, or on another slide, with a warning.",
        rich_help_panel=DATA,
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        callback=output_file,
        help="Also write a page (HTML): pictures, numbers, caveats.",
        rich_help_panel=OUTPUT,
    ),
]


def find_own_class(preset: str | None) -> None:
    """Let ``module:Class`` be found in the current folder, as ``python -m`` does."""
    folder = str(Path.cwd())
    # Only then: with the current folder on the path always, a file there could hide a module of ours.
    if preset is not None and ":" in preset and folder not in sys.path:
        sys.path.insert(0, folder)


def split_names(text: str | None) -> list[str]:
    """Return the names of ``A,B``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]
