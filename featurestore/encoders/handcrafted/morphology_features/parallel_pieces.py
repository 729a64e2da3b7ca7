"""Many small pieces of arithmetic on all cores: one piece per thread, and one torch thread in each.

Splitting a small operation over cores costs more than it saves, and leaves cores spinning where other
processes want them. A piece alone in its thread also gives the same bits on any number of cores.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch

from featurestore.threads import one_torch_thread_here

T = TypeVar("T")
R = TypeVar("R")


def map_pieces(work: Callable[[T], R], pieces: Sequence[T]) -> Iterator[R]:
    """Return ``work(piece)`` of each piece, in order; as many at once as torch may use threads."""
    return _pool(torch.get_num_threads()).map(work, pieces)


# Kept for the life of the process, or every batch would pay for starting threads.
@lru_cache
def _pool(size: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(size, thread_name_prefix="encode", initializer=one_torch_thread_here)
