"""The pages of a training and of a prediction: pictures first, then numbers, each with its caveat beside it.

What an evaluation found has a page of its own (`evaluation_report`): only that one holds scores.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from histosge.calibration.conformal import TRUSTED, Intervals
from histosge.prediction.expression_store import ExpressionStore, StoredMap
from histosge.reporting.page import Block, Picture, Table, render_report
from histosge.reporting.run_plots import slide_maps, trust_plot
from histosge.training.saved_model import ModelCard, SavedModel

SHOWN_GENES = 3
SHOWN_SLIDES = 8
UNSCORED = (
    "No score on this page is from tissue that the model did not learn from: run histosge evaluate for that."
)


def write_training_report(saved: SavedModel, path: Path) -> None:
    """Write the page of a trained model: what it learned from, and which genes to trust.

    Parameters
    ----------
    path
        The HTML file; it appears whole.
    """
    card = saved.card
    subtitle = f"{card.preset}, {len(card.genes)} genes, encoder {card.encoder['key']}"
    blocks = [_trust_block(saved.intervals, card.genes), _section_block(card)]
    _write(path, render_report("Training", blocks, subtitle=subtitle, footer=f"model {saved.fingerprint}"))


def write_prediction_report(
    out: str, slides: Sequence[tuple[str, str]], saved: SavedModel, path: Path
) -> None:
    """Write the page of predicted maps.

    Parameters
    ----------
    out
        The expression store.
    slides
        (slide id, grid key) of the maps to show; the first few are drawn.
    path
        The HTML file; it appears whole.
    """
    store = ExpressionStore.open(out)
    trained = {section["slide_id"] for section in saved.card.sections}
    blocks = [_slide_block(store.map(*slide), slide[0] in trained) for slide in slides[:SHOWN_SLIDES]]
    if len(slides) > SHOWN_SLIDES:
        blocks.append(Block("Further slides", ", ".join(slide_id for slide_id, _ in slides[SHOWN_SLIDES:])))
    genes = store.map(*slides[0]).genes if slides else ()
    intervals = saved.intervals
    if intervals is not None:
        intervals = intervals.take([saved.card.genes.index(gene) for gene in genes])
    blocks.append(_trust_block(intervals, genes))
    subtitle = (
        f"{len(slides)} slides, {len(genes)} genes, {saved.card.preset}, encoder {saved.card.encoder['key']}"
    )
    _write(path, render_report("Prediction", blocks, subtitle=subtitle, footer=f"model {saved.fingerprint}"))


def _slide_block(stored: StoredMap, was_trained_on: bool) -> Block:
    rows, cols = stored.grid.shape
    genes = _most_trusted(stored)
    maps = {
        stored.genes[i]: stored.array.read((0, rows), (0, cols), slice(i, i + 1))[..., 0].astype(np.float32)
        for i in genes
    }
    if stored.depth is not None:
        maps["log total counts"] = stored.depth.read((0, rows), (0, cols))[..., 0].astype(np.float32)
    picture = Picture(
        slide_maps(stored.rgb, maps, stored.grid.stride_um),
        f"Slide {stored.slide_id} beside predicted maps of {', '.join(maps)}.",
        "Predicted log1p(CP10k), each on a scale of its own. These genes are shown because they are trusted most.",
        stored.slide_id,
    )
    patches = int(np.isfinite(next(iter(maps.values()))).sum()) if maps else 0
    status = "The model learned from spots of this slide: its map there looks better than on new tissue."
    return Block(
        stored.slide_id,
        f"{patches} patches of {stored.grid.spec.patch_px} px every {stored.grid.stride_um:.1f} µm, "
        "predicted, not measured.",
        pictures=(picture,),
        points=(status,) if was_trained_on else ("The model has seen no spot of this slide.",),
    )


def _most_trusted(stored: StoredMap) -> list[int]:
    if stored.trust is None:
        return list(range(min(SHOWN_GENES, len(stored.genes))))
    return [int(i) for i in np.argsort(-stored.trust, kind="stable")[:SHOWN_GENES]]


def _by_depth(intervals: Intervals) -> str:
    """Say that intervals differ by predicted depth, where they do: the table holds the one width of all."""
    if intervals.strata is None:
        return ""
    typical = ", ".join(f"± {width:.2f}" for width in np.median(intervals.strata.half_width, axis=1))
    return f" Intervals widen where few counts are predicted: {typical} for the median gene, deepest last."


def _trust_block(intervals: Intervals | None, genes: Sequence[str]) -> Block:
    if intervals is None:
        return Block(
            "Which genes to trust",
            status="bad",
            status_text="The model has no intervals, so nothing says which genes can be read.",
        )
    order = np.argsort(-intervals.trust, kind="stable")
    rows = tuple(
        (
            genes[i],
            f"{intervals.trust[i]:.2f}",
            f"± {intervals.half_width[i]:.2f}",
            "yes" if intervals.trusted[i] else "no",
        )
        for i in order
    )
    picture = Picture(
        trust_plot(intervals.trust, TRUSTED),
        f"Histogram of trust over {len(genes)} genes.",
        f"Measured on {intervals.n_spots} spots of the training sections, by {intervals.held_out}s left out in turn."
        f"{_by_depth(intervals)}",
        "Trust",
    )
    good = int(intervals.trusted.sum())
    return Block(
        "Which genes to trust",
        f"{good} of {len(genes)} genes can be predicted; the others should not be read. {UNSCORED}",
        pictures=(picture,),
        tables=(
            Table(
                ("gene", "trust", f"{round(100 * intervals.level)} % interval, log1p(CP10k)", "trusted"),
                rows,
                "Every gene, the most trusted first. Trust is the lower limit of its Pearson on left-out parts.",
                folded=len(rows) > 20,
            ),
        ),
    )


def _section_block(card: ModelCard) -> Block:
    rows = tuple(
        (
            section["slide_id"],
            str(section["donor"] or ""),
            str(section["spots"]),
            str(section["few_counts"]),
            str(section["off_tissue"]),
        )
        for section in card.sections
    )
    header = ("section", "donor", "spots used", "left out: few counts", "left out: off tissue")
    donors = {section["donor"] for section in card.sections}
    caveat = (
        ()
        if len(donors) > 1
        else ("All of it is from one donor, or donors are not named: expect less on another.",)
    )
    return Block(
        "What it learned from",
        f"Targets: {card.normalisation['target']}. Grid: {card.grid['patch_px']} px patches every "
        f"{card.grid['stride_px']} px at {card.grid['mpp']:g} µm per pixel.",
        tables=(Table(header, rows, "Sections and their spots."),),
        points=caveat,
    )


def _write(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(page)
    partial.replace(path)
