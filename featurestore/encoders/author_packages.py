"""Encoders whose authors publish a loader of their own: imported only when such an encoder is used."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featurestore.encoders.records import EncoderRecord
from featurestore.errors import EncoderError, first_line

Network = Callable[[Tensor], Tensor]

_HINTS = {
    "conch": "pip install git+https://github.com/mahmoodlab/CONCH",
    "transformers": "pip install transformers einops einops-exts",
}


def load_package(record: EncoderRecord, weights: Path, device: torch.device) -> Network:
    """Load the network of a record by its authors' package.

    Raises
    ------
    EncoderError
        If the package is not installed, or cannot load the weights.
    """
    module = _import(record)
    try:
        return _LOADERS[record.package](module, record, weights, device)
    except Exception as error:  # other people's loaders: whatever they raise, it is one line with the key
        reason = first_line(error)
        raise EncoderError(
            f"{record.package} cannot load {record.key} from {weights.name}: {reason}"
        ) from error


def missing_package(record: EncoderRecord) -> str:
    """Return how to install what a record needs besides timm; empty if it is here."""
    try:
        _import(record)
    except EncoderError as error:
        return str(error)
    return ""


def _import(record: EncoderRecord) -> Any:
    try:
        return import_module("conch.open_clip_custom" if record.package == "conch" else record.package)
    except ImportError as error:
        raise EncoderError(
            f"{record.key} is loaded by its authors' way through {record.package!r}, which is not installed: "
            f"{_HINTS[record.package]}"
        ) from error


def _conch(module: Any, record: EncoderRecord, weights: Path, device: torch.device) -> Network:
    model, _ = module.create_model_from_pretrained("conch_ViT-B-16", checkpoint_path=str(weights))
    model = model.eval().to(device)
    # Before the projection into the space shared with text, as the authors advise for image tasks.
    return lambda images: model.encode_image(images, proj_contrast=False, normalize=False)


def _conch_v1_5(module: Any, record: EncoderRecord, weights: Path, device: torch.device) -> Network:
    if record.published is None:
        raise EncoderError(f"{record.key} has no repository to load its code from")
    # The loader takes a repository, not a file: another file could not be used, only ignored.
    if weights.name != record.published.file:
        raise EncoderError(
            f"its code takes {record.published.file} from its own repository; leave --weights out"
        )
    # Its code is in the repository and loads the file beside it; the pinned revision fixes both.
    whole, report = module.AutoModel.from_pretrained(
        record.published.repository,
        revision=record.published.revision,
        trust_remote_code=True,
        output_loading_info=True,
    )
    # transformers warns about these and gives them random numbers.
    unfilled = sorted(report["missing_keys"])
    if unfilled:
        raise EncoderError(
            f"{len(unfilled)} tensors have no weights in its files, the first is {unfilled[0]}"
        )
    model, _ = whole.return_conch()
    network: Network = model.eval().to(device)
    return network


_LOADERS: dict[str, Callable[[Any, EncoderRecord, Path, torch.device], Network]] = {
    "conch": _conch,
    "transformers": _conch_v1_5,
}
