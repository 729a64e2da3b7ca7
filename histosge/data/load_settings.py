"""How a loader streams, and what it counts while it does: plain values."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass(frozen=True)
class LoadSettings:
    """How to stream.

    Parameters
    ----------
    batch
        Patches (with targets: spots) in one batch; the last of an epoch may hold fewer.
    seed
        Same seed, store and rank: the same batches, whatever the threads.
    shuffle
        False gives slides by id, blocks and patches in row-major order.
    drop_last
        Leave out an epoch's incomplete last batch.
    buffer_mb
        Of everything in memory that batches are drawn from. Without targets half of it is drawn from while the other
        half is filled.
    threads
        That fetch blocks; None means 2 for a local store and 8 for a remote one.
    rank, world_size
        Which of how many processes this is; parts are disjoint and together the whole.
    """

    batch: int = 1024
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = False
    buffer_mb: int = 256
    threads: int | None = None
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is none of 0..{self.world_size - 1}")
        if min(self.batch, self.buffer_mb, 1 if self.threads is None else self.threads) < 1:
            raise ValueError("batch, buffer_mb and threads must be positive")

    def n_batches(self, n: int) -> int:
        """Return how many batches `n` patches or spots make."""
        return n // self.batch if self.drop_last else -(-n // self.batch)


@dataclass
class EpochReads:
    """What one epoch has read so far.

    Parameters
    ----------
    blocks, patches
        Blocks read, and patches in them that have an embedding (with targets: those under spots).
    background
        Patches in those blocks that hold no tissue; not counted with targets.
    unreadable
        Tissue patches that hold NaN, by slide id.
    missing
        Planned blocks that are not stored, by slide id.
    spots
        With targets: spots with at least one patch that has an embedding.
    uncovered
        With targets: spots without one, which are left out, by slide id.
    """

    blocks: int = 0
    patches: int = 0
    background: int = 0
    unreadable: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    spots: int = 0
    uncovered: Counter[str] = field(default_factory=Counter)
