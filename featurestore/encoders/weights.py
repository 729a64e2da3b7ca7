"""Weights files: read without running anything in them, hashed, and fitted into a network or refused."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from featurestore.encoders.positions import published_shape, resample_positions
from featurestore.encoders.records import Positions
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


@dataclass(frozen=True)
class Misfit:
    """The first tensor, by name, that is not the same in a network and in a file.

    Parameters
    ----------
    name
        Of the tensor, as the network calls it.
    here, there
        Shapes in the network as it is published, and in the file; None where it is absent.
    """

    name: str
    here: tuple[int, ...] | None
    there: tuple[int, ...] | None


def fit_state(
    model: Any, raw: State, layout: str = "timm", positions: Positions | None = None
) -> tuple[State, Misfit | None]:
    """Bring a file's tensors into a network's names and shapes.

    Parameters
    ----------
    model
        That timm built without a classifier; on the meta device, too.
    raw
        Of the file.
    layout
        One of `state_layouts.LAYOUTS`.
    positions
        Of the published table of positions, where it is not that of the network.

    Returns
    -------
    tuple
        The tensors, and the first that does not fit; None if all of them do, and none is missing.
    """
    state = to_timm(_without_wrapper(raw), layout)
    own = model.state_dict()
    # The network has no classifier; a file of the whole model still has one, and DINO's training heads.
    config = getattr(model, "default_cfg", {})
    heads = tuple(
        f"{name}." for name in {"head", "dino_head", "ibot_head", config.get("classifier") or "head"}
    )
    unused = ("mask_token", *heads)
    state = {key: value for key, value in state.items() if key in own or not key.startswith(unused)}
    # Files of torch before 0.4.1 lack these counters, as do converted ones; evaluation does not read them.
    state |= {key: own[key] for key in own.keys() - state.keys() if key.endswith(".num_batches_tracked")}
    shapes = {key: tuple(tensor.shape) for key, tensor in own.items()}
    if positions is not None and "pos_embed" in shapes:
        shapes["pos_embed"] = published_shape(shapes["pos_embed"], positions)
    # By hand, not by `load_state_dict(strict=True)`, whose message lists every tensor of a foreign file.
    for key in sorted(set(shapes) | set(state)):
        found = Misfit(key, shapes.get(key), tuple(state[key].shape) if key in state else None)
        if found.here != found.there:
            return state, found
    if positions is not None and "pos_embed" in own:
        state["pos_embed"] = resample_positions(state["pos_embed"], own["pos_embed"].shape[1], positions)
    return state, None


def load_weights(
    model: Any,
    path: Path,
    layout: str = "timm",
    positions: Positions | None = None,
    hint: Callable[[State], str] = lambda raw: "",
    change: Callable[[State], State] = lambda raw: raw,
) -> None:
    """Put a file's weights into a network: all of its tensors, or none.

    Parameters
    ----------
    hint
        Called with the file's tensors when they do not fit; what it returns ends the message.
    change
        Called with the file's tensors before they are renamed, such as `Adapter.apply`.
    model, path, layout, positions
        As of `fit_state`, and the file.

    Raises
    ------
    EncoderError
        If they do not fit; the first tensor that differs is named, with both shapes.
    """
    raw = change(read_state(path))
    state, misfit = fit_state(model, raw, layout, positions)
    if misfit is not None:
        here, there = ("absent" if shape is None else shape for shape in (misfit.here, misfit.there))
        raise EncoderError(
            f"{path.name} does not fit {type(model).__name__}: {misfit.name} is {here} here and {there} in the file"
            f"{hint(raw)}"
        )
    model.load_state_dict(state)


def _without_wrapper(state: State) -> State:
    for prefix in WRAPPERS:
        if any(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
