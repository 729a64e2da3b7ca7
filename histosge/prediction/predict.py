"""Predict slides of a feature store, block by block, into an expression store.

Resumable like the embedding: a block is done when its objects exist. Memory holds the blocks near the one that is
predicted, never a slide.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self, cast

import numpy as np
from numpy.typing import NDArray

from featurestore.embedding.limits import check_workers
from featurestore.errors import AmbiguousSelectionError
from featurestore.events import OnMessage, OnProgress, Progress, ignore_message, ignore_progress
from featurestore.file_systems import fixed_url
from featurestore.grid import spec_from_values
from featurestore.names import slug
from featurestore.object_stores.hub_place import check_writable
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import Store
from featurestore.threads import keep_to_own_cores
from histosge.data.embedded_slide import (
    EmbeddedSlide,
    Reduce,
    Window,
    check_complete,
    open_embedded,
    stream_windows,
)
from histosge.data.section_loading import Selection
from histosge.errors import ModelError
from histosge.models.estimators import ModelSource
from histosge.models.protocol import DepthModel, Model, PartialModel, ReducingModel
from histosge.prediction.conditioning import ConditionedModel, load_conditioned
from histosge.prediction.embedding_evidence import distance_from_training, evidence_sentences
from histosge.prediction.expression_store import ExpressionStore, StoredMap
from histosge.prediction.slide_tasks import map_slides
from histosge.threads import one_blas_thread, side_by_side, usable_cores
from histosge.training.saved_model import SavedModel, describe_fitted, embed_options, load_model

_MAX_WORKING_BYTES = 1 << 30
"""Memory of all predictions that are computed at once, about."""
# Of names in a message, which is one line whatever is in the store.
_SHOWN_SLIDES, _SHOWN_LETTERS = 10, 100


@dataclass(frozen=True)
class PredictSettings:
    """How to predict.

    Parameters
    ----------
    selection
        Grid and encoder; of several in the store, those of the saved model where they are not named.
    workers
        Processes that share the slides out among themselves, ``auto`` for one per core; the maps are the same.
    preset
        The class of the saved model, where that is none of the registered ones; see
        `histosge.training.saved_model.load_model`.
    scheduler
        Address of a running dask scheduler, whose workers share the slides out in place of processes of this machine.
    """

    selection: Selection = field(default_factory=Selection)
    workers: int | Literal["auto"] = 1
    preset: ModelSource | None = None
    scheduler: str | None = None


@dataclass(frozen=True)
class PredictResult:
    """One slide's map.

    Parameters
    ----------
    slide_id, grid_key
        Which map of the expression store.
    planned, computed
        Blocks with tissue, and those that this run computed; the others existed.
    patches
        Patches with tissue.
    note
        For a slide that the model was not trained on: for whom its intervals and trust hold. Else empty.
    """

    slide_id: str
    grid_key: str
    planned: int
    computed: int
    patches: int
    note: str = ""


def predict(
    store: str | Path,
    model: str | Path | SavedModel | Model,
    out: str | Path,
    settings: PredictSettings | None = None,
    *,
    slide_ids: Sequence[str] = (),
    genes: Sequence[str] = (),
    condition_on: str | Path | None = None,
    overwrite: bool = False,
    force: bool = False,
    on_progress: OnProgress = ignore_progress,
    on_message: OnMessage = ignore_message,
) -> list[PredictResult]:
    """Predict a dense map for slides of a store; of a map that the same model began, the missing blocks.

    Parameters
    ----------
    store
        Feature store with the slides' embeddings.
    model
        A saved model's folder, or ``hf://OWNER/NAME`` for one on the hub; a `SavedModel`, as `histosge.train` returns it;
        or a fitted model. A fitted model knows neither its genes nor its encoder: name all its outputs in `genes`, and see
        to the encoder yourself.
    out
        Expression store to write, a folder or URL.
    settings
        Grid and encoder, worker processes, the class of a saved model of your own.
    slide_ids
        Slides to predict; all of the store if empty.
    genes
        Genes to predict; all of the model if empty. Of a fitted model: the names of its outputs, in order.
    condition_on
        Spots measured on the one slide that is predicted: an ``.h5ad`` or a Space Ranger folder.
    overwrite
        Replace maps of these slides that another model made, or that hold other genes; each stays until the new one is
        complete.
    force
        Condition also on spots that do not fit the slide, with a warning, see `histosge.data.alignment_check`.
    on_progress, on_message
        Called after each block, and with one line on the spots that a model is conditioned on, and on what is known of
        slides that it was not trained on.

    Raises
    ------
    ModelError
        If the model does not fit the store, or does not predict one of the genes.
    IdentityMismatchError
        If a slide has a map by another model or of other genes, and `overwrite` is not set.
    StoreError
        If blocks of a slide are missing.
    AmbiguousSelectionError
        If the store holds several grids or encoders and none is named.
    """
    settings = settings or PredictSettings()
    check_writable(out)
    keep_to_own_cores()
    if settings.workers != "auto":
        check_workers(settings.workers)
    source = Store.open(str(store))
    folder = model if isinstance(model, str | Path) else None
    saved = model if isinstance(model, SavedModel) else None
    if folder is not None:
        saved = load_model(folder, settings.preset)
    ids = _check_slides(source, slide_ids)
    # All slides are checked before the first is predicted, so that hours are not spent before a refusal.
    slides = [_open(source, slide_id, settings.selection, saved) for slide_id in ids]
    if saved is None:
        saved = describe_fitted(cast(Model, model), genes, slides[0].identity, slides[0].stored.grid)
    columns = _gene_columns(saved, genes)
    for slide in slides:
        saved.check_fits(slide.identity, slide.stored.grid)
        check_complete(slide)
    task = _Task.from_saved(saved, columns)
    if condition_on is not None:
        if len(saved.encoders) > 1:
            raise ModelError("--condition-on takes a model of one encoder; train one with a single --encoder")
        if len(ids) != 1:
            raise ModelError("--condition-on belongs to one slide; name it with --slide ID")
        sample = Sample(ids[0], "", str(condition_on))
        chosen = (slides[0].stored.grid.spec.key, slides[0].identity.key)
        with one_blas_thread():
            conditioned = load_conditioned(source, saved, sample, chosen, on_message, force=force)
        task = _Task(saved, saved.model, conditioned, columns, conditioned.fingerprint)
    # A conditioned model has one slide, and is not sent to workers.
    is_shared_out = condition_on is None and (
        settings.scheduler is not None or (settings.workers != 1 and len(ids) > 1)
    )
    if is_shared_out and folder is None:
        raise ModelError(
            f"workers={settings.workers} load the model themselves: give a saved model's folder, or workers=1"
        )
    # Only after all checks, so that a refused call writes nothing.
    target = ExpressionStore.open_or_create(str(out))
    if is_shared_out and folder is not None:
        run = partial(
            _predict_one,
            fixed_url(str(store)),
            folder,
            str(out),
            replace(settings, workers=1, scheduler=None),
            tuple(genes),
            overwrite,
        )
        results = map_slides(
            run,
            ids,
            settings.workers,
            lambda slide_id, result: on_progress(Progress(result.planned, result.planned, slide_id)),
            settings.scheduler,
        )
    else:
        results = [_predict_slide(slide, task, target, on_progress, overwrite=overwrite) for slide in slides]
    for result in results:
        if result.note:
            on_message(f"{result.slide_id}: {result.note}")
    return results


def _check_slides(source: Store, slide_ids: Sequence[str]) -> list[str]:
    """Return the slides to predict, each once."""
    known = source.slide_ids()
    if not known:
        raise ModelError(f"{source.location.label} holds no slide; fill it with: histosge embed")
    for slide_id in slide_ids:
        if slide_id not in known:
            near = get_close_matches(slide_id, known, n=3, cutoff=0.5)
            shown = ", ".join(known[:_SHOWN_SLIDES]) + (", ..." if len(known) > _SHOWN_SLIDES else "")
            hint = f"did you mean {' or '.join(near)}?" if near else f"it holds {shown}"
            raise ModelError(
                f"{source.location.label} holds no slide {slide_id[:_SHOWN_LETTERS]!r}: {hint} "
                "(all of them: histosge ls)"
            )
    return list(dict.fromkeys(slide_ids)) or known


def _open(source: Store, slide_id: str, selection: Selection, saved: SavedModel | None) -> EmbeddedSlide:
    """Open a slide's embedding: the only one, or of several the one that the model was trained on."""
    if saved is not None and len(saved.encoders) > 1:
        return _open_several(source, slide_id, saved)
    try:
        return selection.open(source, slide_id)
    except AmbiguousSelectionError:
        if saved is None:
            raise
        # By name here; whether it is the same encoder, with the same weights, is checked afterwards.
        grid = selection.grid or spec_from_values(saved.card.grid).key
        return open_embedded(source, slide_id, grid, selection.encoder or str(saved.card.encoder["key"]))


