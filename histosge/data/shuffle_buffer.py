"""Memory in which patches of many blocks lie shuffled, and the batches that are cut from it.

Whoever has read a block puts its patches straight to the places that chance gave them, so a batch is a piece of
the pool as it lies there: nothing is gathered again.

Terms
    place   where in the pool a patch belongs; planned patches that turn out to have no embedding leave a gap
    lent    part of a batch that somebody still holds: such a pool is not written to again
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

_NOBODY_ELSE = 2
"""References to an array that only its pool holds: the pool's, and the counting's own."""
_MOVED_AT_ONCE = 4096


class Batch(NamedTuple):
    """Some patches, in the order in which they were drawn.

    Parameters
    ----------
    slide
        Index into `Loader.slide_ids`, ``(n,)``.
    rows, cols
        Places on that slide's grid, ``(n,)``.
    embedding
        ``(n, dim)`` as stored (float16), without NaN.
    """

    slide: NDArray[np.int64]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    embedding: NDArray[np.float16]


@dataclass
class Pool:
    """A bounded number of patches.

    Parameters
    ----------
    slide, rows, cols, embedding
        As in `Batch`, ``(capacity, ...)``.
    """

    slide: NDArray[np.int64]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    embedding: NDArray[Any]

    @classmethod
    def empty(cls, capacity: int, dim: int, dtype: np.dtype[Any]) -> Self:
        """Make a pool that holds anything."""
        slide, rows, cols = (np.empty(capacity, np.int64) for _ in range(3))
        return cls(slide, rows, cols, np.empty((capacity, dim), dtype))

    @property
    def is_lent(self) -> bool:
        """Whether somebody holds a view of the embeddings."""
        return sys.getrefcount(self.embedding) > _NOBODY_ELSE

    def put(
        self,
        places: NDArray[np.int64],
        slide: int,
        at: tuple[NDArray[np.int64], NDArray[np.int64]],
        values: NDArray[Any],
    ) -> None:
        """Lay patches of one slide, at ``(rows, cols)``, to their places; several threads may."""
        self.slide[places], self.rows[places], self.cols[places] = slide, *at
        # A row as one item of so many bytes: numpy then copies rows, and asks nothing of what is in them.
        row = np.dtype((np.void, values.shape[1] * values.itemsize))
        self.embedding.view(row)[:, 0][places] = np.ascontiguousarray(values).view(row)[:, 0]

    def close_gaps(self, size: int, gaps: NDArray[np.int64]) -> int:
        """Move patches up to where none came, in their order; return how many of `size` places are filled."""
        filled = np.ones(size, bool)
        filled[gaps] = False
        there = np.flatnonzero(filled)
        first = int(gaps.min()) if len(gaps) else size
        for start in range(first, len(there), _MOVED_AT_ONCE):
            source = there[start : start + _MOVED_AT_ONCE]
            for array in (self.slide, self.rows, self.cols, self.embedding):
                array[start : start + len(source)] = array[source]
        return len(there)

    def view(self, start: int, stop: int) -> Batch:
        """Return patches as they lie there: the embeddings are not copied."""
        some = slice(start, stop)
        return Batch(
            self.slide[some].copy(), self.rows[some].copy(), self.cols[some].copy(), self.embedding[some]
        )


class BatchCutter:
    """Cuts a sequence of pools into batches of one size.

    The last batch from a pool is copied: whoever asks for the next one with that still in hand does not keep the
    pool from being filled again.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._begun: list[Batch] = []

    def cut(self, pool: Pool, filled: int) -> Iterator[Batch]:
        """Yield the batches that the first `filled` patches of a pool complete."""
        start = 0
        while start < filled:
            held = sum(len(part.rows) for part in self._begun)
            stop = min(start + self._size - held, filled)
            if held or filled - stop < self._size:
                self._keep(pool.view(start, stop))
                if held + stop - start == self._size:
                    yield self._joined()
            else:
                yield pool.view(start, stop)
            start = stop

    def rest(self) -> Iterator[Batch]:
        """Yield what is left, if anything."""
        if self._begun:
            yield self._joined()

    def _keep(self, part: Batch) -> None:
        self._begun.append(part._replace(embedding=part.embedding.copy()))

    def _joined(self) -> Batch:
        parts, self._begun = self._begun, []
        return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
