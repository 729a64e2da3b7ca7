"""Options of `embed`, in the order of ``--help``."""

from pathlib import Path
from typing import Annotated

import typer

from histosge_cli.places import new_store, output_file, output_folder, samples_place
from histosge_cli.shared_options import OUTPUT

GRID, TISSUE, ENCODER, DEVICE = "Grid", "Tissue", "Encoder", "Where to compute"
"""Headings under which ``--help`` groups options."""

Slides = Annotated[
    str,
    typer.Argument(
        metavar="SAMPLES",
        callback=samples_place,
        help="A slide, a folder of slides, or a sample sheet (CSV, .xlsx).",
    ),
]
NewStore = Annotated[
    str,
    typer.Argument(metavar="STORE", callback=new_store, help="Folder or URL of the feature store."),
]
Mpp = Annotated[float, typer.Option(help="Microns per pixel of the patches.", rich_help_panel=GRID)]
PatchSide = Annotated[int, typer.Option(help="Side of a patch, pixels at --mpp.", rich_help_panel=GRID)]
Stride = Annotated[
    int | None,
    typer.Option(
        help="Step between patches, pixels at --mpp (default: --patch, no overlap).", rich_help_panel=GRID
    ),
]
Tokens = Annotated[
    str | None,
    typer.Option(
        metavar="K|K+cls",
        help="Write K x K positions of each patch, means of the encoder's tokens: a grid K times as fine from one "
        "pass. +cls joins each with the patch's own vector.",
        rich_help_panel=GRID,
    ),
]
TokenOverlap = Annotated[
    int | None,
    typer.Option(
        metavar="PX",
        help="With --tokens: overlap of the patches, pixels at --mpp; half of it is cut off at each edge.",
        rich_help_panel=GRID,
    ),
]
Tissue = Annotated[
    str | None,
    typer.Option(
        "--tissue",
        metavar="METHOD|none",
        rich_help_panel=TISSUE,
    ),
]
Mask = Annotated[
    str | None,
    typer.Option(
        "--mask",
        metavar="DIR",
        help="Folder with a mask or annotations of each slide, named by its id, in place of the sheet's column mask.",
        rich_help_panel=TISSUE,
    ),
]
Within = Annotated[
    list[str] | None,
    typer.Option(
        "--within",
        metavar="CLASS",
        help="Only where the slide's mask has this class; repeat for several.",
        rich_help_panel=TISSUE,
    ),
]
Without = Annotated[
    list[str] | None,
    typer.Option(
        "--without",
        metavar="CLASS",
        help="Not where the slide's mask has this class; repeat for several.",
        rich_help_panel=TISSUE,
    ),
]
NoTissue = Annotated[bool, typer.Option("--no-tissue", hidden=True, help="Same as --tissue none.")]
Skip = Annotated[
    str | None,
    typer.Option(
        "--skip",
        metavar="pen,blur,fold",
        help="Leave out patches with these quality flags: pen, blur, fold, bubble, edge. With blur every tissue patch "
        "is read once before.",
        rich_help_panel=TISSUE,
    ),
]
SlideMpp = Annotated[
    float | None,
    typer.Option(help="Microns per pixel of slides whose file does not state it.", rich_help_panel=GRID),
]
Encoders = Annotated[
    list[str] | None,
    typer.Option(
        "--encoder",
        metavar="K",
        help="Encoder key; repeat for several. (default: morphology)",
        rich_help_panel=ENCODER,
    ),
]
Stain = Annotated[
    str,
    typer.Option(
        "--stain",
        metavar="none|macenko|reinhard",
        help="Normalise each slide's stain before encoding; such embeddings are of an encoder of their own.",
        rich_help_panel=ENCODER,
    ),
]
Weights = Annotated[
    list[str] | None,
    typer.Option(
        metavar="FILE",
        help="Local file with weights. Repeat it as KEY=FILE if several encoders need weights.",
        rich_help_panel=ENCODER,
    ),
]
RandomWeights = Annotated[
    bool,
    typer.Option("--random-weights", help="Use random weights: for tests only.", rich_help_panel=ENCODER),
]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.", rich_help_panel=DEVICE)]
Precision = Annotated[
    str,
    typer.Option(help="auto (as the encoder's authors advise), fp32, fp16 or bf16.", rich_help_panel=ENCODER),
]
Compile = Annotated[
    bool,
    typer.Option(
        "--compile",
        help="Compile the network first: worth it for long runs only.",
        rich_help_panel=ENCODER,
    ),
]
Engine = Annotated[str, typer.Option(help="torch, or openvino: faster on a CPU.", rich_help_panel=ENCODER)]
Batch = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        min=1,
        max=4096,
        help="Patches that a network takes at once (default: 16 on a CPU, what fits into free memory on a GPU).",
        rich_help_panel=DEVICE,
    ),
]
Workers = Annotated[
    str | None,
    typer.Option(
        metavar="N|auto",
        help="Start N worker processes on this machine; auto: one per GPU, or one per two cores.",
        rich_help_panel=DEVICE,
    ),
]
Scheduler = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Use a running dask scheduler, such as tcp://host:8786.",
        rich_help_panel=DEVICE,
    ),
]
Dashboard = Annotated[
    int | None,
    typer.Option(
        metavar="PORT",
        help="With --workers: show dask's dashboard on this port, to this machine only.",
        rich_help_panel=DEVICE,
    ),
]
StoreAs = Annotated[
    str | None,
    typer.Option(
        "--store-as",
        metavar="CODING",
        help="How values are stored: float16 (default), or rounded to N bits: bitround:N or bitround:N+zstd.",
        rich_help_panel=OUTPUT,
    ),
]
RetryFailed = Annotated[
    bool,
    typer.Option("--retry-failed", help="Compute blocks with failed patches again.", rich_help_panel=OUTPUT),
]
Private = Annotated[
    bool,
    typer.Option(
        "--private",
        help="Keep file names and paths out of the store; a list of them stays on this machine.",
        rich_help_panel=OUTPUT,
    ),
]
AllowDuplicates = Annotated[
    bool,
    typer.Option(
        "--allow-duplicates",
        help="Embed a slide also if the store or an earlier row has the same file under another id.",
        rich_help_panel=OUTPUT,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Write nothing; print patches, objects, bytes, time and memory.",
        rich_help_panel=OUTPUT,
    ),
]
Preview = Annotated[
    Path | None,
    typer.Option(
        "--preview",
        metavar="DIR",
        callback=output_folder,
        help="With --dry-run: write a page of the slides and of what would be embedded.",
        rich_help_panel=OUTPUT,
    ),
]
Report = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        callback=output_file,
        help="Write what was done, how fast, and what failed: FILE.html and FILE.json.",
        rich_help_panel=OUTPUT,
    ),
]
