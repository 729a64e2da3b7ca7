"""The command that scores models on held-out data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from histosge.errors import HistosgeError
from histosge_cli.console import Console, out
from histosge_cli.model_options import (
    DATA,
    TRAINING,
    Epochs,
    Force,
    Genes,
    Grid,
    encoders_option,
    find_own_class,
)
from histosge_cli.places import (
    output_folder,
    samples_place,
    store_place,
)
from histosge_cli.registry_help import with_registry_help
from histosge_cli.shared_options import Log, Overwrite, Quiet

Given = TypeVar("Given", str, Path)


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(cls=with_registry_help(presets=_compared))(evaluate)


def _compared() -> str:
    from histosge.models.registry import MODELS

    names = ", ".join(MODELS.names())
    return f"Models to compare: {names}; module:Class; or depth: library size alone, an oracle."


def _is_bench(context: typer.Context) -> bool:
    return context.params.get("bench") is not None


def _given(context: typer.Context, parameter: typer.CallbackParam, value: Given | None) -> Given:
    """Refuse a missing argument as the parser does: it is optional only because --bench needs fewer."""
    if value is None:
        raise HistosgeError(f"Missing argument {parameter.metavar!r}; see: {context.command_path} --help")
    return value


def _samples_of_evaluation(context: typer.Context, value: str) -> str:
    return value if _is_bench(context) else samples_place(context, value)


def _store_of_evaluation(
    context: typer.Context, parameter: typer.CallbackParam, value: str | None
) -> str | None:
    return value if _is_bench(context) else store_place(context, _given(context, parameter, value))


def _report_of_evaluation(
    context: typer.Context, parameter: typer.CallbackParam, value: Path | None
) -> Path | None:
    return value if _is_bench(context) else output_folder(_given(context, parameter, value))


def evaluate(
    samples: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLES",
            callback=_samples_of_evaluation,
            help="Sample sheet (CSV, .xlsx) whose rows name slides and their expression.",
        ),
    ],
    store: Annotated[
        str | None,
        typer.Argument(
            metavar="STORE", callback=_store_of_evaluation, help="Feature store, a folder or a URL."
        ),
    ] = None,
    report_dir: Annotated[
        Path | None,
        typer.Argument(
            metavar="REPORT_DIR",
            callback=_report_of_evaluation,
            help="Folder for report.html and its tables.",
        ),
    ] = None,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="S",
            help="What is held out: block (default), section, donor, checkerboard (between spots), or random (default of "
            "--ablate).",
            rich_help_panel=DATA,
        ),
    ] = None,
    presets: Annotated[
        str,
        typer.Option(
            metavar="a,b,c",
            rich_help_panel=TRAINING,
        ),
    ] = "mean,ridge,dense",
    genes: Genes = "250",
    seeds: Annotated[
        int, typer.Option(metavar="N", help="Repeat with seeds 0..N-1.", rich_help_panel=TRAINING)
    ] = 1,
    epochs: Epochs = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            metavar="hest",
            help="Score as HEST-Benchmark does, in place of the presets.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    bench: Annotated[
        Path | None,
        typer.Option(
            "--bench",
            metavar="DIR",
            # Before the arguments, whose meaning depends on it.
            is_eager=True,
            help="With --protocol hest: a folder of HEST-Benchmark; then only [STORE] REPORT_DIR are given.",
            rich_help_panel=DATA,
        ),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="Of --bench, such as IDC.", rich_help_panel=DATA),
    ] = None,
    ablate: Annotated[
        bool,
        typer.Option(
            "--ablate",
            help="Add the published code with each of its known defects.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    annotation: Annotated[
        str | None,
        typer.Option(
            "--annotation",
            metavar="COLUMN",
            help="Column of obs with a class for each spot (a pathologist's, layers): compare domains with it.",
            rich_help_panel=DATA,
        ),
    ] = None,
    at: Annotated[
        float | None,
        typer.Option(
            "--at",
            metavar="UM",
            help="Score maps at measured bins of this side in µm, too (Visium HD, Xenium), such as 8.",
            rich_help_panel=DATA,
        ),
    ] = None,
    overwrite: Overwrite = False,
    force: Force = False,
    grid: Grid = None,
    encoder: Annotated[list[str] | None, encoders_option("repeat to score each preset on each.")] = None,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Score models on held-out spots, with a noise control beside them.

    Example: histosge evaluate cohort.csv store.zarr report --split section --presets mean,ridge,dense --seeds 3
    """
    from histosge.data.section_loading import Selection
    from histosge.evaluation.evaluate import EvaluateSettings
    from histosge.evaluation.evaluate import evaluate as run
    from histosge_cli.score_table import print_scores

    console = Console(quiet, log)
    if bench is not None or task is not None:
        places = [place for place in (samples, store, report_dir) if place is not None]
        _evaluate_bench(console, bench, task, protocol, places, encoder or [], overwrite=overwrite)
        return
    # The callbacks have refused what is missing.
    assert store is not None
    assert report_dir is not None
    names = tuple(p.strip() for p in presets.split(",") if p.strip())
    for name in names:
        find_own_class(name)
    settings = EvaluateSettings(
        split=split,
        presets=names,
        genes=genes,
        seeds=seeds,
        epochs=epochs,
        ablate=ablate,
        protocol=protocol,
        selection=Selection(grid),
        encoders=tuple(encoder or ()),
        annotation=annotation,
        at_um=at,
    )
    with console.steps("fits") as on_progress:
        scores = run(
            samples,
            store,
            report_dir,
            settings,
            overwrite=overwrite,
            force=force,
            on_message=console.message,
            on_progress=on_progress,
        )
    if scores.was_there:
        out.print(
            f"{report_dir}: nothing to do, these scores are of the same settings and inputs", markup=False
        )
    # On standard output, tables first and paths last: scripts take the last lines.
    print_scores(scores)
    tables = ["scores.csv", "genes.csv", "differences.csv"]
    for name in ("report.html", *tables, *(["domains.csv"] if scores.domains is not None else [])):
        out.print(str(report_dir / name), markup=False)


def _evaluate_bench(
    console: Console,
    bench: Path | None,
    task: str | None,
    protocol: str | None,
    places: Sequence[str | Path],
    encoders: Sequence[str],
    *,
    overwrite: bool,
) -> None:
    """Score encoders on a task of HEST-Benchmark; `places` are the report's folder, and before it perhaps a store."""
    from featurestore.encoders.loading import DEFAULT_ENCODER
    from featurestore.location import as_url
    from histosge.evaluation.hest_evaluation import PUBLISHED, BenchSettings, evaluate_bench
    from histosge_cli.score_table import print_published, print_scores

    if bench is None or task is None or protocol != "hest":
        raise HistosgeError("--bench and --task belong together, with --protocol hest: give all three")
    if len(places) > 2:
        raise HistosgeError(
            "with --bench the data are in its folder: give [STORE] REPORT_DIR alone, without SAMPLES"
        )
    report_dir, store = Path(places[-1]), as_url(str(places[0])) if len(places) == 2 else None
    settings = BenchSettings(bench, task, tuple(encoders) or (DEFAULT_ENCODER,))
    with console.steps("fits") as on_progress:
        scores = evaluate_bench(settings, report_dir, store, overwrite=overwrite, on_progress=on_progress)
    if scores.was_there:
        out.print(
            f"{report_dir}: nothing to do, these scores are of the same settings and inputs", markup=False
        )
    print_scores(scores)
    print_published(scores, task, PUBLISHED)
    for name in ("report.html", "scores.csv", "genes.csv", "differences.csv"):
        out.print(str(report_dir / name), markup=False)