def _open_several(source: Store, slide_id: str, saved: SavedModel) -> EmbeddedSlide:
    """Open the embeddings of all encoders that a model was trained on, each on its grid of the training."""
    names = [(str(encoder["grid"]["key"]), str(encoder["key"])) for encoder in saved.encoders]
    for (grid, encoder), needed in zip(names, saved.encoders, strict=True):
        how = embed_options(spec_from_values(needed["grid"]))
        there = grid in source.grid_keys(slide_id) and slug(encoder) in source.encoder_slugs(slide_id, grid)
        if not there:
            raise ModelError(
                f"slide {slide_id!r} has no embedding by {encoder!r} on grid {grid}, one of {len(names)} encoders that the "
                f"model needs; make it with: histosge embed SLIDES {source.location.label} --encoder {encoder} {how}"
            )
    first, *others = names
    return open_embedded(source, slide_id, *first, others)


@dataclass(frozen=True)
class _Task:
    """The models and genes of a prediction.

    Parameters
    ----------
    depth_model, model
        Predict depth, and genes: one and the same unless the latter is conditioned on spots.
    columns
        Of the model's genes, those to predict.
    spots
        Fingerprint of the spots that it was conditioned on, or None.
    reduce
        Applied to embeddings before either model, see `ReducingModel`.
    """

    saved: SavedModel
    depth_model: Model
    model: Model | ConditionedModel
    columns: list[int]
    spots: str | None
    reduce: Reduce | None = None

    @classmethod
    def from_saved(cls, saved: SavedModel, columns: list[int]) -> Self:
        """Predict with the saved model, not conditioned."""
        reduce, model = saved.model.split() if isinstance(saved.model, ReducingModel) else (None, saved.model)
        return cls(saved, model, model, columns, None, reduce)

    @property
    def predicts_depth(self) -> bool:
        return isinstance(self.depth_model, DepthModel) and self.depth_model.depth is not None

    def predict(self, window: Window) -> tuple[NDArray[np.float32], NDArray[np.float32] | None]:
        """Return the chosen genes of the block's own patches, and their depth where the model predicts it."""
        own = np.flatnonzero(window.own)
        depth: NDArray[np.float32] | None = None
        if self.predicts_depth:
            genes, depth = cast(DepthModel, self.depth_model).predict_with_depth(window.patches, own)
        if self.spots is not None or not self.predicts_depth:
            genes = self._genes(window, own)
        # Taking all columns by index would copy the largest array there is.
        every = self.columns == list(range(genes.shape[1]))
        return genes if every else genes[:, self.columns], depth

    def _genes(self, window: Window, own: NDArray[np.int64]) -> NDArray[np.float32]:
        if isinstance(self.model, PartialModel):  # the halo's patches are needed, their predictions are not
            return self.model.predict_some(window.patches, own)
        return self.model.predict(window.patches)[own]


