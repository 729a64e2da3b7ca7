import errno
from pathlib import Path

import h5py
import numpy as np
import pytest

from featurestore.exchange import hdf5_file
from featurestore.exchange.hdf5_file import whole_hdf5

VALUES = np.random.default_rng(0).random((1009, 31))


def _write(path: Path) -> None:
    with whole_hdf5(path) as opened:
        data = opened.file.create_dataset(
            "values", shape=VALUES.shape, dtype="f8", chunks=(101, 31), compression="gzip"
        )
        for start in range(0, len(VALUES), 101):
            opened.check()
            data[start : start + 101] = VALUES[start : start + 101]
        opened.file.attrs["unit"] = "µm"


def test_what_is_written_is_read_by_hdf5_itself(tmp_path: Path) -> None:
    _write(tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5") as file:
        np.testing.assert_array_equal(file["values"][:], VALUES)
        assert file.attrs["unit"] == "µm"
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]


@pytest.mark.parametrize("room", [0, 1, 800, 4097, 100_003, 190_000])
def test_wherever_the_disk_is_full_the_system_s_error_comes_out(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class SmallDisk(hdf5_file._Device):
        """Takes as many bytes as there is room for, in parts, as a disk does."""

        def _write_all(self, view: memoryview) -> None:
            fits = max(0, min(len(view), room - self._position))
            super()._write_all(view[:fits])
            if fits < len(view):
                raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hdf5_file, "_Device", SmallDisk)
    (tmp_path / "a.h5").write_text("the earlier one")
    with pytest.raises(OSError, match="No space left") as refused:
        _write(tmp_path / "a.h5")
    assert refused.value.errno == errno.ENOSPC
    assert [path.name for path in tmp_path.iterdir()] == ["a.h5"]
    assert (tmp_path / "a.h5").read_text() == "the earlier one"


def test_an_error_of_the_caller_stays_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), whole_hdf5(tmp_path / "a.h5"):
        raise KeyError("mine")
    assert not any(tmp_path.iterdir())
