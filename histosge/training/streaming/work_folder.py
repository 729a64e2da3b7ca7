"""What a streamed training keeps on disk while it runs, beside the model's folder: one file for each section and pass.

A file is written whole or not at all, so what is there is finished; a run that was interrupted takes it from there.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from featurestore.whole_file import whole_file
from histosge.errors import ModelError

FORMAT = 1
"""Raised when files of an earlier version would be misread: they are made anew then."""
KEY = "made_with.json"

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class WorkFolder:
    """A folder of arrays."""

    path: Path

    @classmethod
    def open(cls, model: str | Path, made_with: Mapping[str, Any]) -> Self:
        """Open the work folder of a model; one of other settings or inputs is emptied.

        Raises
        ------
        ModelError
            If it cannot be written.
        """
        path = Path(model).with_name(f".{Path(model).name}.streamed")
        record = json.dumps({"format": FORMAT} | dict(made_with), sort_keys=True, default=str)
        try:
            if (path / KEY).is_file() and (path / KEY).read_text() == record:
                return cls(path)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
            (path / KEY).write_text(record)
        except OSError as error:
            raise ModelError(
                f"cannot write {path}: {error.strerror or error}; give another MODEL, on a disk with space"
            ) from error
        return cls(path)

    def has(self, name: str) -> bool:
        """Tell whether arrays of a name are there."""
        return self._file(name).is_file()

    def save(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Write arrays, whole or not at all.

        Raises
        ------
        ModelError
            If the disk is full, or does not let it.
        """
        try:
            with whole_file(self._file(name)) as partial, partial.open("wb") as stream:
                np.savez(stream, allow_pickle=False, **arrays)
        except OSError as error:
            raise ModelError(
                f"cannot write {self._file(name)}: {error.strerror or error}; make space, and run the same command again"
            ) from error

    def load(self, name: str) -> Arrays:
        """Read arrays."""
        with np.load(self._file(name), allow_pickle=False) as found:
            return {key: found[key] for key in found.files}

    def load_one(self, name: str, key: str) -> NDArray[Any]:
        """Read one array of several, and not the others."""
        with np.load(self._file(name), allow_pickle=False) as found:
            return np.asarray(found[key])

    def new_map(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """Return a new array on disk, float32."""
        return np.lib.format.open_memmap(self.path / f"{name}.npy", mode="w+", dtype=np.float32, shape=shape)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npz"
