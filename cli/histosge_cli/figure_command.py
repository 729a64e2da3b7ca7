"""The `figure` command."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.console import out
from histosge_cli.model_options import Grid, split_names
from histosge_cli.places import expression_place, output_file
from histosge_cli.shared_options import Overwrite


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(figure)


def figure(
    expression: Annotated[
        str,
        typer.Argument(
            metavar="EXPRESSION",
            callback=expression_place,
            help="Expression store, as histosge predict writes it: a folder or a URL.",
        ),
    ],
    out_file: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", callback=output_file, help="File to write: its suffix is .pdf, .png or .svg."
        ),
    ],
    genes: Annotated[
        str, typer.Option("--genes", metavar="A,B", help="Genes, one panel each, in this order.")
    ],
    slide: Annotated[
        str | None, typer.Option("--slide", metavar="ID", help="Needed when the store holds several slides.")
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            metavar="shared|own|LOW,HIGH",
            help="Colours: one scale for all genes, one for each, or from LOW to HIGH log1p(CP10k).",
        ),
    ] = "shared",
    overwrite: Overwrite = False,
    grid: Grid = None,
) -> None:
    """Draw genes of a slide's map as a figure for a paper: 180 mm wide, 300 dpi, with colour bar, scale bar and caption.

    Example: histosge figure maps.zarr --slide C4 --genes EPCAM,CD3E c4.pdf
    """
    from histosge.exporting.figure import FigureSettings, draw_figure

    settings = FigureSettings(_scale(scale), grid)
    drawn = draw_figure(expression, split_names(genes), out_file, slide, settings, overwrite=overwrite)
    todo = "nothing to do, " if drawn.was_there else ""
    out.print(f"{out_file}: {todo}{', '.join(drawn.genes)} on slide {drawn.slide_id}", markup=False)


def _scale(text: str) -> str | tuple[float, float]:
    """Return two limits where two numbers are given, else the text for the library to check."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        return text
    return low, high
