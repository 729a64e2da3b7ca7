"""The command that encodes slides into a store."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from featurestore.wording import counted
from histosge_cli import embed_options as option
from histosge_cli.console import Console, duration, out, resumable, size
from histosge_cli.encoder_tables import scale_remarks, weights_option
from histosge_cli.registry_help import listed, with_registry_help
from histosge_cli.shared_options import Log, Quiet
from histosge_cli.worker_count import worker_count

if TYPE_CHECKING:
    from featurestore.embedding.embed import SlideResult
    from featurestore.preview.planned_preview import PlannedPreview


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(cls=with_registry_help(tissue=_tissue_methods))(embed)


def _tissue_methods() -> str:
    from featurestore.tissue.tissue_method import TISSUE_METHODS

    return f"How tissue is found (default: mask for slides that have one, else texture). {listed(TISSUE_METHODS.records())}"


def embed(
    samples: option.Slides,
    store: option.NewStore,
    mpp: option.Mpp = 0.5,
    patch: option.PatchSide = 224,
    stride: option.Stride = None,
    tokens: option.Tokens = None,
    token_overlap: option.TokenOverlap = None,
    tissue: option.Tissue = None,
    mask: option.Mask = None,
    within: option.Within = None,
    without: option.Without = None,
    no_tissue: option.NoTissue = False,
    skip: option.Skip = None,
    slide_mpp: option.SlideMpp = None,
    encoder: option.Encoders = None,
    stain: option.Stain = "none",
    weights: option.Weights = None,
    random_weights: option.RandomWeights = False,
    device: option.Device = "auto",
    precision: option.Precision = "auto",
    compile_network: option.Compile = False,
    engine: option.Engine = "torch",
    batch: option.Batch = None,
    workers: option.Workers = None,
    scheduler: option.Scheduler = None,
    dashboard: option.Dashboard = None,
    store_as: option.StoreAs = None,
    retry_failed: option.RetryFailed = False,
    private: option.Private = False,
    allow_duplicates: option.AllowDuplicates = False,
    dry_run: option.DryRun = False,
    preview: option.Preview = None,
    report: option.Report = None,
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
    from featurestore.slides.sample_sheet import read_samples
    from histosge_cli.grid_options import grid_spec
    from histosge_cli.run_report import ReportFiles, report_of_stopped_run

    console = Console(quiet, log)
    processes = worker_count(workers, scheduler)
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
    page = None if preview is None else _planned_preview(preview, store, keys)
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


def _planned_preview(folder: Path, store: str, keys: tuple[str, ...]) -> "PlannedPreview":
    # Here, since the page needs polars, which a run without one has no use for.
    from featurestore.preview.planned_preview import PlannedPreview

    return PlannedPreview.open(folder, store, keys)


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
