"""Weights files: read without running anything in them, hashed, and fitted into a network or refused."""

import hashlib
from pathlib import Path
from typing import Any

import torch

from featurestore.encoders.state_layouts import State, to_timm
from featurestore.errors import EncoderError, first_line

NESTED = ("state_dict", "model", "teacher")
"""Training scripts put the state dict one level down, beside the optimiser's."""
WRAPPERS = ("module.", "backbone.")
"""Put before names by torch's DistributedDataParallel and by DINO's training code."""


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def check_sha256(path: Path, expected: str | None, what: str) -> str:
    """Return a file's sha256, after comparing it with the first digits of the published one.

    Raises
    ------
    EncoderError
        If it is another file; both are shown.
    """
    found = file_sha256(path)
    if expected is not None and not found.startswith(expected):
        raise EncoderError(
            f"{path.name} of {what} has sha256 {found[: len(expected)]}..., published is {expected}...: the file is "
            "damaged or another; remove it and load it again, or give it as --weights FILE to use it all the same"
        )
    return found


def read_state(path: Path) -> State:
    """Read a ``.safetensors`` file, or a state dict that torch wrote; no code in it is run.

    Raises
    ------
    EncoderError
        If there is no file, or it holds no state dict.
    """
    from safetensors.torch import load_file

    if not path.is_file():
        raise EncoderError(f"there is no weights file at {path}")
    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        # `weights_only`, as a pickle may hold code. Mapped, so that a tensor is read when it is copied into the network.
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:
        reason = first_line(error)
        raise EncoderError(
            f"{path.name} cannot be read as weights ({reason}); give a .safetensors file or a state dict "
            "that torch.save wrote"
        ) from error
    if isinstance(state, dict):
        state = next((state[name] for name in NESTED if isinstance(state.get(name), dict)), state)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise EncoderError(
            f"{path.name} holds no state dict (name -> tensor); save model.state_dict() instead"
        )
    return state


def _is_zip(path: Path) -> bool:
    # Files of torch before 1.6 are no zip archives, and cannot be mapped into memory.
    with path.open("rb") as stream:
        return stream.read(2) == b"PK"


def load_weights(model: Any, path: Path, layout: str = "timm") -> None:
    """Put a file's weights into a network that timm built without a classifier.

    Raises
    ------
    EncoderError
        If they do not fit; the first tensor that differs is named, with both shapes.
    """
    state = to_timm(_without_wrapper(read_state(path)), layout)
    own = model.state_dict()
    # The network has no classifier; a file of the whole model still has one, and DINO's training heads.
    config = getattr(model, "default_cfg", {})
    heads = tuple(
        f"{name}." for name in {"head", "dino_head", "ibot_head", config.get("classifier") or "head"}
    )
    unused = ("mask_token", *heads)
    state = {key: value for key, value in state.items() if key in own or not key.startswith(unused)}
    # By hand, not by `load_state_dict(strict=True)`, whose message lists every tensor of a foreign file.
    for key in sorted(set(own) | set(state)):
        mine, theirs = own.get(key), state.get(key)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            shapes = [tuple(t.shape) if t is not None else "absent" for t in (mine, theirs)]
            raise EncoderError(
                f"{path.name} does not fit {type(model).__name__}: {key} is {shapes[0]} here and {shapes[1]} in the file"
            )
    model.load_state_dict(state)


def _without_wrapper(state: State) -> State:
    for prefix in WRAPPERS:
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
