"""Embeddings in shuffled batches, straight from a store: what a training loop of your own iterates over.

Whole blocks are read by threads into a buffer of fixed size, from which batches are drawn in an order that the seed
decides. Memory does not grow with the slides.

    from histosge import stream_batches

    for batch in stream_batches("s3://bucket/store", epochs=3):
        loss = network(torch.from_numpy(batch.embedding).float()) ...

With targets, batches are of spots: the mean embedding of the patches under each, and its counts.

    targets = SpotTargets.from_samples("cohort.csv", "store.zarr", genes=250)
    for embedding, counts, library, section, spot in Loader("store.zarr", targets=targets):
        ...

A loader has a length, an epoch that can be set, and `as_torch()` for what expects a dataset of torch.

Terms
    rank   one of `world_size` processes; each sees its own share of the blocks (with targets: of the sections)
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

from featurestore.errors import StoreError
from featurestore.file_systems import fixed_url
from featurestore.storage.block_cache import BlockCache
from featurestore.storage.selection import open_slides
from featurestore.storage.store import Store
from histosge.data.load_settings import EpochReads, LoadSettings
from histosge.data.patch_batches import PatchBatches
from histosge.data.shuffle_buffer import Batch
from histosge.data.spot_batches import SpotBatches
from histosge.data.spot_blocks import SpotsOnGrid
from histosge.data.spot_targets import SpotBatch, SpotTargets
from histosge.data.stored_blocks import StoredBlocks, StoredSection

if TYPE_CHECKING:
    from histosge.data.torch_batches import TorchBatches

B = TypeVar("B", Batch, SpotBatch)

# Over a network a thread mostly waits. Locally two keep the reads ahead of the checksums.
THREADS_LOCAL, THREADS_REMOTE = 2, 8


class Loader(Generic[B]):
    """Shuffled batches of patches, or of spots with targets, from the slides of a store, epoch after epoch.

    Iterating gives one epoch, each time another order.

    Parameters
    ----------
    store
        Folder or URL of a feature store. Blocks of a remote one are kept on the local disk, see
        `featurestore.storage.block_cache`.
    slides
        Only these; all that have the embedding (with targets: all sections of theirs) if empty.
    grid, encoder
        Needed where the store holds several; targets know theirs.
    settings
        Batch, seed, buffer, rank.
    targets
        Spots to learn from: batches are then `SpotBatch`, and ranks share the sections in place of the blocks.

    Attributes
    ----------
    slides_without_embedding
        Slides of the store that are left out, as they lack the embedding.

    Raises
    ------
    StoreError
        If there is no store, no such slide or no embedding, the buffer cannot hold two blocks, or there are more ranks
        than sections.

    Examples
    --------
    >>> loader = Loader("s3://bucket/store", settings=LoadSettings(batch=512))  # doctest: +SKIP
    >>> for epoch in range(3):  # doctest: +SKIP
    ...     for slide, rows, cols, embedding in loader:
    ...         step(torch.from_numpy(embedding).float())
    >>> loader.reads.unreadable  # doctest: +SKIP
    Counter({'C4': 3})
    """

    @overload
    def __init__(
        self: "Loader[Batch]",
        store: str | Path,
        slides: Sequence[str] = (),
        *,
        grid: str | None = None,
        encoder: str | None = None,
        settings: LoadSettings | None = None,
        targets: None = None,
    ) -> None: ...

    @overload
    def __init__(
        self: "Loader[SpotBatch]",
        store: str | Path,
        slides: Sequence[str] = (),
        *,
        grid: str | None = None,
        encoder: str | None = None,
        settings: LoadSettings | None = None,
        targets: SpotTargets,
    ) -> None: ...

    def __init__(
        self,
        store: str | Path,
        slides: Sequence[str] = (),
        *,
        grid: str | None = None,
        encoder: str | None = None,
        settings: LoadSettings | None = None,
        targets: SpotTargets | None = None,
    ) -> None:
        self.settings = settings or LoadSettings()
        if targets is not None:
            # The grid is the targets': their rows and columns mean nothing on another one.
            targets = targets.subset(slides) if slides else targets
            slides, grid, encoder = targets.slide_ids, targets.grid_key, encoder or targets.encoder_key
        self.targets = targets
        # What another process needs to open the same anew.
        self._arguments = {"store": fixed_url(str(store)), "slides": slides, "grid": grid, "encoder": encoder}
        self._store = Store.open(str(store))
        self._slides, self.slides_without_embedding = open_slides(
            self._store, list(slides) or None, grid, encoder
        )
        self._batches = self._make_batches()
        self._epoch = 0

    def _make_batches(self) -> PatchBatches | SpotBatches:
        # A local store's blocks are in the page cache already.
        cache = BlockCache.from_environment() if self.is_remote else None
        readers = [slide.array.reader(cache) for slide in self._slides]
        threads = self.settings.threads or (THREADS_REMOTE if self.is_remote else THREADS_LOCAL)
        if self.targets is None:
            return PatchBatches(self._slides, readers, self.settings, threads)
        self._check_ranks(self.settings.world_size)
        # Slides are opened in the order of their ids, which need not be the order of the targets.
        place = {slide.slide_id: number for number, slide in enumerate(self._slides)}
        places = [place[section.slide_id] for section in self.targets.sections]
        slides, readers = [self._slides[i] for i in places], [readers[i] for i in places]
        return SpotBatches(slides, readers, self.targets.sections, self.settings, threads)

    def _check_ranks(self, world_size: int) -> None:
        if self.targets is not None and world_size > len(self.targets.sections):
            raise StoreError(
                f"{len(self.targets.sections)} sections cannot be shared by {world_size} processes, as each needs a "
                "section; start fewer processes or workers"
            )

    @property
    def is_remote(self) -> bool:
        """Whether blocks come over a network."""
        return not self._store.location.is_local

    @property
    def slide_ids(self) -> tuple[str, ...]:
        """Slides that are streamed, in the order of `Batch.slide`."""
        return tuple(slide.slide_id for slide in self._slides)

    @property
    def dim(self) -> int:
        """Features of one patch."""
        return self._slides[0].dim

    @property
    def reads(self) -> EpochReads:
        """What the latest epoch has read so far."""
        return self._batches.reads

    def __len__(self) -> int:
        """Return the batches of the next epoch: see `n_batches`."""
        return self.n_batches(self._epoch)

    def n_batches(self, epoch: int, n_workers: int = 1) -> int:
        """Return how many batches an epoch has.

        Exact where all patches are readable, or once the epochs so far have read every block: what they found
        unreadable or missing is not counted. Otherwise a few too many.

        Parameters
        ----------
        n_workers
            Processes that share this rank's part, each with an incomplete last batch of its own.
        """
        s = self.settings
        ranks = range(s.rank * n_workers, (s.rank + 1) * n_workers)
        return sum(
            s.n_batches(self._batches.n_items(epoch, rank, s.world_size * n_workers)) for rank in ranks
        )

    def set_epoch(self, number: int) -> None:
        """Make the next epoch the one of this number, for a run that is resumed."""
        self._epoch = number

    def __iter__(self) -> Iterator[B]:
        """Go through the next epoch."""
        # Counted when it begins, not when it ends: an epoch that is left early must not come again.
        self._epoch += 1
        return self.epoch(self._epoch - 1)

    def epoch(self, number: int) -> Iterator[B]:
        """Go through one epoch, counted from 0: the same number gives the same batches.

        Yields
        ------
        Batch or SpotBatch
            Nobody else writes to its arrays, so it may be kept; as the embeddings of patches are a piece of half the
            buffer, copy what is to be kept for long.
        """
        return cast(Iterator[B], self._batches.epoch(number))

    def spot_blocks(self, halo_um: float) -> StoredBlocks:
        """Return the blocks under the targets' spots, each with what lies within a halo: examples of an attention model.

        Parameters
        ----------
        halo_um
            How far beyond the patches under spots a model looks.

        Raises
        ------
        StoreError
            If the loader has no targets.

        Examples
        --------
        >>> blocks = loader.spot_blocks(halo_um=512)  # doctest: +SKIP
        >>> for block in blocks.read(rng.permutation(len(blocks.n_spots))):  # doctest: +SKIP
        ...     step(block.patches.embedding, block.overlap, block.target)
        """
        if self.targets is None:
            raise StoreError("blocks of spots need targets: give Loader(..., targets=SpotTargets...)")
        cache = BlockCache.from_environment() if self.is_remote else None
        slides = {slide.slide_id: slide for slide in self._slides}
        sections = [
            StoredSection(
                section.slide_id,
                slides[section.slide_id].grid,
                slides[section.slide_id].array.reader(cache),
                partial(SpotsOnGrid, section.rows, section.cols, section.overlap),
                section.log_rates,
            )
            for section in self.targets.sections
        ]
        s = self.settings
        threads = s.threads or (THREADS_REMOTE if self.is_remote else THREADS_LOCAL)
        return StoredBlocks(sections, halo_um, threads=threads, cache_mb=s.buffer_mb)

    def as_torch(self, num_workers: int = 0) -> "TorchBatches[B]":
        """Return the batches as a `torch.utils.data.IterableDataset` of tensors.

        Parameters
        ----------
        num_workers
            Of the `DataLoader` that it is given to. None are needed: blocks are read by threads in any case.

        Raises
        ------
        StoreError
            If there are more workers than sections.

        Examples
        --------
        >>> batches = DataLoader(loader.as_torch(), batch_size=None)  # doctest: +SKIP
        """
        from histosge.data.torch_batches import TorchBatches

        self._check_ranks(self.settings.world_size * max(1, num_workers))
        return TorchBatches(self, num_workers, self._epoch)

    def for_worker(self, worker: int, n_workers: int) -> "Loader[B]":
        """Open the same store anew, for one of several workers that share this rank's part."""
        s = self.settings
        part = replace(s, rank=s.rank * n_workers + worker, world_size=s.world_size * n_workers)
        return _open(self._arguments, part, self.targets)

    def __reduce__(self) -> tuple[Any, ...]:
        # A process that does not inherit memory (spawn, forkserver) opens the store for itself.
        return _open, (self._arguments, self.settings, self.targets, self._epoch)


def _open(
    arguments: dict[str, Any], settings: LoadSettings, targets: SpotTargets | None, epoch: int = 0
) -> "Loader[Any]":
    loader: Loader[Any] = Loader(**arguments, settings=settings, targets=targets)
    loader.set_epoch(epoch)
    return loader


def stream_batches(
    store: str | Path,
    slides: Sequence[str] = (),
    *,
    epochs: int = 1,
    grid: str | None = None,
    encoder: str | None = None,
    settings: LoadSettings | None = None,
) -> Iterator[Batch]:
    """Stream shuffled batches of patches from a store, for several epochs: `Loader` in one call.

    Yields
    ------
    Batch
        ``(slide, rows, cols, embedding)``, see there.

    Examples
    --------
    >>> for batch in stream_batches("store.zarr", epochs=2):  # doctest: +SKIP
    ...     step(torch.from_numpy(batch.embedding).float())
    """
    loader = Loader(store, slides, grid=grid, encoder=encoder, settings=settings)
    for number in range(epochs):
        yield from loader.epoch(number)