def _predict_one(
    store: str,
    model: str | Path,
    out: str,
    settings: PredictSettings,
    genes: tuple[str, ...],
    overwrite: bool,
    slide_id: str,
) -> PredictResult:
    """Predict one slide in a worker."""
    # Opened again here: neither stores nor models are sent between processes.
    (result,) = predict(store, model, out, settings, slide_ids=[slide_id], genes=genes, overwrite=overwrite)
    return result


def _gene_columns(saved: SavedModel, genes: Sequence[str]) -> list[int]:
    """Return the columns of some genes, or of all if none is named."""
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
    # In the order given, each once.
    return [known[gene] for gene in dict.fromkeys(genes)] or list(range(len(known)))


def _predict_slide(
    slide: EmbeddedSlide, task: _Task, target: ExpressionStore, on_progress: OnProgress, *, overwrite: bool
) -> PredictResult:
    made_by, genes = _made_by(slide, task)
    grid_key = slide.stored.grid.spec.key
    if overwrite and target.holds_other(slide.slide_id, grid_key, genes, made_by):
        with target.replacing(slide.slide_id, grid_key) as fresh:
            return _write_map(slide, task, fresh, on_progress)
    return _write_map(slide, task, target, on_progress)


def _made_by(slide: EmbeddedSlide, task: _Task) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what decides a map's values, and its genes: a map of anything else is not mixed with this one."""
    saved = task.saved
    genes = tuple(saved.card.genes[i] for i in task.columns)
    made_by: dict[str, Any] = {
        "model": saved.fingerprint,
        "preset": saved.card.preset,
        "encoder": slide.identity.fingerprint,
        "slide": slide.fingerprint,
        "genes": len(genes),
    }
    if task.spots is not None:
        made_by["spots"] = task.spots
    return made_by, genes


