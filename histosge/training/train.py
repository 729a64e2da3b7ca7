"""Sections in a store -> a saved model. Nothing is encoded here: that was done once, before."""

from dataclasses import replace
from functools import partial
from pathlib import Path

from featurestore.earlier_results import MadeWith, is_same_result
from featurestore.events import OnMessage, OnProgress, ignore_message, ignore_progress
from featurestore.threads import keep_to_own_cores
from histosge.errors import ModelError
from histosge.models.training_device import training_device
from histosge.reporting.page import is_page_there
from histosge.threads import one_blas_thread
from histosge.training.in_memory import train_in_memory
from histosge.training.model_files import read_made_with
from histosge.training.processes import first_writes, is_first_process, joined
from histosge.training.report import write_training_report
from histosge.training.run import Run
from histosge.training.saved_model import SavedModel, check_model_place, load_model
from histosge.training.settings import TrainSettings, describe_training, settings_of
from histosge.training.streamed import is_streamed, train_adapted, train_further, train_streamed
from histosge.training.streaming.start import StartFromWeights, open_start

__all__ = ["TrainSettings", "train"]


@one_blas_thread()
@joined()
def train(
    samples: str | Path,
    store: str | Path,
    model: str | Path,
    settings: TrainSettings | None = None,
    *,
    report: str | Path | None = None,
    overwrite: bool = False,
    force: bool = False,
    stream: bool | None = None,
    start_from: str | Path | None = None,
    adapt: bool = False,
    keep_sums: bool = True,
    device: str = "auto",
    on_message: OnMessage = ignore_message,
    on_progress: OnProgress = ignore_progress,
) -> SavedModel:
    """Train a model on the sections of a sample sheet and save it.

    A large cohort is streamed where the model is fitted from sums (`dense` and `ridge`): sections are read one after
    another, and memory does not grow with them. The result is the same up to rounding.

    A model that is there, made with the same settings and inputs, is returned as it is. The same means up to rounding:
    the number of threads, and the order of the sheet's rows, do not count.

    Parameters
    ----------
    samples
        A sample sheet whose rows name expression.
    store
        The feature store that holds their embeddings.
    model
        Folder to write.
    settings
        Preset, genes, epochs, seed.
    report
        A page (HTML) to write on the model; None for none.
    overwrite
        Train in any case, and replace a model and a page that are there; they stay until the new ones are complete.
    force
        Train also on spots that do not fit their slide, with a warning, see `histosge.data.alignment_check`.
    stream
        Whether to stream; None means where embeddings of all sections (of an adaptation, the new ones) would take more than
        `histosge.training.streaming.fit_streamed.STREAM_FROM_BYTES`.
    start_from
        A saved `dense`, `ridge` or `attention`. If it keeps its sums, the sheet's further sections are added to them,
        exactly, and the old ones are not read; its genes, patterns of genes, weights of scales, intervals and trust stay.
        Without sums, as `attention` always is, it is adapted: fitted to the further sections alone, shrunk towards its
        weights, see `histosge.models.adaptation`; intervals and trust are measured on these sections.
    adapt
        Adapt the model of `start_from` also where it keeps its sums.
    keep_sums
        Whether the model keeps the sums that it was fitted from, in ``stats/`` of its folder, where it has any.
    device
        Where networks are trained (`attention`, `paper`): ``auto`` (a GPU where there is one), ``cpu`` or ``cuda``.
    on_message
        Called with one line on what was found.
    on_progress
        Called while sections are streamed, a section and pass a step.

    Raises
    ------
    EarlierResultError
        If a model or a page is there that was made with something else, and `overwrite` is not set.
    FeatureStoreError
        If the sections, the store or the settings are unusable; nothing is written then.
    """
    settings = settings or TrainSettings()
    keep_to_own_cores()
    if adapt and start_from is None:
        raise ModelError("--adapt starts from a saved model; name it with --from MODEL")
    start = None if start_from is None else open_start(start_from, adapt=adapt)
    settings = settings.with_defaults() if start is None else settings_of(start, settings, str(start_from))
    # All that can be refused is refused here: loading a cohort takes minutes.
    settings.checked()
    check_model_place(model)
    made_with = describe_training(samples, store, settings)
    if start is not None:
        made_with = {**made_with, "from": start.saved.fingerprint}
    if isinstance(start, StartFromWeights):
        made_with = {**made_with, "adapted": True}
    page = None if report is None else Path(report)
    if page is not None and is_page_there(page, made_with, overwrite=overwrite):
        page = None  # whole already, of this very model
    saved = _find_finished(model, made_with, settings, overwrite=overwrite)
    if saved is None:
        run = Run(samples, store, model, settings, made_with, on_message, on_progress, force, keep_sums)
        with training_device(device):
            if isinstance(start, StartFromWeights):
                saved = train_adapted(run, start, stream)
            elif start is not None:
                # What follows from sums gains nothing from further processes.
                saved = first_writes(partial(train_further, run, start), partial(load_model, model))
            else:
                saved = train_streamed(run) if is_streamed(run, stream) else train_in_memory(run)
    if page is not None and is_first_process():
        write_training_report(saved, page, made_with)
    return saved


def _find_finished(
    model: str | Path, made_with: MadeWith, settings: TrainSettings, *, overwrite: bool
) -> SavedModel | None:
    """Return the model that is there if it is the one that is wanted; None if it has to be trained."""
    folder = Path(model)
    if not folder.exists() or not any(folder.iterdir()):
        return None
    if not is_same_result(folder, read_made_with(folder), made_with, overwrite=overwrite):
        return None
    # An object's own fit returned some other class, which its card names.
    named = settings.preset if isinstance(settings.preset, type) or ":" in str(settings.preset) else None
    try:
        return replace(load_model(folder, named), was_there=True)
    except ModelError as error:
        raise ModelError(f"{error}, with --overwrite") from error
