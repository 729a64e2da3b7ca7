"""Predict slides of a feature store, block by block, into an expression store.

Resumable like the embedding: a block is done when its objects exist. Memory holds the blocks near the one that is
predicted, never a slide.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, cast

from featurestore.embedding.limits import check_workers
from featurestore.errors import AmbiguousSelectionError
from featurestore.events import OnMessage, OnProgress, ignore_message, ignore_progress
from featurestore.file_systems import fixed_url
from featurestore.location import store_location
from featurestore.object_stores.hub_place import check_writable
from featurestore.slides.sample_sheet import Sample
from featurestore.software import version
from featurestore.storage.store import Store
from featurestore.threads import keep_to_own_cores
from histosge.data.embedded_slide import EmbeddedSlide, check_complete
from histosge.data.section_loading import Selection
from histosge.errors import ModelError
from histosge.models.estimators import ModelSource
from histosge.models.prediction_device import prediction_device
from histosge.models.protocol import Model
from histosge.prediction.conditioning import load_conditioned
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predictor import Predictor
from histosge.prediction.slide_prediction import (
    SLIDE_ERRORS,
    PredictResult,
    check_slide,
    concerns_one_slide,
    open_slide,
    predict_slide,
    set_aside,
)
from histosge.threads import one_blas_thread
from histosge.training.saved_model import SavedModel, describe_fitted, load_model

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
        Processes that share the blocks of all slides out among themselves, ``auto`` for one per core; the maps are the same.
    preset
        The class of the saved model, where that is none of the registered ones; see
        `histosge.training.saved_model.load_model`.
    scheduler
        Address of a running dask scheduler, whose workers share the blocks out in place of processes of this machine.
    device
        Where embeddings are projected, and the network of `attention` computes: ``cpu``, ``cuda``, or ``auto`` for a
        GPU where there is one. Maps of a GPU are equal up to rounding, those of CPUs byte for byte.
    """

    selection: Selection = field(default_factory=Selection)
    workers: int | Literal["auto"] = 1
    preset: ModelSource | None = None
    scheduler: str | None = None
    device: str = "cpu"


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

    Slides are opened one after the other. One that cannot be predicted (blocks are missing, it has another model's map)
    is set aside with its reason, see `PredictResult.failed`, and the others go on; if none is left, its error is raised.

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
        If all slides have maps by another model or of other genes, and `overwrite` is not set.
    StoreError
        If all slides lack blocks.
    ClusterError
        If the scheduler does not answer or goes away, or a worker runs another version of this package.
    AmbiguousSelectionError
        If the store holds several grids or encoders and none is named.
    """
    settings = settings or PredictSettings()
    check_writable(out)
    keep_to_own_cores()
    if settings.workers != "auto":
        check_workers(settings.workers)
    if settings.scheduler is None:  # of a cluster, its workers tell whether they have a GPU
        with prediction_device(settings.device):
            pass  # refused here, before anything is read
    source = Store.open(str(store))
    folder = model if isinstance(model, str | Path) else None
    saved = model if isinstance(model, SavedModel) else None
    if folder is not None:
        saved = load_model(folder, settings.preset)
    ids = _check_slides(source, slide_ids)
    if saved is not None:  # before slides are opened: a mistyped gene is said at once
        _gene_columns(saved, genes)
    if condition_on is not None:
        _check_condition(saved, ids)
    is_shared_out = settings.scheduler is not None or settings.workers != 1
    if is_shared_out and condition_on is not None:
        # Fitting the spots, which is most of the work, is not divided; workers would each do all of it.
        on_message(
            "a map conditioned on spots is predicted by this process; --workers and --scheduler are not used"
        )
        is_shared_out = False
    if is_shared_out and folder is None:
        raise ModelError(
            f"workers={settings.workers} load the model themselves: give a saved model's folder, or workers=1"
        )
    run = _Run(source, settings, saved, str(out), overwrite=overwrite)
    first = run.first_usable(ids)
    if saved is None:
        saved = describe_fitted(cast(Model, model), genes, first.identity, first.stored.grid)
        run.saved = saved
    columns = _gene_columns(saved, genes)
    predictor = Predictor.from_saved(saved, columns)
    if condition_on is not None:
        sample = Sample(ids[0], "", str(condition_on))
        chosen = (first.stored.grid.spec.key, first.identity.key)
        with one_blas_thread():
            conditioned = load_conditioned(source, saved, sample, chosen, on_message, force=force)
        predictor = Predictor(saved, saved.model, conditioned, columns, conditioned.fingerprint)
    # Only after all checks, so that a refused call writes nothing.
    was_there = store_location(str(out), writable=True).exists()
    target = ExpressionStore.open_or_create(str(out))
    try:
        if is_shared_out:
            assert folder is not None
            run.predict_on_workers(folder, tuple(columns) if genes else None, ids, on_progress)
        else:
            with prediction_device(settings.device):
                for slide_id in ids:
                    run.predict_here(slide_id, predictor, target, on_progress)
    finally:
        run.remove_refused(target, is_new=not was_there)
    return run.finished(ids, on_message)


class _Run:
    """The slides of one call: opened when their turn comes, and set aside where something is wrong with them alone."""

    def __init__(
        self, source: Store, settings: PredictSettings, saved: SavedModel | None, out: str, *, overwrite: bool
    ) -> None:
        self._source, self._settings, self._out, self._overwrite = source, settings, out, overwrite
        self.saved = saved
        self._first: EmbeddedSlide | None = None
        self._results: dict[str, PredictResult] = {}
        self._error: Exception | None = None
        self._refused: list[str] = []

    def first_usable(self, ids: Sequence[str]) -> EmbeddedSlide:
        """Open the first slide that can be predicted.

        Raises
        ------
        ModelError, AmbiguousSelectionError
            If the model does not fit the first slide: most likely it fits none, and opening thousands would tell no more.
        FeatureStoreError
            If there is none.
        """
        for slide_id in ids:
            try:
                self._first = self._open(slide_id)
            except (ModelError, AmbiguousSelectionError) as error:
                if slide_id == ids[0]:
                    raise
                self._set_aside(slide_id, error)
            except SLIDE_ERRORS as error:
                self._set_aside(slide_id, error)
            else:
                return self._first
        assert self._error is not None
        raise self._error

    def _open(self, slide_id: str) -> EmbeddedSlide:
        if self._first is not None and self._first.slide_id == slide_id:
            return self._first
        slide = open_slide(self._source, slide_id, self._settings.selection, self.saved)
        if self.saved is not None:
            check_slide(slide, self.saved)
        else:
            check_complete(slide)
        return slide

    def _set_aside(self, slide_id: str, error: Exception) -> None:
        if not concerns_one_slide(error):
            raise error
        self._record(set_aside(slide_id, error), error)

    def predict_here(
        self, slide_id: str, predictor: Predictor, target: ExpressionStore, on_progress: OnProgress
    ) -> None:
        """Predict one slide in this process."""
        if slide_id in self._results:
            return
        try:
            slide = self._open(slide_id)
            self._results[slide_id] = predict_slide(
                slide, predictor, target, on_progress, overwrite=self._overwrite
            )
        except SLIDE_ERRORS as error:
            self._set_aside(slide_id, error)

    def predict_on_workers(
        self,
        model: str | Path,
        columns: tuple[int, ...] | None,
        ids: Sequence[str],
        on_progress: OnProgress,
    ) -> None:
        """Share the slides that are left out among processes of this machine, or the workers of a cluster."""
        # Imported here: a prediction in one process needs no dask.
        from featurestore.analysis.cluster_stream import connect
        from featurestore.embedding.dask_clients import PACKAGE
        from histosge.prediction.dask_cluster import new_run, predict_on_cluster
        from histosge.prediction.worker import PredictJob

        assert self.saved is not None
        settings = self._settings
        job = PredictJob(
            new_run(),
            version(PACKAGE),
            fixed_url(self._source.location.url),
            model,
            self._out,
            self.saved.fingerprint,
            columns,
            settings.selection,
            settings.preset,
            settings.device,
            self._overwrite,
        )
        left = [slide_id for slide_id in ids if slide_id not in self._results]
        with connect(settings.workers, settings.scheduler) as client:
            predict_on_cluster(client, job, left, on_progress, self._record)

    def _record(self, result: PredictResult, error: Exception | None) -> None:
        self._results[result.slide_id] = result
        self._error = self._error or error
        if isinstance(error, ModelError):
            self._refused.append(result.slide_id)

    def remove_refused(self, target: ExpressionStore, *, is_new: bool) -> None:
        """Remove the maps without a block of slides that the model refuses, and a new store without a map."""
        # Another run would refuse them, too, so that nobody will fill these maps.
        for slide_id in self._refused:
            target.remove_without_blocks(slide_id)
        # What is wrong with single slides shows in their turn: if that is all of them, nothing was predicted.
        if is_new:
            target.remove_if_empty()

    def finished(self, ids: Sequence[str], on_message: OnMessage) -> list[PredictResult]:
        """Return the results in the order of the slides.

        Raises
        ------
        FeatureStoreError
            If every slide was set aside: then the call itself was most likely a mistake.
        """
        results = [self._results[slide_id] for slide_id in ids]
        if self._error is not None and all(result.failed for result in results):
            raise self._error
        for result in results:
            if result.note and not result.failed:
                on_message(f"{result.slide_id}: {result.note}")
        return results


def _check_condition(saved: SavedModel | None, ids: Sequence[str]) -> None:
    if saved is not None and len(saved.encoders) > 1:
        raise ModelError("--condition-on takes a model of one encoder; train one with a single --encoder")
    if len(ids) != 1:
        raise ModelError("--condition-on belongs to one slide; name it with --slide ID")


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