def _write_map(
    slide: EmbeddedSlide, task: _Task, target: ExpressionStore, on_progress: OnProgress
) -> PredictResult:
    """Predict the blocks of a slide that a store lacks."""
    planned = slide.stored.planned(slide.array.block_shape)
    saved = task.saved
    made_by, genes = _made_by(slide, task)
    grid_key = slide.stored.grid.spec.key
    intervals = saved.intervals.take(task.columns) if saved.intervals else None
    stored_map = target.add_map(
        slide.stored,
        genes,
        slide.array.block_shape,
        made_by,
        intervals=intervals,
        depth=task.predicts_depth,
        trained_on=saved.was_trained_on(slide.fingerprint),
        embedding_distance=None
        if target.holds(slide.slide_id, grid_key)
        else distance_from_training(slide, saved),
    )
    missing = stored_map.array.missing(planned)
    windows = stream_windows(slide, missing, task.model.halo_um, task.reduce)
    work = partial(_predict_window, task=task, stored_map=stored_map)
    # Threads are enough: products of matrices and writing release Python's lock.
    threads = _threads(slide.array.block_shape, len(genes))
    for number, _ in enumerate(side_by_side(work, windows, threads), start=1):
        on_progress(Progress(number, len(missing), slide.slide_id))
    return PredictResult(
        slide.slide_id,
        grid_key,
        len(planned),
        len(missing),
        int(slide.stored.is_tissue.sum()),
        " ".join(evidence_sentences(saved, slide.fingerprint, stored_map.embedding_distance)),
    )


def _threads(block_shape: tuple[int, int], n_genes: int) -> int:
    """Return how many blocks to predict at once: one a core, as far as memory allows."""
    bytes_each = 4 * block_shape[0] * block_shape[1] * n_genes
    # Three times the float32 values of a block: the values, their stored form, and working memory of the model.
    return max(1, min(usable_cores(), _MAX_WORKING_BYTES // (3 * bytes_each)))


def _predict_window(window: Window, task: _Task, stored_map: StoredMap) -> None:
    """Predict one block and write it."""
    shape = window.block.shape
    rows = window.patches.rows[window.own] - window.block.rows[0]
    cols = window.patches.cols[window.own] - window.block.cols[0]
    places = rows * shape[1] + cols
    predicted, depth = np.empty((0, len(task.columns)), np.float32), None
    if len(places):
        predicted, depth = task.predict(window)
    # Expression last: a block counts as done when that exists, so an interruption in between computes it again.
    if stored_map.depth is not None:
        column = np.full((len(places), 1), np.nan, np.float32) if depth is None else depth.reshape(-1, 1)
        stored_map.depth.write(window.block, _lay_out(column, places, shape, column.dtype))
    stored_map.array.write(window.block, _lay_out(predicted, places, shape, stored_map.array.dtype))


def _lay_out(
    values: NDArray[np.float32], places: NDArray[np.int64], shape: tuple[int, int], dtype: np.dtype[Any]
) -> NDArray[Any]:
    """Return ``(n, n_channels)`` values on a block, ``(*shape, n_channels)``; NaN where there is no patch.

    Parameters
    ----------
    places
        Of the patches in the block, counted row by row.
    """
    if len(places) == math.prod(shape) and bool((np.diff(places) == 1).all()):
        # Inside the tissue there are no gaps: the largest array there is, is not copied once more.
        return values.astype(dtype).reshape(*shape, -1)
    block = np.full((math.prod(shape), values.shape[1]), np.nan, dtype)
    block[places] = values.astype(dtype)
    return block.reshape(*shape, -1)
