"""A model as a folder: weights in safetensors, everything else in one readable JSON.

Its card holds what it was trained on: encoder, grid, genes, normalisation, sections. Loading checks the folder's own
fingerprint; `check_fits` compares the card with an embedding before a single patch is predicted.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import save_file

from featurestore.earlier_results import MadeWith
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import FeatureStoreError, first_line
from featurestore.grid import PatchGrid, spec_from_values
from featurestore.software import version
from featurestore.storage.stored_documents import identity_attrs
from featurestore.whole_file import check_output, restore_replaced, whole_folder
from histosge.calibration.conformal import Intervals, predict_patches
from histosge.data.sections import Patches
from histosge.errors import ModelError
from histosge.models.encoder_average import EncoderAverage
from histosge.models.estimators import ModelSource, class_name, load_saved_class
from histosge.models.protocol import Model, State, capabilities
from histosge.models.registry import offered_by
from histosge.training.hub_card import README, write_card
from histosge.training.hub_model import model_folder
from histosge.training.model_card import ModelCard, embed_options
from histosge.training.model_files import (
    CONFIG,
    FORMAT,
    SPEC_NAME,
    WEIGHTS,
    ModelDocument,
    fingerprint_of,
    is_model,
    offering_package,
    parse_document,
    read_document,
    read_tensors,
)

MAX_HALO_UM = 50_000
"""A halo wider than any slide: a window of it would be all of the slide, for every block."""
# What numpy, torch and a model's own code raise for tensors that do not fit each other.
REBUILD_ERRORS = (
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    AssertionError,
)


@dataclass(frozen=True)
class Prediction:
    """log1p(CP10k) of some patches, ``(n_patches, n_genes)``, and the ends of its intervals, if known."""

    values: NDArray[np.float32]
    lower: NDArray[np.float32] | None
    upper: NDArray[np.float32] | None


@dataclass(frozen=True)
class SavedModel:
    """A model with its card.

    Parameters
    ----------
    fingerprint
        Of its weights and config, bit by bit.
    intervals
        None if it was not calibrated.
    was_there
        Whether `histosge.train` found it finished, so that nothing was trained.
    """

    model: Model
    card: ModelCard
    fingerprint: str
    intervals: Intervals | None = None
    was_there: bool = False

    def predict(self, patches: Patches) -> "Prediction":
        """Predict patches, with the interval of each prediction where the model was calibrated."""
        if self.intervals is None:
            return Prediction(self.model.predict(patches), None, None)
        values, depth = predict_patches(self.model, patches)
        return Prediction(values, *self.intervals.bounds(values, depth))

    def was_trained_on(self, slide_fingerprint: str) -> bool | None:
        """Tell whether spots of a slide were trained on; None for a fitted model that was never saved.

        By the fingerprint of the slide's file, since ids may be reused or renamed.
        """
        if not self.card.sections:
            return None
        return slide_fingerprint in {section.get("slide_fingerprint") for section in self.card.sections}

    @property
    def encoders(self) -> list[dict[str, Any]]:
        """Return key, dim, facts, fingerprint and grid key of each encoder that it needs, the first's grid left out."""
        first = self.card.encoder
        return list(first["facts"].get("encoders", [first]))

    def check_fits(self, identity: EncoderIdentity, grid: PatchGrid) -> None:
        """Refuse embeddings of another encoder or grid.

        Raises
        ------
        ModelError
            With both values side by side.
        """
        trained_on, found = self.card.grid, asdict(grid.spec)
        # Of one encoder, tokens and patches have two fingerprints: then the grid is what differs.
        is_grid = identity.key == self.card.encoder["key"] and trained_on.get("tokens") != found.get("tokens")
        if identity.fingerprint != self.card.encoder["fingerprint"] and not is_grid:
            raise ModelError(
                f"the model was trained on encoder {self.card.encoder['key']!r} "
                f"({self.card.encoder['fingerprint'][:16]}), the store holds {identity.key!r} "
                f"({identity.fingerprint[:16]}); embed with --encoder {self.card.encoder['key']} or train again"
            )
        # The stride, too: what a model gathers from around a patch depends on how dense the grid is.
        if trained_on != found:
            raise ModelError(
                f"the model was trained on grid {trained_on}, the store's is {found}; embed with "
                f"{embed_options(spec_from_values(trained_on))} or train again"
            )


