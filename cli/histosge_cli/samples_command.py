"""The command `samples`: a sample sheet from what is there."""

from pathlib import Path
from typing import Annotated

import typer

from featurestore.wording import counted
from histosge_cli.console import Console, out
from histosge_cli.places import output_file
from histosge_cli.shared_options import Log, Overwrite, Quiet

SOURCES = ("folder", "hest", "tcga")
FILTER = "Which samples (hest)"


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command()(samples)


def _filter(name: str, example: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(
        name,
        metavar="VALUE",
        help=f"Only samples with this value, such as {example}.",
        rich_help_panel=FILTER,
    )
    return option


def samples(
    source: Annotated[
        Path,
        typer.Argument(metavar="SOURCE", help="A folder of slides, a HEST-1k folder, or a GDC manifest."),
    ],
    sheet: Annotated[
        Path, typer.Argument(metavar="OUT.csv", callback=output_file, help="Sample sheet to write.")
    ],
    layout: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="LAYOUT",
            help="folder: all slides below it; hest: HEST-1k as published (st, wsis, metadata, tissue_seg); tcga: a GDC "
            "manifest with its downloads, one diagnostic slide a patient.",
        ),
    ] = "folder",
    organ: Annotated[str | None, _filter("--organ", "Breast")] = None,
    species: Annotated[str | None, _filter("--species", "'Homo sapiens'")] = None,
    oncotree: Annotated[str | None, _filter("--oncotree", "IDC")] = None,
    technology: Annotated[str | None, _filter("--technology", "Visium")] = None,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Write a sample sheet from what a folder holds.

    Of a folder of slides, each slide's scale, size and format are written in a column for readers; slides keep the ids that
    an earlier sheet at OUT.csv gave them.

    Example: histosge samples hest_data idc.csv --from hest --oncotree IDC
    """
    from featurestore.earlier_results import staged_result
    from featurestore.errors import SampleSheetError
    from featurestore.slides.gdc_manifest import list_tcga
    from featurestore.slides.sheet_listing import write_sheet
    from featurestore.slides.slide_tree import list_tree
    from featurestore.whole_file import check_output
    from histosge.data.hest_folder import HestFilter, list_hest

    console = Console(quiet, log)
    if layout not in SOURCES:
        raise SampleSheetError(f"--from {layout[:40]!r} is unknown: choose one of {', '.join(SOURCES)}")
    check_output(sheet)
    chosen = HestFilter(organ, species, oncotree, technology)
    if layout != "hest" and chosen.wanted:
        raise SampleSheetError(
            f"--from {layout} has no metadata to choose by: leave the filters out, or give --from hest"
        )
    if layout == "hest":
        found = list_hest(source, chosen)
    elif layout == "tcga":
        found = list_tcga(source)
    else:
        with console.bars("slides") as bars:
            found = list_tree(source, sheet, bars.update)
    for reason in found.left_out:
        console.message(f"left out: {reason}")
    with staged_result(sheet, overwrite=overwrite) as staged:
        write_sheet(found, sheet, staged.path)
    todo = "nothing to do, " if staged.was_there else ""
    # A slide without a donor counts as a donor of its own in a split, but it is not known to be one.
    named = [row["donor"] for row in found.rows if row.get("donor")]
    donors = f" of {counted(len(set(named)), 'donor')}" if len(named) == len(found.rows) else ""
    unnamed = len(found.rows) - len(named)
    hint = f"; {unnamed} without a donor: fill in the column donor" if unnamed else ""
    skipped = f", {len(found.left_out)} left out" if found.left_out else ""
    out.print(f"{sheet}: {todo}{counted(len(found.rows), 'slide')}{donors}{skipped}{hint}", markup=False)
