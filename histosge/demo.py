"""The whole job on embedded defaults, offline: slide -> store -> model -> map -> scores -> report.

The slide is made with a known truth, so that the map can be scored where no spot was measured.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import EarlierResultError
from featurestore.events import OnMessage, OnProgress, Progress, ignore_message, ignore_progress
from featurestore.grid import GridSpec
from featurestore.whole_file import check_output, whole_file
from featurestore.wording import counted
from histosge.data.section_loading import Selection, load_sections
from histosge.evaluation.evaluate import EvaluateSettings, score_sections
from histosge.evaluation.results import Scores
from histosge.exporting.formats.anndata_files import write_h5ad
from histosge.heldout.metrics import correlate
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import predict
from histosge.prediction.stored_map import StoredMap
from histosge.reporting.page import Block, Table
from histosge.synthetic import SyntheticSection, SyntheticSpec, Truth, load_truth, make_section, truth_at
from histosge.training.train import TrainSettings, train

GRID = GridSpec(mpp=0.5, patch_px=224, stride_px=112)
"""112 micron patches every 56 microns: about one per spot and as much again between them."""
# `knn` beside the usual ones: blocks are held out of this very slide, so position alone is worth something.
EVALUATED = ("mean", "knn", "ridge", "dense")

MARK, FORMAT = "demo.json", 1
"""In a demo's folder: what it was made of. The number is raised when a change makes other files of the same slide."""

STEPS = (
    "making a slide with a known truth",
    "embedding its patches",
    "training",
    "predicting the dense map",
    "scoring on held-out spots",
)


@dataclass(frozen=True)
class DemoResult:
    """What the demo made and found.

    Parameters
    ----------
    held_out
        Preset -> mean Pearson over genes on held-out spots (buffered blocks); includes ``noise``.
    truth
        Gene family -> mean Pearson of the dense map against the dense truth.
    paths
        What lies where, in the order in which a reader would open it.
    """

    held_out: dict[str, float]
    truth: dict[str, float]
    paths: dict[str, Path]


def run_demo(
    out: str | Path,
    spec: SyntheticSpec | None = None,
    *,
    on_message: OnMessage = ignore_message,
    on_progress: OnProgress = ignore_progress,
) -> DemoResult:
    """Run the main job end to end.

    Parameters
    ----------
    out
        Folder for everything that is made: new, empty, or of an earlier demo, which is gone on with, or replaced if it
        was of another slide.
    spec
        Of the synthetic section; None means the default, about 4 x 4 mm.
    on_message, on_progress
        Called with what was found, and before each of `STEPS`.

    Raises
    ------
    EarlierResultError
        If the folder holds something that no demo made.
    """
    spec = spec or SyntheticSpec()
    folder = _own_folder(Path(out), spec)
    paths = {
        "report": folder / "report" / "report.html",
        "map": folder / "maps.zarr",
        "map as AnnData": folder / "demo.h5ad",
        "model": folder / "model",
        "store": folder / "store.zarr",
        "slide": folder / "data" / "demo.tif",
    }
    on_progress(Progress(0, len(STEPS), STEPS[0]))
    section = make_section(folder / "data", spec, slide_id="demo")
    sheet = _write_sheet(section, folder / "data" / "samples.csv")
    on_progress(Progress(1, len(STEPS), STEPS[1]))
    results = embed(str(sheet), str(paths["store"]), EmbedSettings(spec=GRID))
    on_message(
        f"{counted(results[0].patches, 'tissue patch')}, {results[0].computed} of {results[0].planned} blocks computed"
    )
    on_progress(Progress(2, len(STEPS), STEPS[2]))
    genes = _gene_file(section, folder / "data" / "genes.txt")
    train(
        str(sheet),
        str(paths["store"]),
        paths["model"],
        TrainSettings(genes=str(genes)),
        overwrite=True,
        on_message=on_message,
    )
    on_progress(Progress(3, len(STEPS), STEPS[3]))
    predict(str(paths["store"]), paths["model"], str(paths["map"]), overwrite=True)
    stored = ExpressionStore.open(str(paths["map"])).map("demo", GRID.key)
    write_h5ad(stored, paths["map as AnnData"])
    truth_scores = score_against_truth(stored, load_truth(section.truth))
    on_progress(Progress(4, len(STEPS), STEPS[4]))
    scores = _evaluate(str(sheet), paths, truth_scores, str(genes))
    on_progress(Progress(len(STEPS), len(STEPS), "done"))
    held_out = {name: scores.mean(name, "pearson_mean") for name in (*EVALUATED, *scores.controls)}
    return DemoResult(held_out, truth_scores, paths)


