"""A model of somebody else's: a module with the members of the protocol and nothing of ours in it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from histosge.heldout.metric_registry import METRICS
from histosge.models.registry import MODELS

SOURCE = """
import numpy as np


class Line:
    "Least squares from the embedding under a spot to genes."

    name = "line"
    halo_um = 0.0

    def __init__(self, weight, offset):
        self.weight, self.offset = weight, offset

    @classmethod
    def fit(cls, sections, *, seed=0, epochs=None):
        X = np.concatenate([s.overlap @ s.patches.embedding for s in sections])
        Y = np.concatenate([s.target for s in sections])
        x, y = X.mean(axis=0), Y.mean(axis=0)
        weight = np.linalg.solve((X - x).T @ (X - x) + np.eye(X.shape[1]), (X - x).T @ (Y - y))
        return cls(weight, y - x @ weight)

    def predict(self, patches):
        return np.maximum(patches.embedding @ self.weight + self.offset, 0).astype(np.float32)

    def config(self):
        return {}

    def state(self):
        return {"weight": self.weight, "offset": self.offset}

    @classmethod
    def from_state(cls, config, state):
        return cls(state["weight"], state["offset"])


class Other(Line):
    name = "other"


class Half:
    "An object that fits models: half the spots of every section."

    name = "half"

    def fit(self, sections, *, seed=0, epochs=None):
        return Line.fit([s.subset(np.arange(len(s.target)) % 2 == 0) for s in sections])


class Nothing:
    pass
"""
RECORD = """

from histosge.heldout.metric_registry import Metric
from histosge.models.registry import ModelRecord

WORST = Metric("worst", "Largest absolute error.", lambda t, p, spots: np.abs(t - p).max(axis=0), "largest error")
RECORD = ModelRecord("line", "Least squares, by somebody else.", lambda: Line)
"""
PACKAGE, VERSION = "line-models", "1.7"


def write_module(folder: Path, name: str) -> None:
    """Write the module into a folder."""
    (folder / f"{name}.py").write_text(SOURCE)


@contextmanager
def installed(monkeypatch: pytest.MonkeyPatch, folder: Path, name: str) -> Iterator[None]:
    """Install the module, as pip would: it offers the model ``line`` and the metric ``worst``. Gone at the end."""
    (folder / f"{name}.py").write_text(SOURCE + RECORD)
    info = folder / f"{name}-{VERSION}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
    (info / "entry_points.txt").write_text(
        f"[histosge.models]\nline = {name}:RECORD\n\n[histosge.metrics]\nworst = {name}:WORST\n"
    )
    with monkeypatch.context() as patched:
        patched.syspath_prepend(folder)
        _look_again()
        try:
            yield
        finally:
            _look_again()


def _look_again() -> None:
    """Let registries look for packages anew: they do it once in a process."""
    for registry in (MODELS, METRICS):
        registry.__dict__.pop("offered", None)
