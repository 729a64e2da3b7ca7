"""A model streamed over slides: embeddings in by blocks, a dense expression map out by blocks.

Resumable like the embedding: what is done is what exists. Memory holds the blocks near the one being
predicted, never a slide.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.store import Store
from histosge.errors import ModelError
from histosge.maps import ExpressionStore, StoredMap
from histosge.models.model import Model, PartialModel
from histosge.parallel import map_slides
from histosge.saved import SavedModel, load_model
from histosge.stream import EmbeddedSlide, Window, open_embedded, stream_windows

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
    workers: int = 1,
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
    workers
        Processes that share the slides out among themselves; the maps are the same.

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
    if workers > 1 and len(ids) > 1:
        run = partial(_predict_one, store, model, out, genes=tuple(genes), grid=grid, encoder=encoder)
        return map_slides(
            run, ids, workers, lambda slide_id, result: progress(slide_id, result.planned, result.planned)
        )
    return [_predict_slide(slide, saved, columns, target, progress) for slide in slides]


def _predict_one(
    store: str,
    model: str | Path,
    out: str,
    slide_id: str,
    *,
    genes: tuple[str, ...],
    grid: str | None,
    encoder: str | None,
) -> PredictResult:
    """Predict one slide in a worker."""
    (result,) = predict(store, model, out, slide_ids=[slide_id], genes=genes, grid=grid, encoder=encoder)
    return result


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
            predicted = _predict_own(saved.model, window)[:, columns]
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


def _predict_own(model: Model, window: Window) -> NDArray[np.float32]:
    """Predict the patches of a window's block; those around it are only looked at, where the model can."""
    if isinstance(model, PartialModel):
        return model.predict_some(window.patches, np.flatnonzero(window.own))
    return model.predict(window.patches)[window.own]


def write_h5ad(stored_map: StoredMap, path: str | Path) -> int:
    """Write a map as AnnData, one row per tissue patch; return the number of rows.

    `X` is log1p(CP10k), float32; ``obsm["spatial"]`` is (x, y) in level-0 pixels, as scanpy expects;
    ``obs`` has `row`, `col` and the centre in microns. A patch without a prediction is left out.
    """
    import anndata
    import pandas as pd

    grid = stored_map.grid
    values = stored_map.array.read((0, grid.n_rows), (0, grid.n_cols))
    rows, cols = np.nonzero(np.isfinite(values).all(axis=2))
    xy_um = np.stack([grid.x_um[cols], grid.y_um[rows]], axis=1)
    obs = pd.DataFrame(
        {"row": rows, "col": cols, "x_um": xy_um[:, 0], "y_um": xy_um[:, 1]},
        index=pd.Index([f"{stored_map.slide_id}_{r}_{c}" for r, c in zip(rows, cols, strict=True)]),
    )
    data = anndata.AnnData(
        X=values[rows, cols].astype(np.float32), obs=obs, var=pd.DataFrame(index=pd.Index(stored_map.genes))
    )
    data.obsm["spatial"] = xy_um / grid.slide_mpp
    # One pixel a patch; the margin puts a patch's pixel where its centre lies on the slide.
    margin = round(grid.spec.patch_px / (2 * grid.spec.stride_px))
    thumbnail = np.pad(stored_map.rgb, ((margin, margin), (margin, margin), (0, 0)), constant_values=255)
    data.uns["spatial"] = {
        stored_map.slide_id: {
            "images": {"hires": thumbnail},
            "scalefactors": {
                "spot_diameter_fullres": grid.stride_um / grid.slide_mpp,
                "tissue_hires_scalef": grid.slide_mpp / grid.stride_um,
            },
            "metadata": {"mpp": grid.slide_mpp},
        }
    }
    data.uns["histosge"] = {"made_by": {k: str(v) for k, v in stored_map.array.attrs["made_by"].items()}}
    temporary = Path(f"{path}.partial")
    data.write_h5ad(temporary)
    temporary.replace(path)
    return len(rows)
