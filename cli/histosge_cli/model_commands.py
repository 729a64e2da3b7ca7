"""Commands on models: train, predict, evaluate."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from histosge.errors import HistosgeError
from histosge_cli.console import Console, out, resumable
from histosge_cli.places import (
    earlier_model,
    model_place,
    new_model,
    new_store,
    output_file,
    output_folder,
    readable_place,
    samples_place,
    store_place,
)
from histosge_cli.registry_help import listed, with_registry_help
from histosge_cli.store_commands import Log, Overwrite, Quiet, StoreArg
from histosge_cli.worker_count import worker_count

if TYPE_CHECKING:
    from histosge.data.expression.loaded_expression import SlideFrame
    from histosge.prediction.predict import PredictResult

DATA, TRAINING, OUTPUT, RUN = "Which data", "What is fitted", "What is written", "While it runs"
"""Panels of the options."""
Given = TypeVar("Given", str, Path)
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
Genes = Annotated[
    str,
    typer.Option(
        "--genes",
        metavar="GENES",
        help="N: the N most variable genes; seurat_v3:N: by excess over the mean's trend; all; N+A,B: the N and the "
        "named ones; or a file, one gene a line.",
        rich_help_panel=DATA,
    ),
]
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


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(cls=with_registry_help(preset=_presets))(train)
    app.command()(predict)
    app.command(cls=with_registry_help(presets=_compared))(evaluate)


def _presets() -> str:
    from histosge.models.registry import MODELS

    return f"What is trained; module:Class is a class of your own. {listed(MODELS.records())}"


def _compared() -> str:
    from histosge.models.registry import MODELS

    names = ", ".join(MODELS.names())
    return f"Models to compare: {names}; module:Class; or depth: library size alone, an oracle."


def find_own_class(preset: str | None) -> None:
    """Let ``module:Class`` be found in the current folder, as ``python -m`` does."""
    folder = str(Path.cwd())
    # Only then: with the current folder on the path always, a file there could hide a module of ours.
    if preset is not None and ":" in preset and folder not in sys.path:
        sys.path.insert(0, folder)


def split_names(text: str | None) -> list[str]:
    """Return the names of ``A,B``."""
    return [name.strip() for name in (text or "").split(",") if name.strip()]


def train(
    samples: SamplesArg,
    store: StoreArg,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", callback=new_model, help="Folder to write the model to.")
    ],
    preset: Annotated[
        str,
        typer.Option(
            metavar="P",
            rich_help_panel=TRAINING,
        ),
    ] = "dense",
    genes: Genes = "1000",
    epochs: Epochs = None,
    seed: Annotated[
        int,
        typer.Option(metavar="N", help="Same seed, same machine: the same model.", rich_help_panel=TRAINING),
    ] = 0,
    loss: Annotated[
        str,
        typer.Option(
            metavar="L",
            help="mse on log1p(CP10k); dense also has poisson and nb, on counts with library size.",
            rich_help_panel=TRAINING,
        ),
    ] = "mse",
    stains: Annotated[
        bool,
        typer.Option(
            "--stains",
            help="Encode some patches in other stains, and penalise weights along what those change (dense).",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    start_from: Annotated[
        Path | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            callback=earlier_model,
            help="Add the sheet's new sections to the sums of this model (dense, ridge); its own are not read again.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    no_stats: Annotated[
        bool,
        typer.Option(
            "--no-stats",
            help="Keep no sums in MODEL/stats, to which --from adds further sections.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(
            metavar="D",
            help="Where networks are trained (attention, paper): auto, cpu or cuda; auto is a GPU where there is one.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    force: Force = False,
    report: Page = None,
    overwrite: Overwrite = False,
    grid: Grid = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder",
            metavar="K",
            help="Needed when the store holds several; repeat to average the models of several.",
            rich_help_panel=DATA,
        ),
    ] = None,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Train a model on embedded sections; nothing is encoded again.

    Example: histosge train cohort.csv store.zarr model --preset dense --genes 250

    Several GPUs: torchrun --nproc-per-node 4 -m histosge_cli train cohort.csv store.zarr model --preset attention
    """
    # Inside the function, as everywhere here: `histosge ls` must not wait for what training imports.
    from featurestore.events import Progress
    from featurestore.whole_file import check_output
    from histosge.data.section_loading import Selection
    from histosge.training.processes import is_first_process
    from histosge.training.train import TrainSettings
    from histosge.training.train import train as run

    # Of several processes (torchrun) one speaks for all.
    console = Console(quiet or not is_first_process(), log if is_first_process() else None)
    find_own_class(preset)
    if report is not None:
        check_output(report)
    # Text is handed on as it was typed; what it means, and whether it is allowed, is the library's to say.
    # Each once: an average of a model with itself is that model.
    first, *others = dict.fromkeys(encoder) if encoder else (None,)
    selection = Selection(grid, first, tuple(name for name in others if name is not None))
    settings = TrainSettings(preset, genes, epochs, seed, selection, loss=loss, stains=stains)
    with resumable(), console.bars("sections and passes") as bars:

        def on_progress(progress: Progress) -> None:
            bars.update(replace(progress, label="training"), note=progress.label)

        saved = run(
            samples,
            store,
            model,
            settings,
            report=report,
            overwrite=overwrite,
            force=force,
            start_from=start_from,
            keep_sums=not no_stats,
            device=device,
            on_message=console.message,
            on_progress=on_progress,
        )
    if not is_first_process():
        return
    spots = sum(section["spots"] for section in saved.card.sections)
    todo = "nothing to do, " if saved.was_there else ""
    out.print(
        f"{model}: {todo}{saved.card.preset} for {len(saved.card.genes)} genes from {spots} spots of "
        f"{len(saved.card.sections)} sections, fingerprint {saved.fingerprint[:16]}",
        markup=False,
    )
    if saved.intervals is not None:
        n_trusted, scope = int(saved.intervals.trusted.sum()), saved.intervals.scope
        out.print(f"trusted: {n_trusted} of {len(saved.card.genes)} genes ({scope})", markup=False)


