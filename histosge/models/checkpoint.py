"""What an interrupted training goes on from: weights, optimiser and random state after a complete epoch.

One file beside the model that is being trained, replaced whole, gone when the model is saved. It is used only
by a repeat of the same training: other data, genes, seed, epochs, versions or another kind of processor start over.

Terms
    key    digest of all that decides the result of a training
    loop   the loop over epochs of a model that iterates: `restore` before it, `save` after each epoch
"""

import hashlib
import json
import pickle
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurestore.whole_file import whole_file
from histosge.data.sections import TrainingSection

if TYPE_CHECKING:
    import torch

SHARE = 0.1
"""Of the time of training that writing may take: epochs shorter than that allows are not all written."""


@dataclass
class Checkpoint:
    """The file of one training.

    Parameters
    ----------
    path
        Where it is.
    key
        Of this training, see `training_key`.
    """

    path: Path
    key: str
    _cost_s: float = field(default=0.0, init=False)
    _written: float = field(default=-np.inf, init=False)

    def restore(
        self, network: "torch.nn.Module", optimiser: "torch.optim.Optimizer", rng: np.random.Generator
    ) -> int:
        """Bring a loop to where it was; return the number of complete epochs, 0 if there is nothing to go on from."""
        import torch

        try:
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
            return 0  # none there, or torn: starting over is right
        # Half from one kind of processor and half from another would be the result of neither.
        mine = {"key": self.key, "device": _device(network)}
        if not isinstance(saved, dict) or any(saved.get(name) != value for name, value in mine.items()):
            return 0
        network.load_state_dict(saved["network"])
        optimiser.load_state_dict(saved["optimiser"])
        rng.bit_generator.state = json.loads(saved["rng"])
        return int(saved["epochs"])

    def save(
        self,
        epochs: int,
        network: "torch.nn.Module",
        optimiser: "torch.optim.Optimizer",
        rng: np.random.Generator,
    ) -> None:
        """Write the state after so many complete epochs, unless writing would take more than `SHARE` of the time."""
        import torch

        start = time.monotonic()
        if start - self._written < self._cost_s / SHARE:
            return
        state = {
            "key": self.key,
            "epochs": epochs,
            "device": _device(network),
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "rng": json.dumps(rng.bit_generator.state),
        }
        with whole_file(self.path, sweep=True) as partial:
            torch.save(state, partial)
        self._written = time.monotonic()
        self._cost_s = self._written - start


def _device(network: "torch.nn.Module") -> str:
    return next(network.parameters()).device.type


def training_key(facts: dict[str, Any], sections: list[TrainingSection]) -> str:
    """Return sha256 over settings, versions and what is learned from.

    Parameters
    ----------
    facts
        JSON-ready: preset, genes, epochs, seed, fingerprints of slides and encoder.
    sections
        Their targets, positions and overlaps are read; embeddings are known by the fingerprints in `facts`.
    """
    digest = hashlib.sha256(json.dumps([facts, version("torch")], sort_keys=True).encode())
    for section in sections:
        overlap = section.overlap
        for array in (section.target, section.spot_xy_um, overlap.data, overlap.indices, overlap.indptr):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
