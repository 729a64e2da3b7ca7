"""The command that trains a model."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from featurestore.wording import counted
from histosge_cli.console import Console, out, resumable
from histosge_cli.model_options import (
    OUTPUT,
    RUN,
    TRAINING,
    Epochs,
    Force,
    Grid,
    Page,
    SamplesArg,
    encoders_option,
    find_own_class,
    genes_option,
)
from histosge_cli.places import (
    earlier_model,
    new_model,
)
from histosge_cli.registry_help import listed, with_registry_help
from histosge_cli.shared_options import Log, Overwrite, Quiet, StoreArg
from histosge_cli.worker_count import worker_count


def register(app: typer.Typer) -> None:
    """Add this command."""
    app.command(cls=with_registry_help(preset=_presets))(train)


def _presets() -> str:
    from histosge.models.registry import MODELS

    return f"What is trained; module:Class is a class of your own. {listed(MODELS.records())}"


def train(
    samples: SamplesArg,
    store: StoreArg,
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", callback=new_model, help="Folder to write the model to.")
    ],
    # Without a default of their own: --from takes those of its model.
    preset: Annotated[
        str | None,
        typer.Option(metavar="P", rich_help_panel=TRAINING),
    ] = None,
    genes: Annotated[str | None, genes_option(" 1000 unless given.")] = None,
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
        str | None,
        typer.Option(
            "--from",
            metavar="MODEL",
            callback=earlier_model,
            help="Add the sheet's new sections to the sums of this model (dense, ridge; a folder or hf://OWNER/NAME); its "
            "own are not read again. A model without sums is adapted.",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    adapt: Annotated[
        bool,
        typer.Option(
            "--adapt",
            help="With --from: fit to the new sections alone, shrunk towards the model's weights, also where it keeps sums.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
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
    workers: Annotated[
        str | None,
        typer.Option(
            metavar="N|auto",
            help="Stream the sections, and share them out among processes (dense, ridge); auto: one per core.",
            rich_help_panel=RUN,
        ),
    ] = None,
    scheduler: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Instead, the workers of a running dask cluster, such as tcp://host:8786; they see the same store and "
            "expression files.",
            rich_help_panel=RUN,
        ),
    ] = None,
    force: Force = False,
    report: Page = None,
    overwrite: Overwrite = False,
    grid: Grid = None,
    encoder: Annotated[list[str] | None, encoders_option("repeat to average the models of several.")] = None,
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
    processes = worker_count(workers, scheduler)
    settings = TrainSettings(
        preset,
        genes,
        epochs,
        seed,
        selection,
        loss=loss,
        stains=stains,
        workers=processes,
        scheduler=scheduler,
    )
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
            adapt=adapt,
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
        f"{model}: {todo}{saved.card.preset} for {counted(len(saved.card.genes), 'gene')} from {counted(spots, 'spot')} of "
        f"{counted(len(saved.card.sections), 'section')}, fingerprint {saved.fingerprint[:16]}",
        markup=False,
    )
    if saved.intervals is not None:
        n_trusted, scope = int(saved.intervals.trusted.sum()), saved.intervals.scope
        out.print(f"trusted: {n_trusted} of {len(saved.card.genes)} genes ({scope})", markup=False)
