"""The tasks of a worker process: plan one slide, read some of its blocks, predict some. It knows no dask.

Arguments are names and small numbers: stores and models are opened by the process itself, once for a run. Reduced patches
alone travel, from worker to worker.
"""

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from featurestore.blocks import Block
from featurestore.embedding.dask_clients import PACKAGE, check_version
from featurestore.errors import AccessError, ClusterError, FeatureStoreError
from featurestore.events import ignore_progress
from featurestore.software import version
from featurestore.storage.store import Store
from featurestore.threads import one_blas_thread_in_tasks
from histosge.data.embedded_slide import EmbeddedSlide, Part, read_part
from histosge.data.section_loading import Selection
from histosge.errors import ModelError
from histosge.models.estimators import ModelSource
from histosge.models.prediction_device import prediction_device
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.pieces import Pieces, cut_into_pieces
from histosge.prediction.predictor import Predictor
from histosge.prediction.slide_prediction import (
    SLIDE_ERRORS,
    PredictResult,
    check_slide,
    concerns_one_slide,
    open_slide,
    plan_map,
    predict_blocks,
    predict_slide,
    replaces_map,
)
from histosge.prediction.stored_map import StoredMap
from histosge.training.saved_model import load_model

OPEN_SLIDES = 64
"""Slides that a process keeps open: their tissue maps, small beside one block of embeddings. Slides take turns."""

Parts = dict[tuple[int, int], Part]
"""Reduced patches of blocks, by index."""


@dataclass(frozen=True)
class PredictJob:
    """What the tasks of one run share.

    Parameters
    ----------
    run
        A random id of the run: what a process keeps for one run is not used in another.
    version
        Of this package in the process that submits.
    store, model, out
        Feature store, saved model and expression store; the workers see them under the same names.
    fingerprint
        Of the model.
    columns
        Of its genes, those to predict; None for all, since a job is sent with each task.
    """

    run: str
    version: str = field(compare=False)
    store: str = field(compare=False, repr=False)  # dask logs a task's arguments, and a URL may be signed
    model: str | Path = field(compare=False, repr=False)
    out: str = field(compare=False, repr=False)
    fingerprint: str = field(compare=False)
    columns: tuple[int, ...] | None = field(compare=False, repr=False)
    selection: Selection = field(compare=False)
    preset: ModelSource | None = field(compare=False)
    device: str = field(compare=False)
    overwrite: bool = field(compare=False)


@dataclass(frozen=True)
class FailedTask:
    """An error that another try cannot change. It is returned, since dask retries a task that raises.

    Parameters
    ----------
    is_of_one_slide
        Whether the other slides can go on.
    """

    error: Exception
    is_of_one_slide: bool


@dataclass(frozen=True)
class SlidePlan:
    """What one slide's map lacks.

    Parameters
    ----------
    result
        Of the slide once its pieces are predicted.
    pieces
        None where the map replaces another model's: one task then makes all of it, since the maps change places in the
        end.
    """

    result: PredictResult
    pieces: Pieces | None


def plan_slide(job: PredictJob, slide_id: str) -> SlidePlan | FailedTask:
    """Compare a slide with the model, create its map, and list what it lacks."""
    with _task(job):
        try:
            predictor, slide, target = _predictor(job), _slide(job, slide_id), ExpressionStore.open(job.out)
            check_slide(slide, predictor.saved)
            if job.overwrite and replaces_map(slide, predictor, target):
                grid_key = slide.stored.grid.spec.key
                return SlidePlan(PredictResult(slide_id, grid_key, 0, 0, 0), None)
            plan = plan_map(slide, predictor, target)
        except (FeatureStoreError, *SLIDE_ERRORS) as error:
            return _given_up(error)
        halo_um, is_reduced = predictor.model.halo_um, predictor.reduce is not None
        return SlidePlan(plan.result, cut_into_pieces(slide, plan.missing, halo_um, is_reduced=is_reduced))


def read_blocks(job: PredictJob, slide_id: str, blocks: Sequence[Block]) -> Parts | FailedTask:
    """Read blocks and reduce their embeddings; dask keeps what is returned for the tasks that need it."""
    with _task(job):
        try:
            predictor, slide = _predictor(job), _slide(job, slide_id)
            return {block.index: read_part(slide, block, predictor.reduce) for block in blocks}
        except (FeatureStoreError, *SLIDE_ERRORS) as error:
            return _given_up(error)


def predict_piece(
    job: PredictJob,
    slide_id: str,
    blocks: Sequence[Block],
    readings: Sequence[Parts | FailedTask],
) -> int | FailedTask:
    """Predict blocks and write them, from what other tasks have read, or from the store where they have read nothing.

    Returns
    -------
    int
        Blocks that are predicted.
    """
    parts: Parts = {}
    for found in readings:
        if isinstance(found, FailedTask):
            return found
        parts |= found
    with _task(job):
        try:
            predictor, slide = _predictor(job), _slide(job, slide_id)
            stored_map = _map(job, slide_id, slide.stored.grid.spec.key)
            return max(predict_blocks(slide, blocks, predictor, stored_map, parts if readings else None))
        except (FeatureStoreError, *SLIDE_ERRORS) as error:
            return _given_up(error)


def replace_map(job: PredictJob, slide_id: str) -> PredictResult | FailedTask:
    """Predict all of a slide, and put its map in place of another model's."""
    with _task(job):
        try:
            predictor, slide, target = _predictor(job), _slide(job, slide_id), ExpressionStore.open(job.out)
            return predict_slide(slide, predictor, target, ignore_progress, overwrite=True)
        except (FeatureStoreError, *SLIDE_ERRORS) as error:
            return _given_up(error)


def _given_up(error: Exception) -> FailedTask:
    if isinstance(error, AccessError) and error.is_transient:
        raise error  # dask tries the task again
    return FailedTask(error, concerns_one_slide(error))


@contextmanager
def _task(job: PredictJob) -> Iterator[None]:
    """Compute a task as every worker does: same version, one thread of BLAS, the device of the run."""
    # Also here, since workers join while a run goes on.
    check_version(version(PACKAGE), job.version, f"process {os.getpid()}")
    with one_blas_thread_in_tasks(), prediction_device(job.device):
        yield


_loading = threading.Lock()


def _predictor(job: PredictJob) -> Predictor:
    # Tasks of one process that start together must not each read the model.
    with _loading:
        return _loaded(job)


@lru_cache(maxsize=2)  # models of two runs that take turns on one cluster
def _loaded(job: PredictJob) -> Predictor:
    try:
        saved = load_model(job.model, job.preset)
    except ModelError as error:  # of all slides, unlike other errors of this class
        raise ClusterError(f"a worker cannot load the model: {error}") from error
    if saved.fingerprint != job.fingerprint:
        raise ClusterError(
            f"{job.model} has fingerprint {saved.fingerprint[:16]} on a worker and {job.fingerprint[:16]} where the run was "
            "started: workers must see the same model, and it must not change meanwhile; run the same command again"
        )
    columns = range(len(saved.card.genes)) if job.columns is None else job.columns
    return Predictor.from_saved(saved, list(columns))


@lru_cache(maxsize=OPEN_SLIDES)
def _slide(job: PredictJob, slide_id: str) -> EmbeddedSlide:
    return open_slide(Store.open(job.store), slide_id, job.selection, _predictor(job).saved)


@lru_cache(maxsize=OPEN_SLIDES)
def _map(job: PredictJob, slide_id: str, grid_key: str) -> StoredMap:
    return ExpressionStore.open(job.out).map(slide_id, grid_key, read_only=False)
