"""Memory in which patches of many blocks lie shuffled, and the batches that are cut from it.

The thread that has read a block writes its patches straight to their random places. A batch is then a slice of the
buffer, and nothing is gathered a second time.

Terms
    place   row of the buffer that a patch is written to; planned patches without an embedding leave theirs empty
    loan    a buffer from when it is lent until it was released and nobody holds a piece of its embeddings any more
"""

import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

# One buffer is drawn from while another is filled. What is returned beyond that is given back to the system.
_IDLE_BUFFERS = 2
# Rows that are copied at a time. numpy copies them to a temporary array first: 8 MB with 1,024 float16 features.
_ROWS_PER_MOVE = 4096


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
class PatchBuffer:
    """Room for a fixed number of patches, lent by a `BufferPool`.

    Parameters
    ----------
    slide, rows, cols, embedding
        As in `Batch`, ``(capacity, ...)``.
    """

    slide: NDArray[np.int64]
    rows: NDArray[np.int64]
    cols: NDArray[np.int64]
    embedding: NDArray[Any]

    def release(self) -> None:
        """Return the buffer: it is lent again once no batch of it is held any more. It must not be used after this."""
        # Deleted here, not where the last variable ends: a thread that has just filled the buffer still holds it.
        del self.embedding

    def put(
        self,
        places: NDArray[np.int64],
        slide: int,
        at: tuple[NDArray[np.int64], NDArray[np.int64]],
        values: NDArray[Any],
    ) -> None:
        """Write patches of one slide, at ``(rows, cols)`` of its grid, to their places.

        Threads may call this at once, as long as their places differ.
        """
        self.slide[places], self.rows[places], self.cols[places] = slide, *at
        # A row as one item of so many bytes: numpy then copies whole rows in place of single float16 values.
        row = np.dtype((np.void, values.shape[1] * values.itemsize))
        self.embedding.view(row)[:, 0][places] = np.ascontiguousarray(values).view(row)[:, 0]

    def compact(self, size: int, empty: NDArray[np.int64]) -> int:
        """Close up the first `size` places over the empty ones, keeping the order; return how many are filled."""
        filled = np.ones(size, bool)
        filled[empty] = False
        sources = np.flatnonzero(filled)
        first = int(empty.min()) if len(empty) else size
        # Forwards: a patch only ever moves to a lower place, so no row is overwritten before it was copied.
        for start in range(first, len(sources), _ROWS_PER_MOVE):
            source = sources[start : start + _ROWS_PER_MOVE]
            for array in (self.slide, self.rows, self.cols, self.embedding):
                array[start : start + len(source)] = array[source]
        return len(sources)

    def view(self, start: int, stop: int) -> Batch:
        """Return patches as they lie there: the embeddings are not copied."""
        part = slice(start, stop)
        # Places are copied, as a loan ends with the embeddings alone; they take 24 bytes a patch.
        return Batch(
            self.slide[part].copy(), self.rows[part].copy(), self.cols[part].copy(), self.embedding[part]
        )


class BufferPool:
    """Lends buffers of one size. Memory that is lent again is better than new memory, which costs as much as a copy.

    A consumer may keep a batch as long as it likes: its buffer is not lent again before, and another one is made.

    Parameters
    ----------
    capacity, dim, dtype
        Patches in a buffer, and features and type of their embeddings.

    Attributes
    ----------
    n_made
        Buffers that were allocated so far.
    """

    def __init__(self, capacity: int, dim: int, dtype: np.dtype[Any]) -> None:
        self._capacity, self._dim, self._dtype = capacity, dim, dtype
        # A deque, whose operations are atomic: a loan may end in any thread, also within a garbage collection, where
        # a lock could be held already.
        self._idle: deque[tuple[NDArray[Any], ...]] = deque(maxlen=_IDLE_BUFFERS)
        self.n_made = 0

    def lend(self) -> PatchBuffer:
        """Return a buffer that nobody uses; its values are undefined."""
        try:
            memory = self._idle.pop()
        except IndexError:
            memory = self._make()
        # An array of this loan's own over the memory. Whatever is cut from it, batches and pieces of batches, refers to
        # this array (numpy goes no further back than an array over a memoryview). So it lives exactly as
        # long as somebody can read the memory, on every Python: counting references would depend on how a release of
        # CPython counts those of its own stack (3.14 counts fewer).
        embedding = np.asarray(memory[-1].data)
        weakref.finalize(embedding, self._idle.append, memory).atexit = False
        return PatchBuffer(memory[0], memory[1], memory[2], embedding)

    def _make(self) -> tuple[NDArray[Any], ...]:
        self.n_made += 1
        places = (np.empty(self._capacity, np.int64) for _ in range(3))
        return (*places, np.empty((self._capacity, self._dim), self._dtype))


class BatchCutter:
    """Cuts a sequence of buffers into batches of one size.

    The last batch of a buffer is copied: a caller who holds it while asking for the next one does not keep the buffer
    from being filled again.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._parts: list[Batch] = []

    def cut(self, buffer: PatchBuffer, filled: int) -> Iterator[Batch]:
        """Yield the batches that the first `filled` patches of a buffer complete."""
        start = 0
        while start < filled:
            held = sum(len(part.rows) for part in self._parts)
            stop = min(start + self._size - held, filled)
            if held or filled - stop < self._size:
                self._keep(buffer.view(start, stop))
                if held + stop - start == self._size:
                    yield self._joined()
            else:
                yield buffer.view(start, stop)
            start = stop

    def remainder(self) -> Iterator[Batch]:
        """Yield the incomplete last batch, if there is one."""
        if self._parts:
            yield self._joined()

    def _keep(self, part: Batch) -> None:
        self._parts.append(part._replace(embedding=part.embedding.copy()))

    def _joined(self) -> Batch:
        parts, self._parts = self._parts, []
        return Batch(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
