"""The command that encodes slides into a store."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featurestore.wording import counted
from histosge_cli.console import Console, duration, out, resumable, size
from histosge_cli.encoder_tables import scale_remarks, weights_option
from histosge_cli.places import new_store, output_file, output_folder, samples_place
from histosge_cli.registry_help import listed, with_registry_help
from histosge_cli.shared_options import OUTPUT, Log, Quiet
from histosge_cli.worker_count import worker_count

if TYPE_CHECKING:
    from featurestore.embedding.embed import SlideResult
GRID, TISSUE, ENCODER, DEVICE = "Grid", "Tissue", "Encoder", "Where to compute"
"""Headings under which ``--help`` groups options."""


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(cls=with_registry_help(tissue=_tissue_methods))(embed)


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
    skip: Annotated[
        str | None,
        typer.Option(
            "--skip",
            metavar="pen,blur,fold",
            help="Leave out patches with these quality flags: pen, blur, fold, bubble, edge. With blur every tissue patch "
            "is read once before.",
            rich_help_panel=TISSUE,
        ),
    ] = None,
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
    private: Annotated[
        bool,
        typer.Option(
            "--private",
            help="Keep file names and paths out of the store; a list of them stays on this machine.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    allow_duplicates: Annotated[
        bool,
        typer.Option(
            "--allow-duplicates",
            help="Embed a slide also if the store or an earlier row has the same file under another id.",
            rich_help_panel=OUTPUT,
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
        skip=tuple((skip or "").split(",")),
        private=private,
        allow_duplicates=allow_duplicates,
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
    if dry_run:
        _print_plan(results, preview)
    _say_where_names_are(console, store, is_private=private and not dry_run)
    failed = sum(result.state == "failed" for result in results)
    if failed:
        out.print(
            f"{failed} of {len(results)} slides failed; the others are complete. See: histosge ls {store}"
        )
        raise typer.Exit(1)


def _say_where_names_are(console: Console, store: str, *, is_private: bool) -> None:
    from featurestore.storage.store import Store

    if is_private and (names := Store.open(store).private_map):
        console.message(f"the store holds no file names; they are in {names.file}")


def _print_plan(results: "list[SlideResult]", page: Path | None) -> None:
    """Print what all slides of a dry run would take, and where their page is."""
    if len(results) > 1:
        out.print(
            f"{counted(len(results), 'slide')}: {counted(sum(r.patches for r in results), 'patch')} in "
            f"{counted(sum(r.planned for r in results), 'object')}, "
            f"{size(sum(r.bytes_to_store for r in results))} to store, "
            f"{duration(sum(r.seconds for r in results))} on this device, one process",
            markup=False,
        )
    if page is not None:
        out.print(f"{page}/index.html: what would be embedded", markup=False)


def _outcome(result: "SlideResult") -> str:
    """Return what became of a slide, for one line."""
    if result.state == "failed":
        return f"failed: {result.reason}"
    if result.state == "planned":
        return (
            f"{counted(result.patches, 'patch')} in {counted(result.planned, 'object')}, "
            f"{size(result.bytes_to_store)} to store, "
            f"{duration(result.seconds)} on this device, {size(result.worker_bytes)} of memory{_flags(result)}"
        )
    done = f"{result.computed} of {result.planned} blocks computed" if result.computed else "nothing to do"
    if not result.patches and result.skipped:
        done = f"{counted(result.skipped, 'tissue patch')}, all left out by --skip; nothing to do"
    elif not result.patches:
        done = "no tissue found, nothing to do; --tissue none encodes every patch"
    failed = f", {counted(result.unreadable, 'patch')} could not be read" if result.unreadable else ""
    skipped = f", {result.skipped} left out by --skip" if result.skipped and result.patches else ""
    return f"{done}, {counted(result.patches, 'patch')}{skipped}{failed}"


def _flags(result: "SlideResult") -> str:
    """Return the shares of the quality flags of a planned slide, if it has any."""
    from featurestore.tissue.flags import shares_text

    return f"; {shares_text(result.flags)}" if result.flags else ""
