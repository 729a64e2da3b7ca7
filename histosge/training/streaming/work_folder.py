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

FORMAT = 2
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

    def new_columns(self, name: str, shape: tuple[int, int]) -> "ColumnsOnDisk":
        """Return a new array on disk, float32, of which some columns are read at a time."""
        return ColumnsOnDisk(self.path / f"{name}.columns", shape)

    def remove(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npz"


class ColumnsOnDisk:
    """A float32 array ``(n_rows, n_columns)`` in a file, column after column.

    It is read and written, and not mapped into memory: pages of a map stay resident, and would count as memory that grows
    with the cohort.

    Parameters
    ----------
    file
        To write.
    shape
        ``(n_rows, n_columns)``.
    """

    def __init__(self, file: Path, shape: tuple[int, int]) -> None:
        self.file, self.shape = file, shape
        with file.open("wb") as stream:
            stream.truncate(4 * shape[0] * shape[1])

    def __len__(self) -> int:
        return self.shape[0]

    def write(self, start: int, columns: range, values: NDArray[np.float32]) -> None:
        """Write ``(n, len(columns))`` values from a row on."""
        try:
            with self.file.open("r+b") as stream:
                for column, part in zip(columns, np.ascontiguousarray(values.T), strict=True):
                    stream.seek(4 * (column * self.shape[0] + start))
                    stream.write(part.astype(np.float32, copy=False).tobytes())
        except OSError as error:
            raise ModelError(
                f"cannot write {self.file}: {error.strerror or error}; make space, and run the same command again"
            ) from error

    def __getitem__(self, index: tuple[slice, slice | NDArray[np.int64]]) -> NDArray[np.float32]:
        """Return all rows of some columns."""
        rows, which = index
        assert rows == slice(None)
        columns = range(self.shape[1])[which] if isinstance(which, slice) else which.tolist()
        found = np.empty((len(columns), self.shape[0]), np.float32)
        with self.file.open("rb") as stream:
            for place, column in enumerate(columns):
                stream.seek(4 * column * self.shape[0])
                found[place] = np.frombuffer(stream.read(4 * self.shape[0]), np.float32)
        return found.T
