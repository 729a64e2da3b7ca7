"""Arrays that stay in memory lie outside of malloc's heap."""

import mmap

import numpy as np
import pytest

from histosge.data.own_pages import MIN_BYTES, in_own_pages

N = MIN_BYTES // 2


@pytest.mark.parametrize("dtype", ["float16", ">f2", "float32"])
def test_a_large_array_is_copied_to_pages_of_its_own(dtype: str) -> None:
    values = np.arange(N, dtype=dtype).reshape(-1, 2, 64)[::-1]
    found = in_own_pages(values)
    np.testing.assert_array_equal(found, values)
    assert (found.dtype, found.shape) == (values.dtype, values.shape)
    assert found.flags.writeable
    assert not np.shares_memory(found, values)
    base = found
    while isinstance(base, np.ndarray):
        base = base.base  # type: ignore[assignment]
    owner = base.obj if isinstance(base, memoryview) else base
    assert isinstance(owner, mmap.mmap)


def test_a_small_array_and_one_that_cannot_be_mapped_are_copied_as_usual(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = np.arange(11, dtype=np.float16)
    empty = np.empty((0, 5), np.float16)
    assert in_own_pages(empty).shape == (0, 5)

    def refused(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    for values in (small, np.arange(N, dtype=np.float16)):
        found = in_own_pages(values)
        np.testing.assert_array_equal(found, values)
        assert not np.shares_memory(found, values)