def check_model_place(folder: str | Path) -> Path:
    """Return where a model can be written; refuse what cannot hold one, or holds something else.

    Called before training, so that hours of fitting do not end in this error.

    Raises
    ------
    ModelError, OutputError
        With the reason.
    """
    target = Path(folder)
    # A folder is replaced as a whole: not the one that the user's shell, or this process, works in.
    if target.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise ModelError(
            f"{str(folder)!r} is the current folder or one above it; name a new folder for the model, such as ./model"
        )
    check_output(target, folder=True)
    restore_replaced(target)
    # Only a model is replaced: a mistyped MODEL must not cost a folder of something else.
    if target.exists() and not is_model(target) and any(target.iterdir()):
        raise ModelError(
            f"{target} holds something that is no histosge model; nothing was written, give another MODEL"
        )
    return target


def save_model(
    folder: str | Path,
    model: Model,
    card: ModelCard,
    intervals: Intervals | None = None,
    *,
    made_with: MadeWith | None = None,
    also: Callable[[Path], None] | None = None,
) -> SavedModel:
    """Write a model's folder, whole or not at all. An older model there is replaced, and stays until this one is whole.

    Parameters
    ----------
    made_with
        Settings and inputs of the training, by which `histosge.train` recognises the model; None if it need not.
    also
        Called with the folder before it is put in its place, to write what else belongs to the model.

    Raises
    ------
    ModelError
        If `folder` holds something that is no model.
    """
    target = check_model_place(folder)
    if intervals is not None:
        trusted = {"genes": int(intervals.trusted.sum()), "of": len(card.genes), "scope": intervals.scope}
        card = replace(card, trusted=trusted)
    with whole_folder(target) as work:
        work.mkdir()
        arrays = model.state() | (intervals.state() if intervals else {})
        # safetensors writes an array's memory as it lies, whatever its strides.
        state = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        try:
            save_file(state, work / WEIGHTS)
        except SafetensorError as error:  # it knows no OSError: a full disk comes as text
            raise ModelError(f"cannot write {target}: {first_line(error)}") from error
        document = {
            "spec": SPEC_NAME,
            "format": FORMAT if isinstance(model, EncoderAverage) else 1,
            # No key for the origin of a model without one: its fingerprint stays what it was before there were any.
            "card": {name: value for name, value in asdict(card).items() if name != "origin" or value},
            "model": model.config(),
            "calibration": intervals.config() if intervals else None,
            "versions": {name: version(name) for name in ("histosge", "torch", "numpy")},
        }
        # Beside the card, not in it: fingerprints of folders without it stay valid.
        if (package := offered_by(card.preset)) is not None:
            document["offered_by"] = dict(zip(("package", "version"), package, strict=True))
        if made_with is not None:
            document["made_with"] = dict(made_with)
        document["fingerprint"] = fingerprint = fingerprint_of(work / WEIGHTS, document)
        (work / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        readme = write_card(card, intervals, fingerprint)
        (work / README).write_text(readme, encoding="utf-8")
        # safetensors makes a file that only its owner can read; the other one has what the umask allows.
        os.chmod(work / WEIGHTS, (work / CONFIG).stat().st_mode & 0o777)  # noqa: PTH101
        if also is not None:
            also(work)
    # Read back: what cannot be loaded is found now, not when it is needed.
    return _read(target, type(model.models[0] if isinstance(model, EncoderAverage) else model))


def describe_fitted(
    model: Model, genes: Sequence[str], identity: EncoderIdentity, grid: PatchGrid
) -> SavedModel:
    """Give a fitted model that was never saved the card that predicting takes.

    Nothing can be checked: encoder and grid are taken to be those of the embeddings that it is about to predict.

    Parameters
    ----------
    genes
        Names of its outputs, in order.
    identity, grid
        Of these embeddings.

    Raises
    ------
    ModelError
        If its outputs are not as many as the names.
    """
    # One made patch tells how many genes it predicts, before anything is written.
    nothing = np.zeros((1, identity.dim), np.float32)
    first = np.zeros(1, np.int64)
    found = model.predict(Patches.on_grid("", grid, first, first, nothing)).shape[1]
    if found != len(genes):
        raise ModelError(
            f"the fitted model predicts {found} genes, and {len(genes)} names were given; name all of them in genes="
        )
    card = ModelCard(
        class_name(type(model)), tuple(genes), identity_attrs(identity), asdict(grid.spec), {}, (), 0
    )
    digest = hashlib.sha256(json.dumps([asdict(card), model.config()], sort_keys=True).encode())
    for name, array in sorted(model.state().items()):
        digest.update(name.encode() + np.ascontiguousarray(array).tobytes())
    return SavedModel(model, card, digest.hexdigest())


def load_model(folder: str | Path, preset: ModelSource | None = None) -> SavedModel:
    """Load a saved model.

    Parameters
    ----------
    folder
        That `histosge.train` wrote; or ``hf://OWNER/NAME``, a model on the hub, which is downloaded and not changed.
    preset
        Not needed for a registered model: its class is looked up by the name in the card. A class of your own,
        ``module:Class`` in the card, must be named here: nothing that stands in a model's files is imported.

    Raises
    ------
    ModelError
        If there is none, it is damaged, it was written by a newer version, or its class is not installed, not named
        or not the one that is named.
    """
    path = model_folder(folder, (CONFIG, WEIGHTS))
    restore_replaced(path)
    document = read_document(path)
    saved_name = parse_document(document, path).card.preset
    return _read(path, load_saved_class(saved_name, preset, str(path), offering_package(document)))


def _read(path: Path, cls: type[Model]) -> SavedModel:
    document = read_document(path)
    facts, state = parse_document(document, path), read_tensors(path / WEIGHTS)
    # The values as they stand in the document, whose types are known now; entries of later versions are left out.
    found = document["card"]
    card: dict[str, Any] = {
        field.name: found[field.name] for field in fields(ModelCard) if field.name in found
    }
    card = card | {"genes": facts.card.genes, "sections": facts.card.sections}
    try:
        model = _rebuild(cls, facts, document["model"], state)
        intervals = Intervals.from_state(document["calibration"], state) if facts.calibration else None
        _check_predicts(model, intervals, facts, path)
    except REBUILD_ERRORS as error:
        # Of our own errors the text is enough; of a library's also the kind, since "0" says nothing.
        what = first_line(error) if isinstance(error, FeatureStoreError) else repr(error)
        raise ModelError(
            f"{path / CONFIG} does not go with its weights ({' '.join(what.split())[:300]}); train again"
        ) from error
    # After the model is rebuilt: a file that does not fit its config has a message of its own.
    fingerprint = fingerprint_of(path / WEIGHTS, document)
    if document.get("fingerprint") != fingerprint:
        raise ModelError(f"{path} was changed after it was trained: its fingerprint is another; train again")
    return SavedModel(model, ModelCard(**card), fingerprint, intervals)


def _rebuild(cls: type[Model], facts: ModelDocument, config: dict[str, Any], state: State) -> Model:
    if "encoders" in facts.card.encoder.facts:
        return EncoderAverage.from_parts(cls, config, state, facts.card.encoder.dim)
    return cls.from_state(config, state)


def _check_predicts(model: Model, intervals: Intervals | None, facts: ModelDocument, path: Path) -> None:
    """Predict one made patch on a new slide and on each that the model was trained on, and compare with the card.

    A model that only knows the slides of its training may refuse the new one.
    """
    card, n_genes = facts.card, len(facts.card.genes)
    halo_um = float(model.halo_um)
    if not 0 <= halo_um <= MAX_HALO_UM:
        raise ModelError(f"it looks {halo_um:g} microns beyond a patch; at most {MAX_HALO_UM} are read")
    stride_um, patch_um = card.grid.stride_px * card.grid.mpp, card.grid.patch_px * card.grid.mpp
    nothing, first = np.zeros((1, card.encoder.dim), np.float32), np.zeros(1, np.int64)
    known = {str(section.get("slide_id", "")) for section in card.sections}
    for slide_id in ["", *sorted(known)]:
        patches = Patches(slide_id, first, first, nothing, stride_um, patch_um)
        try:
            with np.errstate(all="ignore"):
                values, depth = predict_patches(model, patches)
        except ModelError:
            # Models that interpolate between a slide's spots refuse a slide without any: that is no damage.
            if slide_id == "" and capabilities(model).needs_position_on_slide:
                continue
            raise
        if values.shape != (1, n_genes) or (depth is not None and depth.shape != (1,)):
            raise ModelError(f"it predicts {values.shape[-1]} genes, its card names {n_genes}")
        if not np.isfinite(values).all():
            raise ModelError("it predicts no finite numbers")
    if intervals is not None and len(intervals.half_width) != n_genes:
        raise ModelError(f"its intervals are of {len(intervals.half_width)} genes, its card names {n_genes}")
