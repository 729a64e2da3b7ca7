"""Checkpoints of an interrupted training: weights, optimiser and random state after a complete epoch.

One file beside the model that is being trained, replaced whole, removed when the model is saved. It is used only
by a repeat of the same training: other data, genes, seed, epochs, versions or another kind of processor start over.

Terms
    key   digest of everything that decides the result of a training
    loop  the loop over epochs of a model that iterates: `restore` before it, `save` after each epoch
"""

import hashlib
import json
import pickle
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featurestore.software import version
from featurestore.whole_file import whole_file
from histosge.data.sections import TrainingSection

if TYPE_CHECKING:
    import torch

MAX_TIME_SHARE = 0.1
"""Share of the time of training that writing may take: where epochs are short, not all of them are written."""


@dataclass
class Checkpoint:
    """The file of one training.

    Parameters
    ----------
    path
        Where it is.
    key
        Digest of this training, see `training_key`.
    """

    path: Path
    key: str
    _cost_s: float = field(default=0.0, init=False)
    _written: float = field(default=-np.inf, init=False)

    def numbered(self, i: int) -> "Checkpoint":
        """Return a checkpoint of one of several trainings, in a file of its own beside this one."""
        return Checkpoint(self.path.with_name(f"{self.path.name}-{i}"), f"{self.key}-{i}")

    def restore(
        self, network: "torch.nn.Module", optimiser: "torch.optim.Optimizer", rng: np.random.Generator
    ) -> int:
        """Restore the state of a loop in place, and return the number of complete epochs: 0 if there is no checkpoint."""
        import torch

        try:
            # Tensors and plain values only: a file is data, and must not run code when it is read.
            saved = torch.load(self.path, map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
            return 0  # absent, or cut off: start over
        # Epochs on a CPU followed by epochs on a GPU would give the bits of neither.
        expected = {"key": self.key, "device": _device(network)}
        if not isinstance(saved, dict) or any(saved.get(name) != value for name, value in expected.items()):
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
        """Write the state after a number of complete epochs, unless writing takes more than `MAX_TIME_SHARE` of the time."""
        import torch

        start = time.monotonic()
        if start - self._written < self._cost_s / MAX_TIME_SHARE:
            return
        state = {
            "key": self.key,
            "epochs": epochs,
            "device": _device(network),
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "rng": json.dumps(rng.bit_generator.state),
        }
        # Written beside and renamed, so that an interruption leaves the checkpoint before it.
        with whole_file(self.path, sweep=True) as partial:
            torch.save(state, partial)
        self._written = time.monotonic()
        self._cost_s = self._written - start


def _device(network: "torch.nn.Module") -> str:
    return next(network.parameters()).device.type


def training_key(facts: dict[str, Any], sections: list[TrainingSection]) -> str:
    """Return sha256 over settings, versions and training data.

    Parameters
    ----------
    facts
        JSON-ready: preset, genes, epochs, seed, fingerprints of slides and encoder.
    sections
        Their targets, positions and overlaps are hashed; embeddings are known by the fingerprints in `facts`.
    """
    # Another release of torch may compute other bits, so its checkpoints are not mixed.
    digest = hashlib.sha256(json.dumps([facts, version("torch")], sort_keys=True).encode())
    for section in sections:
        overlap = section.overlap
        for array in (section.target, section.spot_xy_um, overlap.data, overlap.indices, overlap.indptr):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
