"""Commands on the feature store: embed, ls, validate, rm, encoders, doctor."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from histosge_cli.console import Console, duration, out, resumable, size, table
from histosge_cli.encoder_tables import scale_remarks, weights_option
from histosge_cli.places import log_file, new_store, output_file, output_folder, samples_place, store_place
from histosge_cli.registry_help import listed, with_registry_help
from histosge_cli.worker_count import worker_count

if TYPE_CHECKING:
    from featurestore.embedding.embed import SlideResult

GRID, TISSUE, ENCODER, DEVICE, OUTPUT = "Grid", "Tissue", "Encoder", "Where to compute", "Output"
"""Headings under which ``--help`` groups options."""

StoreArg = Annotated[
    str,
    typer.Argument(metavar="STORE", callback=store_place, help="Folder or URL of the feature store."),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", help="Print no progress and no messages.", rich_help_panel=OUTPUT)
]
Log = Annotated[
    Path | None,
    typer.Option(
        "--log",
        metavar="FILE",
        callback=log_file,
        help="Append messages and progress as JSON lines.",
        rich_help_panel=OUTPUT,
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an earlier result that was made with other settings or inputs.",
        rich_help_panel=OUTPUT,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.", rich_help_panel=OUTPUT)]


def register(app: typer.Typer) -> None:
    """Add these commands."""
    app.command(cls=with_registry_help(tissue=_tissue_methods))(embed)
    for command in (ls, validate, rm, encoders, doctor):
        app.command()(command)


def _tissue_methods() -> str:
    from featurestore.tissue.tissue_method import TISSUE_METHODS

    return f"How tissue is found (default: mask for slides that have one, else texture). {listed(TISSUE_METHODS.records())}"


def embed(
    samples: Annotated[
        str,
        typer.Argument(
            metavar="SAMPLES",
            callback=samples_place,
            help="A slide, a folder of slides, or a sample sheet (CSV, .xlsx).",
        ),
    ],
    store: Annotated[
        str,
        typer.Argument(metavar="STORE", callback=new_store, help="Folder or URL of the feature store."),
    ],
    mpp: Annotated[float, typer.Option(help="Microns per pixel of the patches.", rich_help_panel=GRID)] = 0.5,
    patch: Annotated[int, typer.Option(help="Side of a patch, pixels at --mpp.", rich_help_panel=GRID)] = 224,
    stride: Annotated[
        int | None,
        typer.Option(
            help="Step between patches, pixels at --mpp (default: --patch, no overlap).", rich_help_panel=GRID
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="K|K+cls",
            help="Write K x K positions of each patch, means of the encoder's tokens: a grid K times as fine from one "
            "pass. +cls joins each with the patch's own vector.",
            rich_help_panel=GRID,
        ),
    ] = None,
    token_overlap: Annotated[
        int | None,
        typer.Option(
            metavar="PX",
            help="With --tokens: overlap of the patches, pixels at --mpp; half of it is cut off at each edge.",
            rich_help_panel=GRID,
        ),
    ] = None,
    tissue: Annotated[
        str | None,
        typer.Option(
            "--tissue",
            metavar="METHOD|none",
            rich_help_panel=TISSUE,
        ),
    ] = None,
    mask: Annotated[
        str | None,
        typer.Option(
            "--mask",
            metavar="DIR",
            help="Folder with a mask or annotations of each slide, named by its id, in place of the sheet's column mask.",
            rich_help_panel=TISSUE,
        ),
    ] = None,
    within: Annotated[
        list[str] | None,
        typer.Option(
            "--within",
            metavar="CLASS",
            help="Only where the slide's mask has this class; repeat for several.",
            rich_help_panel=TISSUE,
        ),
    ] = None,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without",
            metavar="CLASS",
            help="Not where the slide's mask has this class; repeat for several.",
            rich_help_panel=TISSUE,
        ),
    ] = None,
    no_tissue: Annotated[
        bool, typer.Option("--no-tissue", hidden=True, help="Same as --tissue none.")
    ] = False,
    slide_mpp: Annotated[
        float | None,
        typer.Option(help="Microns per pixel of slides whose file does not state it.", rich_help_panel=GRID),
    ] = None,
    encoder: Annotated[
        list[str] | None,
        typer.Option(
            "--encoder",
            metavar="K",
            help="Encoder key; repeat for several. (default: morphology)",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    stain: Annotated[
        str,
        typer.Option(
            "--stain",
            metavar="none|macenko|reinhard",
            help="Normalise each slide's stain before encoding; such embeddings are of an encoder of their own.",
            rich_help_panel=ENCODER,
        ),
    ] = "none",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="Local file with weights. Repeat it as KEY=FILE if several encoders need weights.",
            rich_help_panel=ENCODER,
        ),
    ] = None,
    random_weights: Annotated[
        bool,
        typer.Option("--random-weights", help="Use random weights: for tests only.", rich_help_panel=ENCODER),
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=DEVICE)] = "auto",
    precision: Annotated[
        str,
        typer.Option(
            help="auto (as the encoder's authors advise), fp32, fp16 or bf16.", rich_help_panel=ENCODER
        ),
    ] = "auto",
    compile_network: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the network first: worth it for long runs only.",
            rich_help_panel=ENCODER,
        ),
    ] = False,
    engine: Annotated[
        str, typer.Option(help="torch, or openvino: faster on a CPU.", rich_help_panel=ENCODER)
    ] = "torch",
    batch: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            min=1,
            max=4096,
            help="Patches that a network takes at once (default: 16 on a CPU, what fits into free memory on a GPU).",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Start N worker processes on this machine; auto: one per GPU, or one per two cores.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Use a running dask scheduler, such as tcp://host:8786.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    dashboard: Annotated[
        int | None,
        typer.Option(
            metavar="PORT",
            help="With --workers: show dask's dashboard on this port, to this machine only.",
            rich_help_panel=DEVICE,
        ),
    ] = None,
    store_as: Annotated[
        str | None,
        typer.Option(
            "--store-as",
            metavar="CODING",
            help="How values are stored: float16 (default), or rounded to N bits: bitround:N or bitround:N+zstd.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed", help="Compute blocks with failed patches again.", rich_help_panel=OUTPUT
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Write nothing; print patches, objects, bytes, time and memory.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    preview: Annotated[
        Path | None,
        typer.Option(
            "--preview",
            metavar="DIR",
            callback=output_folder,
            help="With --dry-run: write a page of the slides and of what would be embedded.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            "--report",
            metavar="FILE",
            callback=output_file,
            help="Write what was done, how fast, and what failed: FILE.html and FILE.json.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    quiet: Quiet = False,
    log: Log = None,
) -> None:
    """Encode slides into a feature store; only missing blocks are computed.

    Example: histosge embed cohort.csv store.zarr --mpp 0.5 --patch 224 --stride 112
    """
    # Inside the function, here and in all commands: `histosge --help` must not wait for zarr, polars and scipy.
    from featurestore.embedding.embed import EmbedSettings, ignore_survey
    from featurestore.embedding.embed import embed as run
    from featurestore.encoders.loading import DEFAULT_ENCODER
    from featurestore.encoders.protocol import EncoderOptions
    from featurestore.errors import StoreError
    from featurestore.preview.planned_preview import PlannedPreview
    from featurestore.slides.sample_sheet import read_samples
    from histosge_cli.grid_options import grid_spec
    from histosge_cli.run_report import ReportFiles, report_of_stopped_run

    console = Console(quiet, log)
    processes = worker_count(workers)
    if processes and scheduler:
        raise StoreError(
            "--workers starts processes on this machine and --scheduler uses a running cluster; give one of them"
        )
    if dashboard is not None and not processes:
        raise StoreError(
            "--dashboard shows the worker processes of this machine; give --workers with it (a running cluster has its own)"
        )
    if preview is not None and not dry_run:
        raise StoreError(
            f"--preview shows what a dry run would embed; give --dry-run with it, or afterwards: histosge preview {store} "
            f"{preview}"
        )
    spec = grid_spec(mpp, patch, stride, tokens, token_overlap)
    keys = tuple(encoder or [DEFAULT_ENCODER])
    settings = EmbedSettings(
        encoders=keys,
        spec=spec,
        options=EncoderOptions(None, random_weights, device, precision, compile_network, engine, batch=batch),
        tissue="none" if no_tissue else tissue,
        masks=mask,
        within=tuple(within or ()),
        without=tuple(without or ()),
        stain=stain,
        retry_failed=retry_failed,
        weights=weights_option(weights or [], keys),
        store_as=store_as,
    )
    for remark in scale_remarks(keys, spec):
        console.message(remark)
    if dashboard is not None and not dry_run:
        console.message(f"dashboard, as long as this runs: http://127.0.0.1:{dashboard}/status")
    page = None if preview is None else PlannedPreview.open(preview, store, keys)
    files = None if report is None else ReportFiles.open(report)
    finished: list[SlideResult] = []
    # Read here only to count them, for the bar over all slides.
    slides = 0 if dry_run else len(read_samples(samples, slide_mpp))

    def on_result(slide: "SlideResult") -> None:
        finished.append(slide)
        bars.finish(slide.slide_id, failed=slide.state == "failed", unreadable=slide.unreadable)

    with (
        resumable(),
        report_of_stopped_run(files, store, settings, finished),
        console.bars("blocks", slides) as bars,
    ):
        results = run(
            samples,
            store,
            settings,
            slide_mpp=slide_mpp,
            dry_run=dry_run,
            workers=processes,
            scheduler=scheduler,
            dashboard=dashboard,
            on_progress=bars.update,
            on_result=on_result,
            on_survey=ignore_survey if page is None else page.add_survey,
        )
    if page is not None:
        page.finish(results)
    if files is not None:
        files.write(store, settings, results)
    for result in results:
        console.record("slide", **asdict(result))
        out.print(f"{result.slide_id}: {_outcome(result)}", markup=False)
    if dry_run and len(results) > 1:
        out.print(
            f"{len(results)} slides: {sum(r.patches for r in results)} patches in {sum(r.planned for r in results)} "
            f"objects, {size(sum(r.bytes_to_store for r in results))} to store, "
            f"{duration(sum(r.seconds for r in results))} on this device, one process",
            markup=False,
        )
    failed = sum(result.state == "failed" for result in results)
    if failed:
        out.print(
            f"{failed} of {len(results)} slides failed; the others are complete. See: histosge ls {store}"
        )
        raise typer.Exit(1)


def _outcome(result: "SlideResult") -> str:
    """Return what became of a slide, for one line."""
    if result.state == "failed":
        return f"failed: {result.reason}"
    if result.state == "planned":
        return (
            f"{result.patches} patches in {result.planned} objects, {size(result.bytes_to_store)} to store, "
            f"{duration(result.seconds)} on this device, {size(result.worker_bytes)} of memory"
        )
    done = f"{result.computed} of {result.planned} blocks computed" if result.computed else "nothing to do"
    if not result.patches:
        done = "no tissue found, nothing to do; --tissue none encodes every patch"
    failed = f", {result.unreadable} patches could not be read" if result.unreadable else ""
    return f"{done}, {result.patches} patches{failed}"


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
    return [*named, written, row["unreadable"], row["reason"]]


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
