"""A folder that zarr writes is removed whole where one of several writes was refused."""

import errno
import time
from pathlib import Path
from typing import Any

import pytest
import zarr
from zarr.storage import _local

from histosge.exporting.whole_zarr_folder import whole_zarr_folder


def test_a_write_that_ends_after_another_was_refused_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, ended = _local._put, list[str]()

    def refused_or_late(path: Path, *arguments: Any, **options: Any) -> int:
        if path.name == ".zgroup":
            raise OSError(errno.ENOSPC, "no room")
        # Longer than it takes to remove the folder: too short a time would only hide the fault.
        time.sleep(0.3)
        written = put(path, *arguments, **options)
        ended.append(path.name)
        return written

    monkeypatch.setattr(_local, "_put", refused_or_late)
    with pytest.raises(OSError, match="no room"), whole_zarr_folder(tmp_path / "a.zarr") as partial:
        zarr.open_group(partial, mode="w", zarr_format=2)
    assert ended == [".zattrs"]
    assert list(tmp_path.iterdir()) == []
