"""A model as a folder: weights in safetensors, everything else in one readable JSON.

Its card holds what it was trained on: encoder, grid, genes, normalisation, sections. Loading checks the folder's own
fingerprint; `check_fits` compares the card with an embedding before a single patch is predicted.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from featurestore.documents import MAX_DOCUMENT_BYTES, DocumentError, convert, parse_json
from featurestore.earlier_results import MadeWith
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import FeatureStoreError, first_line
from featurestore.grid import GridSpec, PatchGrid, TokenGridSpec, spec_from_values
from featurestore.software import version
from featurestore.storage.stored_documents import (
    MAX_CHANNELS,
    Count,
    Key,
    Microns,
    Pixels,
    Text,
    Tokens,
    identity_attrs,
)
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

FORMAT = 2
"""Written as 1 where the model has one encoder: nothing changed for those."""
MAX_HALO_UM = 50_000
"""A halo wider than any slide: a window of it would be all of the slide, for every block."""
MAX_LENGTH = 2**26
"""Of one dimension of a tensor."""
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
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
SPEC_NAME = "histosge-model"


class _EncoderCard(msgspec.Struct, frozen=True):
    key: Key
    dim: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHANNELS)]
    facts: dict[str, Any]
    fingerprint: Text


class _GridCard(msgspec.Struct, frozen=True):
    mpp: Microns
    patch_px: Pixels
    stride_px: Pixels
    tokens: Tokens | msgspec.UnsetType = msgspec.UNSET
    token_overlap_px: Count = 0
    token_cls: bool = False

    def __post_init__(self) -> None:
        if self.tokens is not msgspec.UNSET:
            spec_from_values(
                msgspec.to_builtins(self)
            )  # fields that are right alone may contradict each other


class _Origin(msgspec.Struct, frozen=True):
    fingerprint: Text
    sections: Count
    spots: Count


class _Card(msgspec.Struct, frozen=True):
    preset: Key
    genes: Annotated[tuple[Key, ...], msgspec.Meta(min_length=1, max_length=MAX_CHANNELS)]
    encoder: _EncoderCard
    grid: _GridCard
    normalisation: dict[str, Any]
    sections: tuple[dict[str, Any], ...]
    seed: int
    trusted: dict[str, Any] | None = None
    origin: _Origin | None = None


class ModelDocument(msgspec.Struct, frozen=True):
    """``config.json`` of a model, as far as every model has the same."""

    card: _Card
    model: dict[str, Any]
    fingerprint: Text
    calibration: dict[str, Any] | None = None


@dataclass(frozen=True)
class ModelCard:
    """What a saved model was trained on; all of it JSON-ready.

    Parameters
    ----------
    preset
        Registered name of the model class, or ``module:Class``; see `load_model`.
    genes
        Names of the outputs, in order.
    encoder
        Key, dim, facts and fingerprint of the embeddings that it was trained on.
    grid
        mpp, patch and stride of those embeddings.
    normalisation
        How targets were made from counts, and the floor on counts per spot.
    sections
        Per training section: slide id, donor, fingerprint of the slide, spots used and left out.
    seed
        Of the training.
    trusted
        How many genes are trusted, of how many, and the scope of that; None where the model was not calibrated, and in
        models of earlier versions.
    origin
        Of a model that was adapted (`histosge.models.adaptation`): fingerprint, sections and spots of the earlier one. Its
        sections come first in `sections`. Else None, and not written.
    """

    preset: str
    genes: tuple[str, ...]
    encoder: dict[str, Any]
    grid: dict[str, Any]
    normalisation: dict[str, Any]
    sections: tuple[dict[str, Any], ...]
    seed: int
    trusted: dict[str, Any] | None = None
    origin: dict[str, Any] | None = None


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


def embed_options(spec: GridSpec) -> str:
    """Return the options of `histosge embed` that make a grid."""
    patches = spec.encoded
    options = f"--mpp {patches.mpp} --patch {patches.patch_px}"
    if not isinstance(spec, TokenGridSpec):
        return f"{options} --stride {patches.stride_px}"
    options += f" --tokens {spec.tokens}{'+cls' if spec.token_cls else ''}"
    return options + (f" --token-overlap {spec.token_overlap_px}" if spec.token_overlap_px else "")


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
    if target.exists() and not _is_model(target) and any(target.iterdir()):
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
        document["fingerprint"] = fingerprint = _fingerprint(work / WEIGHTS, document)
        (work / CONFIG).write_text(json.dumps(document, indent=2, sort_keys=True) + "\n")
        readme = write_card(card, intervals, fingerprint, embed_options(spec_from_values(card.grid)))
        (work / README).write_text(readme, encoding="utf-8")
        # safetensors makes a file that only its owner can read; the other one has what the umask allows.
        os.chmod(work / WEIGHTS, (work / CONFIG).stat().st_mode & 0o777)  # noqa: PTH101
        if also is not None:
            also(work)
    # Read back: what cannot be loaded is found now, not when it is needed.
    return _read(target, type(model.models[0] if isinstance(model, EncoderAverage) else model))


def read_made_with(folder: str | Path) -> Mapping[str, Any] | None:
    """Return what a saved model was made with; None if it does not say, as those of version 1.0 and before."""
    made_with = _document(model_folder(folder, (CONFIG,))).get("made_with")
    return made_with if isinstance(made_with, dict) else None


def read_fingerprint(folder: str | Path) -> str:
    """Return the fingerprint that a saved model records, without loading it; `load_model` compares it."""
    return str(_document(model_folder(folder, (CONFIG,))).get("fingerprint"))


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
    document = _document(path)
    saved_name = _parse(document, path).card.preset
    return _read(path, load_saved_class(saved_name, preset, str(path), _made_with(document)))


def _document(path: Path) -> dict[str, Any]:
    if not _is_model(path):
        raise ModelError(f"{path} is no saved model (no {CONFIG} of one); make one with: histosge train")
    document: dict[str, Any] = _read_json(path / CONFIG)
    found = document.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise ModelError(
            f"{path} was written by a newer version (format {found}, known: {FORMAT}); "
            "upgrade with: pip install -U histosge"
        )
    return document


def _made_with(document: dict[str, Any]) -> str:
    """Return package and version that offered the model, for messages; empty if it was one of ours."""
    offered = document.get("offered_by")
    if not isinstance(offered, dict):
        return ""
    # A model folder is data from elsewhere: what it says is shown, and must stay one line.
    return " ".join(f"{offered.get('package')} {offered.get('version')}".split())


def _read(path: Path, cls: type[Model]) -> SavedModel:
    document = _document(path)
    facts, state = _parse(document, path), _read_tensors(path / WEIGHTS)
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
    fingerprint = _fingerprint(path / WEIGHTS, document)
    if document.get("fingerprint") != fingerprint:
        raise ModelError(f"{path} was changed after it was trained: its fingerprint is another; train again")
    return SavedModel(model, ModelCard(**card), fingerprint, intervals)


def _rebuild(cls: type[Model], facts: ModelDocument, config: dict[str, Any], state: State) -> Model:
    if "encoders" in facts.card.encoder.facts:
        return EncoderAverage.from_parts(cls, config, state, facts.card.encoder.dim)
    return cls.from_state(config, state)


def _parse(document: dict[str, Any], path: Path) -> ModelDocument:
    try:
        return convert(document, ModelDocument, str(path / CONFIG))
    except DocumentError as error:
        raise ModelError(f"{error}; train again") from error


def _read_json(file: Path) -> Any:
    if file.stat().st_size > MAX_DOCUMENT_BYTES:
        raise ModelError(
            f"{file} has {file.stat().st_size} bytes; a model's has {MAX_DOCUMENT_BYTES} at most"
        )
    try:
        return parse_json(file.read_bytes(), str(file))
    except DocumentError as error:
        raise ModelError(f"{error}; train again") from error


def _read_tensors(file: Path) -> State:
    """Read a model's arrays: no more bytes than the file has, whatever its header claims."""
    # Not is_file() alone: a fifo would be waited for.
    if not file.is_file():
        raise ModelError(f"{file} cannot be read (it is not there, or no file); train again")
    try:
        state: State = load_file(file)
    except (
        OSError,
        ValueError,
        KeyError,
        AttributeError,
        TypeError,
        SafetensorError,
    ) as error:  # KeyError, in earlier safetensors AttributeError: a dtype that numpy lacks
        raise ModelError(f"{file} cannot be read ({first_line(error)}); train again") from error
    for name, array in state.items():
        # Infinity is allowed: it is the scale of a column that does not vary.
        if array.dtype.kind == "f" and np.isnan(array).any():
            raise ModelError(f"{file}: tensor {name[:60]!r} holds NaN; train again")
        # An array without elements takes no bytes in a file, whatever its other lengths.
        if max(array.shape, default=0) > MAX_LENGTH:
            raise ModelError(f"{file}: tensor {name[:60]!r} has shape {array.shape}; train again")
    return state


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


def _fingerprint(weights: Path, document: dict[str, Any]) -> str:
    """Return sha256 over the weights' file, the card and the model's config."""
    digest = hashlib.sha256(weights.read_bytes())
    parts = [document["card"], document["model"]]
    # Only where there is one, so that folders from before there were intervals keep their fingerprint.
    if document.get("calibration"):
        parts.append(document["calibration"])
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def _is_model(path: Path) -> bool:
    config = path / CONFIG
    try:
        # A name with NUL, or longer than the file system allows, is no model.
        if not config.is_file():
            return False
        document = _read_json(config)
    except (ModelError, OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("spec") == SPEC_NAME