def _own_folder(folder: Path, spec: SyntheticSpec) -> Path:
    """Return the folder, marked as a demo's; only such a one is written to."""
    check_output(folder, folder=True)
    mark = folder / MARK
    made_with = {"demo": FORMAT, "slide": json.loads(json.dumps(asdict(spec)))}
    found = list(folder.iterdir()) if folder.exists() else []
    if found and not mark.is_file():
        raise EarlierResultError(
            f"{folder} holds something that this command did not make; give a new folder with --out, or remove it"
        )
    if found and _read_mark(mark) != made_with:
        # Another slide, or other steps: parts of both would not go together. The mark goes last, so that a kill
        # meanwhile leaves a folder that is still known.
        for path in found:
            if path != mark:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with whole_file(mark) as partial:
        partial.write_text(json.dumps(made_with, indent=1) + "\n")
    return folder


def _read_mark(mark: Path) -> Any:
    try:
        return json.loads(mark.read_text())
    except ValueError:
        return None


def _write_sheet(section: SyntheticSection, path: Path) -> Path:
    path.write_text(
        # Names alone: paths in a sheet are relative to it, so the folder can be moved.
        "slide_id,slide,expression,donor\n"
        f"demo,{Path(section.slide).name},{Path(section.expression).name},synthetic\n"
    )
    return path


def _gene_file(section: SyntheticSection, path: Path) -> Path:
    path.write_text("\n".join(gene for family in section.families.values() for gene in family) + "\n")
    return path


def _evaluate(sheet: str, paths: dict[str, Path], truth: dict[str, float], genes: str) -> Scores:
    # Loaded again, without messages: training has printed them.
    loaded = load_sections(sheet, str(paths["store"]), Selection())
    settings = EvaluateSettings(split="block", presets=EVALUATED, genes=genes, seeds=1)
    rows = tuple((family, f"{value:.3f}") for family, value in truth.items())
    table = Table(
        ("gene family", "Pearson"),
        rows,
        "Mean over genes of the dense map against the dense truth, all tissue patches",
    )
    text = (
        "This slide is synthetic, so the true expression of every patch is known, also between spots. Genes tied to "
        "morphology can be seen in the picture; gradients cannot, and are followed here only because this slide's own "
        "spots were trained on (on held-out spots they stay low, see the scores above); noise must score 0."
    )
    return score_sections(
        loaded,
        paths["report"].parent,
        settings,
        extra=(Block("Against the dense truth", text, tables=(table,)),),
    )


def score_against_truth(stored: StoredMap, truth: Truth) -> dict[str, float]:
    """Return gene family -> mean Pearson over genes of a map against the truth, over tissue patches."""
    grid = stored.grid
    values = stored.array.read((0, grid.n_rows), (0, grid.n_cols))
    rows, cols = np.nonzero(np.isfinite(values).all(axis=2))
    xy_um = np.stack([grid.x_um[cols], grid.y_um[rows]], axis=1)
    expected = truth_at(truth, xy_um, grid.stride_um)
    # A patch on the edge of the tissue may have its centre outside: there is no truth there.
    inside = np.isfinite(expected).all(axis=1)
    predicted = values[rows, cols].astype(np.float64)[inside]
    known = {gene: i for i, gene in enumerate(truth.genes)}
    # Maps are in log1p: correlating with rates themselves would score the few highest patches.
    wanted = np.log1p(expected[inside][:, [known[gene] for gene in stored.genes]])
    correlation, _ = correlate(predicted, wanted, np.zeros(len(predicted)))
    pearson = dict(zip(stored.genes, correlation, strict=True))
    return {
        family: float(np.mean([pearson[gene] for gene in genes if gene in pearson]))
        for family, genes in truth.families.items()
    }
