"""A model streamed over slides: embeddings in by blocks, a dense expression map out by blocks.

Resumable like the embedding: what is done is what exists. Memory holds the blocks near the one being
predicted, never a slide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featurestore.store import Store
from histosge.errors import ModelError
from histosge.exporting.anndata_files import write_anndata
from histosge.exporting.opening import table_of_map
from histosge.maps import ExpressionStore, StoredMap
from histosge.saved import SavedModel, load_model
from histosge.stream import EmbeddedSlide, open_embedded, stream_windows

Progress = Callable[[str, int, int], None]
"""Called with (slide id, blocks done, blocks to do) after each block."""


def _silent(slide_id: str, done: int, total: int) -> None:
    pass


@dataclass(frozen=True)
class PredictResult:
    """One slide's map: how many objects belong to it, and how many blocks this run computed."""

    slide_id: str
    grid_key: str
    planned: int
    computed: int
    patches: int


def predict(
    store: str,
    model: str | Path,
    out: str,
    *,
    slide_ids: Sequence[str] = (),
    genes: Sequence[str] = (),
    grid: str | None = None,
    encoder: str | None = None,
    progress: Progress = _silent,
) -> list[PredictResult]:
    """Predict a dense map for slides of a store.

    Parameters
    ----------
    store
        Feature store with the slides' embeddings.
    model
        A saved model's folder.
    out
        Expression store to write, a folder or URL.
    slide_ids
        Which slides; all of the store if empty.
    genes
        Which of the model's genes; all if empty.
    grid, encoder
        Needed where the store holds several.

    Raises
    ------
    ModelError
        If the model does not fit the store, or knows none of the genes.
    """
    source, saved = Store.open(store), load_model(model)
    columns = _gene_columns(saved, genes)
    ids = list(slide_ids) or source.slide_ids()
    if not ids:
        raise ModelError(f"{source.location.label} holds no slide; fill it with: histosge embed")
    slides = [open_embedded(source, slide_id, grid, encoder) for slide_id in ids]
    for slide in slides:
        saved.check_fits(slide.identity, slide.stored.grid)
        _check_whole(slide)
    # Only now: what is refused leaves nothing behind.
    target = ExpressionStore.open_or_create(out)
    return [_predict_slide(slide, saved, columns, target, progress) for slide in slides]


def _gene_columns(saved: SavedModel, genes: Sequence[str]) -> list[int]:
    from difflib import get_close_matches

    known = {gene: i for i, gene in enumerate(saved.card.genes)}
    for gene in genes:
        if gene not in known:
            near = get_close_matches(gene, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?"
                if near
                else f"it has {len(known)} genes, listed in config.json"
            )
            raise ModelError(f"the model does not predict gene {gene!r}: {hint}")
    return [known[gene] for gene in dict.fromkeys(genes)] or list(range(len(known)))


def _check_whole(slide: EmbeddedSlide) -> None:
    planned = slide.stored.planned(slide.array.block_shape)
    lacking = slide.array.missing(planned)
    if lacking:
        raise ModelError(
            f"slide {slide.slide_id!r} has {len(planned) - len(lacking)} of {len(planned)} blocks; "
            "finish it first: run the same histosge embed again"
        )


def _predict_slide(
    slide: EmbeddedSlide, saved: SavedModel, columns: list[int], target: ExpressionStore, progress: Progress
) -> PredictResult:
    planned = slide.stored.planned(slide.array.block_shape)
    genes = tuple(saved.card.genes[i] for i in columns)
    made_by = {
        "model": saved.fingerprint,
        "preset": saved.card.preset,
        "encoder": slide.identity.fingerprint,
        "slide": slide.fingerprint,
        "genes": len(genes),
    }
    stored_map = target.add_map(slide.stored, genes, slide.array.block_shape, made_by)
    missing = stored_map.array.missing(planned)
    for number, window in enumerate(stream_windows(slide, missing, saved.model.halo_um), start=1):
        values = np.full((*window.block.shape, len(columns)), np.nan, np.float32)
        if window.own.any():
            predicted = saved.model.predict(window.patches)[window.own][:, columns]
            rows = window.patches.rows[window.own] - window.block.rows[0]
            cols = window.patches.cols[window.own] - window.block.cols[0]
            values[rows, cols] = predicted
        stored_map.array.write(window.block, values)
        progress(slide.slide_id, number, len(missing))
    return PredictResult(
        slide.slide_id,
        slide.stored.grid.spec.key,
        len(planned),
        len(missing),
        int(slide.stored.is_tissue.sum()),
    )


def write_h5ad(stored_map: StoredMap, path: str | Path) -> int:
    """Write a map as AnnData, one row per tissue patch; return the number of rows.

    `X` is log1p(CP10k), float32; ``obsm["spatial"]`` is (x, y) in level-0 pixels, as scanpy expects;
    ``obs`` has `row`, `col` and the centre in microns. A patch without a prediction is left out.
    """
    return write_anndata(table_of_map(stored_map), Path(path))
