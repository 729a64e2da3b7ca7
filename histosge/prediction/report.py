"""The report page of a prediction: maps beside the slide, then which genes can be trusted.

It holds no scores of the maps: those are on the page of an evaluation (`histosge.evaluation.report`).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.earlier_results import MadeWith
from featurestore.wording import counted
from histosge.calibration.wording import trained_on_sentence
from histosge.prediction.embedding_evidence import evidence_sentences
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.stored_map import StoredMap
from histosge.reporting.page import Block, Picture, render_report, write_page
from histosge.reporting.plots import robust_limits, shared_scale_maps, slide_maps, to_svg
from histosge.training.report import trust_block
from histosge.training.saved_model import SavedModel

SHOWN_GENES = 3
# Of those that are named: each takes half of the page's width on every slide.
LARGE_GENES = 12
# A page holds its pictures: of a cohort of hundreds it could not be opened.
SHOWN_SLIDES = 8


def write_prediction_report(
    out: str,
    slides: Sequence[tuple[str, str]],
    saved: SavedModel,
    path: Path,
    made_with: MadeWith | None = None,
    genes: Sequence[str] = (),
) -> None:
    """Write the page of predicted maps; a file that is there is replaced.

    Parameters
    ----------
    out
        The expression store.
    slides
        (slide id, grid key) of the maps to show; the first few are drawn.
    path
        The HTML file; it is written whole or not at all.
    made_with
        Model, slides and genes, recorded in the page.
    genes
        Shown large on one scale for all of them and all slides; the most trusted ones, small, if none is named.
    """
    store = ExpressionStore.open(out)
    chosen = list(dict.fromkeys(genes))[:LARGE_GENES]
    limits = _common_limits(store, slides[:SHOWN_SLIDES], chosen)
    blocks = [_slide_block(store.map(*slide), saved, chosen, limits) for slide in slides[:SHOWN_SLIDES]]
    if len(slides) > SHOWN_SLIDES:
        blocks.append(Block("Further slides", ", ".join(slide_id for slide_id, _ in slides[SHOWN_SLIDES:])))
    # One model predicted all slides, so all maps have the same genes.
    all_genes = store.map(*slides[0]).genes if slides else ()
    # A map may hold some of the model's genes, in another order.
    intervals = saved.intervals
    if intervals is not None:
        intervals = intervals.take([saved.card.genes.index(gene) for gene in all_genes])
    blocks.append(trust_block(intervals, all_genes))
    shown = f"{counted(len(slides), 'slide')}, {counted(len(all_genes), 'gene')}"
    subtitle = f"{shown}, {saved.card.preset}, encoder {saved.card.encoder['key']}"
    record = {"made_with": made_with} if made_with else None
    page = render_report(
        "Prediction", blocks, subtitle=subtitle, footer=f"model {saved.fingerprint}", record=record
    )
    write_page(path, page)


def _common_limits(
    store: ExpressionStore, slides: Sequence[tuple[str, str]], genes: Sequence[str]
) -> tuple[float, float]:
    """Return the ends of one scale for some genes on all slides; one slide is read at a time."""
    ends = (
        [robust_limits(_read_genes(store.map(*slide), genes).values()) for slide in slides] if genes else []
    )
    return (min(low for low, _ in ends), max(high for _, high in ends)) if ends else (0.0, 1.0)


def _read_genes(stored: StoredMap, genes: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    rows, cols = stored.grid.shape
    places = {gene: stored.genes.index(gene) for gene in genes}
    return {
        gene: stored.array.read((0, rows), (0, cols), slice(i, i + 1))[..., 0].astype(np.float32)
        for gene, i in places.items()
    }


def _large_picture(stored: StoredMap, genes: Sequence[str], limits: tuple[float, float]) -> Picture:
    return Picture(
        to_svg(shared_scale_maps(_read_genes(stored, genes), limits, stored.grid.stride_um)),
        f"Predicted maps of {', '.join(genes)} on slide {stored.slide_id}.",
        "Predicted log1p(CP10k) of the chosen genes, on one colour scale for all of them and all slides of this page.",
        stored.slide_id,
    )


def _slide_block(
    stored: StoredMap, saved: SavedModel, chosen: Sequence[str], limits: tuple[float, float]
) -> Block:
    rows, cols = stored.grid.shape
    # Chosen by trust, not by how a map looks: whoever picks by eye picks noise that resembles tissue.
    maps = _read_genes(stored, [stored.genes[i] for i in _most_trusted(stored)])
    if stored.depth is not None:
        maps["log total counts"] = stored.depth.read((0, rows), (0, cols))[..., 0].astype(np.float32)
    grid = stored.grid
    x, y = (start + (grid.patch_um - grid.stride_um) / 2 for start in grid.origin_um)
    corner = x, y
    picture = Picture(
        to_svg(slide_maps(stored.rgb, maps, grid.stride_um, corner)),
        f"Slide {stored.slide_id} beside predicted maps of {', '.join(maps)}.",
        "Predicted log1p(CP10k), each map on its own colour scale. Shown are the genes with the highest trust.",
        stored.slide_id,
    )
    patches = int(np.isfinite(next(iter(maps.values()))).sum()) if maps else 0
    # Asked of the model: a map that was begun by an earlier version does not record it.
    made_by = stored.array.attrs.get("made_by", {})
    slide = str(made_by.get("slide", ""))
    trained_on = saved.was_trained_on(slide)
    return Block(
        stored.slide_id,
        f"{counted(patches, 'patch')} of {stored.grid.spec.patch_px} px every {stored.grid.stride_um:.1f} µm, "
        "predicted, not measured.",
        pictures=(*([_large_picture(stored, chosen, limits)] if chosen else []), picture),
        points=(
            trained_on_sentence(trained_on),
            *evidence_sentences(saved, slide, stored.embedding_distance),
        ),
    )


def _most_trusted(stored: StoredMap) -> list[int]:
    if stored.trust is None:
        return list(range(min(SHOWN_GENES, len(stored.genes))))
    return [int(i) for i in np.argsort(-stored.trust, kind="stable")[:SHOWN_GENES]]
