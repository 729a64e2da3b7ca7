"""Any timm vision model as an encoder, by name: ``timm:vit_small_patch16_224``.

Preprocessing is a fixed list of steps, batched in torch on the device, and part of the identity:
scale to [0, 1], resize to the model's input, normalise. Pooling is the model's own (``num_classes=0``).
"""

import hashlib
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from featurestore.encoder import TIMM_PREFIX, EncoderIdentity, EncoderOptions
from featurestore.encoders.device import pick_device
from featurestore.errors import EncoderError

CHUNK = 16
"""Patches in one forward pass; the last is padded, so that a vector does not depend on the batch."""
RANDOM_SEED = 0

_keep_alive: list[Any] = []


def _mend_torchvision() -> None:
    """Define the operator schemas that a CUDA build of torchvision misses beside a CPU build of torch.

    Its compiled operators cannot load there, and two registrations on import are unguarded; timm needs the import.
    """
    if torch.version.cuda is not None or _keep_alive:
        return
    library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        try:
            library.define(schema)
        except RuntimeError:
            continue  # a CPU build of torchvision has defined it
    _keep_alive.append(library)


def _import_timm() -> Any:
    _mend_torchvision()
    try:
        import timm
    except ImportError as error:
        raise EncoderError(f"timm cannot be imported ({error}); install it with: pip install timm") from error
    return timm


class TimmEncoder:
    """A timm model behind the `Encoder` protocol.

    Parameters
    ----------
    key
        ``timm:`` and the model's name.
    options
        `weights` names a local ``.safetensors`` or ``.pth`` file; `random_weights` seeds them.

    Raises
    ------
    EncoderError
        If the name is unknown, no weights were given, or they do not fit.
    """

    def __init__(self, key: str, options: EncoderOptions) -> None:
        timm = _import_timm()
        name = key.removeprefix(TIMM_PREFIX)
        if not timm.is_model(name):
            near = get_close_matches(name, timm.list_models(), n=3)
            raise EncoderError(
                f"timm has no model {name!r}; near: {', '.join(near) or 'see timm.list_models()'}"
            )
        if options.weights is None and not options.random_weights:
            raise EncoderError(
                f"{key} needs weights: give --weights FILE, or --random-weights to try the machinery only"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_SEED)
            model = timm.create_model(name, pretrained=False, num_classes=0)
        weights = f"random seed {RANDOM_SEED}"
        if options.weights is not None:
            weights = _load_weights(model, Path(options.weights))
        config = timm.data.resolve_model_data_config(model)
        self._device = pick_device(options.device)
        self._model = model.eval().to(self._device)
        self._side = int(config["input_size"][-1])
        self._interpolation = "bilinear" if config["interpolation"] == "bilinear" else "bicubic"
        self._mean = torch.tensor(config["mean"], device=self._device).view(1, 3, 1, 1)
        self._std = torch.tensor(config["std"], device=self._device).view(1, 3, 1, 1)
        steps = [
            "scale to [0, 1]",
            f"resize to {self._side} px, {self._interpolation}, antialias, when the patch has another side",
            f"normalise mean {list(config['mean'])} std {list(config['std'])}",
        ]
        self._identity = EncoderIdentity(
            key,
            int(model.num_features),
            {
                "architecture": name,
                "weights": weights,
                "pooling": "timm default",
                "steps": steps,
                "dtype": "float32",
            },
        )

    @property
    def identity(self) -> EncoderIdentity:
        """What this encoder is."""
        return self._identity

    @torch.inference_mode()
    def encode(self, patches: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Encode a batch, ``(n, height, width, 3)`` -> ``(n, dim)``."""
        out = np.empty((len(patches), self._identity.dim), np.float32)
        for start in range(0, len(patches), CHUNK):
            chunk = patches[start : start + CHUNK]
            padded = np.zeros((CHUNK, *patches.shape[1:]), np.uint8)
            padded[: len(chunk)] = chunk
            vectors = self._model(self._prepare(torch.from_numpy(padded).to(self._device)))
            out[start : start + len(chunk)] = vectors[: len(chunk)].float().cpu().numpy()
        return out

    def _prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.permute(0, 3, 1, 2).float() / 255
        if tuple(x.shape[-2:]) != (self._side, self._side):
            x = interpolate(x, (self._side, self._side), mode=self._interpolation, antialias=True).clamp(0, 1)
        return (x - self._mean) / self._std


def _read_state(path: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EncoderError(
            f"{path.name} cannot be read as weights ({reason}); give a .safetensors file or a state dict "
            "that torch.save wrote"
        ) from error
    if isinstance(state, dict):
        # Training scripts put the state dict one level down, beside the optimiser's.
        state = next(
            (state[name] for name in ("state_dict", "model") if isinstance(state.get(name), dict)), state
        )
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise EncoderError(
            f"{path.name} holds no state dict (name -> tensor); save model.state_dict() instead"
        )
    return state


def _load_weights(model: Any, path: Path) -> str:
    """Load a state dict, and return its file's sha256."""
    if not path.is_file():
        raise EncoderError(f"there is no weights file at {path}")
    state = _read_state(path)
    own = model.state_dict()
    # num_classes=0 took the classifier away; a file of the whole model still has one.
    classifier = tuple(f"{name}." for name in {"head", model.default_cfg.get("classifier", "head")})
    state = {key: value for key, value in state.items() if key in own or not key.startswith(classifier)}
    for key in sorted(set(own) | set(state)):
        mine, theirs = own.get(key), state.get(key)
        if mine is None or theirs is None or mine.shape != theirs.shape:
            shapes = [tuple(t.shape) if t is not None else "absent" for t in (mine, theirs)]
            raise EncoderError(
                f"{path.name} does not fit {type(model).__name__}: {key} is {shapes[0]} here and {shapes[1]} in the file"
            )
    model.load_state_dict(state)
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while data := stream.read(1 << 20):
            digest.update(data)
    return f"sha256 {digest.hexdigest()}"
