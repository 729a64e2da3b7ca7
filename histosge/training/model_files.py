"""The files of a saved model's folder: read within bounds, and checked before anything is made of them."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from featurestore.documents import MAX_DOCUMENT_BYTES, DocumentError, convert, parse_json
from featurestore.errors import first_line
from featurestore.grid import spec_from_values
from featurestore.storage.stored_documents import MAX_CHANNELS, Count, Key, Microns, Pixels, Text, Tokens
from histosge.errors import ModelError
from histosge.models.protocol import State
from histosge.training.hub_model import model_folder

FORMAT = 2
"""Written as 1 where the model has one encoder: nothing changed for those."""
MAX_LENGTH = 2**26
"""Of one dimension of a tensor."""
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


def read_made_with(folder: str | Path) -> Mapping[str, Any] | None:
    """Return what a saved model was made with; None if it does not say, as those of version 1.0 and before."""
    made_with = read_document(model_folder(folder, (CONFIG,))).get("made_with")
    return made_with if isinstance(made_with, dict) else None


def read_fingerprint(folder: str | Path) -> str:
    """Return the fingerprint that a saved model records, without loading it; `load_model` compares it."""
    return str(read_document(model_folder(folder, (CONFIG,))).get("fingerprint"))


def read_document(path: Path) -> dict[str, Any]:
    """Return what the ``config.json`` of a model's folder holds, of a format that is known.

    Raises
    ------
    ModelError
        If the folder is no model, or a newer version wrote it.
    """
    if not is_model(path):
        raise ModelError(f"{path} is no saved model (no {CONFIG} of one); make one with: histosge train")
    document: dict[str, Any] = _read_json(path / CONFIG)
    found = document.get("format")
    if not isinstance(found, int) or found > FORMAT:
        raise ModelError(
            f"{path} was written by a newer version (format {found}, known: {FORMAT}); "
            "upgrade with: pip install -U histosge"
        )
    return document


def offering_package(document: dict[str, Any]) -> str:
    """Return package and version that offered the model, for messages; empty if it was one of ours."""
    offered = document.get("offered_by")
    if not isinstance(offered, dict):
        return ""
    # A model folder is data from elsewhere: what it says is shown, and must stay one line.
    return " ".join(f"{offered.get('package')} {offered.get('version')}".split())


def parse_document(document: dict[str, Any], path: Path) -> ModelDocument:
    """Check the fields that every model has; raise `ModelError` with the first one that is wrong."""
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


def read_tensors(file: Path) -> State:
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


def fingerprint_of(weights: Path, document: dict[str, Any]) -> str:
    """Return sha256 over the weights' file, the card and the model's config."""
    digest = hashlib.sha256(weights.read_bytes())
    parts = [document["card"], document["model"]]
    # Only where there is one, so that folders from before there were intervals keep their fingerprint.
    if document.get("calibration"):
        parts.append(document["calibration"])
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()


def is_model(path: Path) -> bool:
    """Tell whether a folder is a model of ours, whatever its version."""
    config = path / CONFIG
    try:
        # A name with NUL, or longer than the file system allows, is no model.
        if not config.is_file():
            return False
        document = _read_json(config)
    except (ModelError, OSError, ValueError):
        return False
    return isinstance(document, dict) and document.get("spec") == SPEC_NAME