def predict(
    store: StoreArg,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            callback=model_place,
            help="A trained model's folder, or hf://OWNER/NAME on the hub.",
        ),
    ],
    out_store: Annotated[
        str,
        typer.Argument(metavar="OUT", callback=new_store, help="Expression store to write, a folder or URL."),
    ],
    slide: Annotated[
        list[str] | None,
        typer.Option(
            "--slide", metavar="ID", help="Only this slide; repeat for several.", rich_help_panel=DATA
        ),
    ] = None,
    genes: Annotated[
        str | None,
        typer.Option("--genes", metavar="A,B", help="Only these genes of the model.", rich_help_panel=DATA),
    ] = None,
    condition_on: Annotated[
        str | None,
        typer.Option(
            "--condition-on",
            metavar="FILE",
            callback=readable_place,
            help="Spots measured on the slide: .h5ad or Space Ranger folder.",
            rich_help_panel=DATA,
        ),
    ] = None,
    force: Force = False,
    preset: Annotated[
        str | None,
        typer.Option(
            metavar="module:Class",
            help="The class of a model of your own; it is imported only if it is named here.",
            rich_help_panel=DATA,
        ),
    ] = None,
    cells: Annotated[
        Path | None,
        typer.Option(
            "--cells",
            metavar="FILE",
            callback=readable_place,
            help="Outlines of cells (one slide): GeoJSON of QuPath or CellViT, Xenium's cell_boundaries.parquet. Their "
            "expression is written to --h5ad FILE, or beside OUT.",
            rich_help_panel=DATA,
        ),
    ] = None,
    h5ad: Annotated[
        Path | None,
        typer.Option(
            "--h5ad",
            metavar="FILE",
            callback=output_file,
            help="Also write AnnData (one slide): one row per patch, or per cell with --cells.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    report: Page = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Processes that share several slides out among themselves; auto: one per core.",
            rich_help_panel=RUN,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Instead, the workers of a running dask cluster, such as tcp://host:8786; they see the same paths.",
            rich_help_panel=RUN,
        ),
    ] = None,
    overwrite: Overwrite = False,
    grid: Grid = None,
    encoder: EncoderKey = None,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Predict a dense expression map for slides of a store.

    Example: histosge predict store.zarr model maps.zarr --slide C4 --h5ad c4.h5ad
    """
    from featurestore.whole_file import check_output
    from histosge.data.section_loading import Selection
    from histosge.errors import ModelError
    from histosge.prediction.predict import PredictSettings
    from histosge.prediction.predict import predict as run

    console = Console(quiet, log)
    processes = worker_count(workers)
    if processes is not None and scheduler is not None:
        raise ModelError(
            "--workers starts processes on this machine and --scheduler uses a running cluster; give one of them"
        )
    find_own_class(preset)
    # Before anything is predicted: a store of a thousand slides takes hours.
    for option, value in (("--h5ad", h5ad), ("--cells", cells)):
        if value is not None and len(slide or []) != 1:
            raise ModelError(f"{option} writes one slide; name it with --slide ID")
    frame: SlideFrame | None = None
    if cells is not None:
        h5ad = h5ad or _cells_place(out_store, (slide or [""])[0])
        frame = _checked_cells(store, (slide or [""])[0], cells)
    for path in (h5ad, report):
        if path is not None:
            check_output(path, folder=path == h5ad and path.suffix == ".zarr")
    selection, names = Selection(grid, encoder), split_names(genes)
    made_with: dict[str, Any] = {}
    if report is not None:
        from histosge.prediction.made_with import describe_maps
        from histosge.reporting.page import is_page_there

        made_with = describe_maps(
            store, model, selection, slide_ids=slide or [], genes=names, condition_on=condition_on
        )
        if is_page_there(report, made_with, overwrite=overwrite):
            report = None  # whole already, of these very maps
    with resumable(), console.bars("blocks") as bars:
        results = run(
            store,
            model,
            out_store,
            PredictSettings(selection, processes or 1, preset, scheduler),
            slide_ids=slide or [],
            genes=names,
            condition_on=condition_on,
            overwrite=overwrite,
            force=force,
            on_progress=bars.update,
            on_message=console.message,
        )
    for result in results:
        console.record("slide", **vars(result))
        # The same again, finished, is no error: it says so, and exits with 0.
        todo = (
            f"{result.computed} of {result.planned} blocks computed" if result.computed else "nothing to do"
        )
        out.print(f"{result.slide_id}: {todo}, {result.patches} patches", markup=False)
    if h5ad is not None:
        _write_table(console, out_store, results[0], h5ad, cells, frame, overwrite=overwrite, force=force)
    if report is not None:
        from histosge.prediction.report import write_prediction_report
        from histosge.training.saved_model import load_model

        shown = [(result.slide_id, result.grid_key) for result in results]
        write_prediction_report(out_store, shown, load_model(model, preset), report, made_with, names)
        out.print(str(report), markup=False)


def _cells_place(out_store: str, slide_id: str) -> Path:
    """Return where the expression of cells goes where no file is named: beside the maps."""
    from histosge.errors import ModelError

    if "://" in out_store:
        raise ModelError("--cells writes a file on this machine; name it with --h5ad FILE")
    place = Path(out_store)
    return place.with_name(f"{place.name.removesuffix('.zarr')}_{slide_id}_cells.h5ad")


def _checked_cells(store: str, slide_id: str, cells: Path) -> "SlideFrame":
    """Read the first outlines before anything is predicted; return the slide that they are placed on."""
    from featurestore.storage.store import Store
    from histosge.data.expression.loaded_expression import SlideFrame
    from histosge.exporting.cell_table import check_outlines

    opened = Store.open(store)
    # A slide that the store does not hold is refused by `predict`, with the nearest names.
    if slide_id not in opened.slide_ids():
        return SlideFrame(slide_id, "", 1.0)
    record = opened.slide(slide_id)
    frame = SlideFrame(slide_id, "", record.mpp, record.size_px)
    check_outlines(cells, frame)
    return frame


def _write_table(
    console: Console,
    out_store: str,
    result: "PredictResult",
    path: Path,
    cells: Path | None,
    frame: "SlideFrame | None",
    *,
    overwrite: bool,
    force: bool,
) -> None:
    """Write a slide's map as AnnData: a row for each patch, or for each outlined cell."""
    from featurestore.earlier_results import staged_result
    from histosge.exporting.cell_table import write_cells
    from histosge.exporting.formats.anndata_files import write_h5ad
    from histosge.prediction.expression_store import ExpressionStore

    # From the store, not from memory: a map that was there already is written, too.
    stored = ExpressionStore.open(out_store).map(result.slide_id, result.grid_key)
    if cells is not None and frame is not None:
        done = write_cells(
            stored, cells, path, frame, overwrite=overwrite, force=force, on_message=console.message
        )
        todo = "nothing to do, " if done.was_there else ""
        out.print(
            f"{path}: {todo}{done.cells} cells x {len(stored.genes)} genes. {done.resolution}", markup=False
        )
        return
    with staged_result(path, overwrite=overwrite) as staged:
        rows = write_h5ad(stored, staged.path)
    todo = "nothing to do, " if staged.was_there else ""
    out.print(f"{path}: {todo}{rows} patches x {len(stored.genes)} genes", markup=False)


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
    overwrite: Overwrite = False,
    force: Force = False,
    grid: Grid = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder",
            metavar="K",
            help="Needed when the store holds several; repeat to score each preset on each.",
            rich_help_panel=DATA,
        ),
    ] = None,
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
