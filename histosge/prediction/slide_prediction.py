"""One slide's prediction: opened, compared with the model, planned, and predicted by one process.

`predict` calls it for each slide in turn, and a worker of a cluster for the slides that it plans.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from featurestore.blocks import Block
from featurestore.embedding.slide_result import ONE_SLIDE, is_of_one_slide
from featurestore.errors import AmbiguousSelectionError
from featurestore.events import OnProgress, Progress
from featurestore.grid import spec_from_values
from featurestore.names import slug
from featurestore.storage.store import Store
from histosge.data.embedded_slide import (
    EmbeddedSlide,
    Part,
    check_complete,
    cut_window,
    open_embedded,
    stream_windows,
    touched_indices,
)
from histosge.data.section_loading import Selection
from histosge.errors import ModelError
from histosge.prediction.embedding_evidence import distance_from_training, evidence_sentences
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predictor import Predictor, predict_window
from histosge.prediction.stored_map import StoredMap
from histosge.threads import side_by_side
from histosge.training.model_card import embed_options
from histosge.training.saved_model import SavedModel

SLIDE_ERRORS = (*ONE_SLIDE, ModelError)
"""Errors of the work on one slide that concern that slide, where `concerns_one_slide` agrees."""


@dataclass(frozen=True)
class PredictResult:
    """One slide's map.

    Parameters
    ----------
    slide_id, grid_key
        Which map of the expression store; no grid where the slide could not be opened.
    planned, computed
        Blocks with tissue, and those that this run computed; the others existed.
    patches
        Patches with tissue.
    note
        For a slide that the model was not trained on: for whom its intervals and trust hold. Else empty.
    failed
        Why the slide was set aside; empty if its map is whole.
    """

    slide_id: str
    grid_key: str
    planned: int
    computed: int
    patches: int
    note: str = ""
    failed: str = ""


def concerns_one_slide(error: Exception) -> bool:
    """Tell whether an error of the work on one slide concerns that slide alone; if not, it ends the run."""
    return isinstance(error, ModelError) or is_of_one_slide(error)


def set_aside(slide_id: str, error: Exception) -> PredictResult:
    """Return the result of a slide that cannot be predicted."""
    reason = str(error)
    if isinstance(error, MemoryError):
        reason = f"there is too little memory for it ({reason or 'MemoryError'}); use fewer workers"
    return PredictResult(slide_id, "", 0, 0, 0, failed=reason)


def open_slide(source: Store, slide_id: str, selection: Selection, saved: SavedModel | None) -> EmbeddedSlide:
    """Open a slide's embedding: the only one, or of several the one that the model was trained on.

    Raises
    ------
    AmbiguousSelectionError
        If there are several, and neither `selection` nor the model tells which.
    StoreError, ModelError
        If there is none that the model needs.
    """
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


def check_slide(slide: EmbeddedSlide, saved: SavedModel) -> None:
    """Refuse a slide that the model does not fit, or that lacks blocks.

    Raises
    ------
    ModelError, StoreError
        With both values side by side, or the number of blocks.
    """
    saved.check_fits(slide.identity, slide.stored.grid)
    check_complete(slide)


@dataclass(frozen=True)
class MapPlan:
    """A slide's map, created, and what it lacks.

    Parameters
    ----------
    stored_map
        Opened for writing.
    missing
        Blocks to predict, in row-major order.
    result
        Of the slide once these are predicted.
    """

    stored_map: StoredMap
    missing: list[Block]
    result: PredictResult


def plan_map(slide: EmbeddedSlide, predictor: Predictor, target: ExpressionStore) -> MapPlan:
    """Create a slide's map where there is none, and list the blocks that it lacks.

    Raises
    ------
    IdentityMismatchError
        If the slide has a map by another model or of other genes.
    """
    saved, block_shape = predictor.saved, slide.array.block_shape
    planned = slide.stored.planned(block_shape)
    grid_key = slide.stored.grid.spec.key
    stored_map = target.add_map(
        slide.stored,
        predictor.genes,
        block_shape,
        predictor.made_by(slide),
        intervals=saved.intervals.take(predictor.columns) if saved.intervals else None,
        depth=predictor.predicts_depth,
        trained_on=saved.was_trained_on(slide.fingerprint),
        embedding_distance=None
        if target.holds(slide.slide_id, grid_key)
        else distance_from_training(slide, saved),
    )
    missing = stored_map.array.missing(planned)
    result = PredictResult(
        slide.slide_id,
        grid_key,
        len(planned),
        len(missing),
        int(slide.stored.is_tissue.sum()),
        " ".join(evidence_sentences(saved, slide.fingerprint, stored_map.embedding_distance)),
    )
    return MapPlan(stored_map, missing, result)


def replaces_map(slide: EmbeddedSlide, predictor: Predictor, target: ExpressionStore) -> bool:
    """Tell whether the slide has a map that another model made, or of other genes."""
    grid_key = slide.stored.grid.spec.key
    return target.holds_other(slide.slide_id, grid_key, predictor.genes, predictor.made_by(slide))


def predict_slide(
    slide: EmbeddedSlide,
    predictor: Predictor,
    target: ExpressionStore,
    on_progress: OnProgress,
    *,
    overwrite: bool,
) -> PredictResult:
    """Predict the blocks of a slide that a store lacks; with `overwrite`, in place of another model's map."""
    if overwrite and replaces_map(slide, predictor, target):
        with target.replacing(slide.slide_id, slide.stored.grid.spec.key) as fresh:
            return _predict_missing(slide, predictor, fresh, on_progress)
    return _predict_missing(slide, predictor, target, on_progress)


def _predict_missing(
    slide: EmbeddedSlide, predictor: Predictor, target: ExpressionStore, on_progress: OnProgress
) -> PredictResult:
    plan = plan_map(slide, predictor, target)
    for number in predict_blocks(slide, plan.missing, predictor, plan.stored_map):
        on_progress(Progress(number, len(plan.missing), slide.slide_id))
    return plan.result


def predict_blocks(
    slide: EmbeddedSlide,
    blocks: Sequence[Block],
    predictor: Predictor,
    stored_map: StoredMap,
    parts: Mapping[tuple[int, int], Part] | None = None,
) -> Iterator[int]:
    """Predict blocks and write them; yield how many are done after each.

    Parameters
    ----------
    parts
        Reduced patches of all blocks with tissue that the windows touch, by index; they are read where this is None.
    """
    halo_um = predictor.model.halo_um
    if parts is None:
        windows = stream_windows(slide, blocks, halo_um, predictor.reduce)
    else:
        windows = (
            cut_window(slide, block, halo_um, _touched(slide, block, halo_um, parts)) for block in blocks
        )
    work = partial(predict_window, predictor=predictor, stored_map=stored_map)
    # Threads are enough: products of matrices and writing release Python's lock.
    for number, _ in enumerate(
        side_by_side(work, windows, predictor.threads(slide.array.block_shape)), start=1
    ):
        yield number


def _touched(
    slide: EmbeddedSlide, block: Block, halo_um: float, parts: Mapping[tuple[int, int], Part]
) -> Iterator[Part]:
    return (parts[index] for index in touched_indices(slide, block, halo_um) if index in parts)
