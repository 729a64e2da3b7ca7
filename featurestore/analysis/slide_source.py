"""Which slides an analysis reads, and how one of them is opened: embeddings here, and whatever else has blocks of patches.

A source opens slides one by one, so that an analysis of ten thousand begins with the first. It pickles: a worker on another
machine opens the same slides by itself.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import Block
from featurestore.errors import AmbiguousSelectionError, StoreError
from featurestore.file_systems import fixed_url
from featurestore.grid import PatchGrid
from featurestore.location import PathOrUrl, as_url
from featurestore.storage.block_array import BlockArray
from featurestore.storage.choose_embedding import (
    EmbeddingName,
    as_options,
    choose_embedding,
    matching_embeddings,
)
from featurestore.storage.selection import (
    SlideEmbedding,
    check_one_encoder,
    open_slides,
    selected_slides,
    slide_embeddings,
)
from featurestore.storage.store import Store


class SlideArray(Protocol):
    """One slide's array of blocks, opened; `featurestore.storage.selection.SlideEmbedding` is one."""

    @property
    def slide_id(self) -> str:
        """The slide."""
        ...

    @property
    def grid(self) -> PatchGrid:
        """Positions of its patches."""
        ...

    @property
    def array(self) -> BlockArray:
        """Values of its patches, ``(y, x, feature)``."""
        ...

    @property
    def dim(self) -> int:
        """Features of one patch."""
        ...

    @property
    def columns(self) -> tuple[str, ...] | None:
        """Names of the features, where they have names."""
        ...

    @property
    def fingerprint(self) -> str:
        """Of what made the values: those of different fingerprints cannot be compared."""
        ...

    def read_tissue(self) -> NDArray[np.bool_]:
        """Read which patches are tissue, ``(n_rows, n_cols)``."""
        ...

    def planned(self, is_tissue: NDArray[np.bool_]) -> list[Block]:
        """Return the blocks with tissue."""
        ...


class SlideSource(Protocol):
    """The slides of an analysis; it must pickle."""

    def names(self) -> list[str]:
        """Return the ids of the slides, sorted; some may turn out to lack what is analysed.

        Raises
        ------
        StoreError
            If there is no store, or it lacks a slide that was named.
        """
        ...

    def open(self, slide_id: str, like: SlideArray | None) -> SlideArray | None:
        """Open a slide; None if it lacks what is analysed.

        Parameters
        ----------
        like
            The first slide that was opened, which all others must be like; None for the first itself.

        Raises
        ------
        StoreError
            If it was named and lacks what is analysed, or cannot be compared with the first.
        """
        ...

    def fixed_to(self, first: SlideArray) -> "SlideSource":
        """Return a source that opens the same kind of array as the first slide's, without choosing again."""
        ...

    def refuse(self) -> None:
        """Raise the error that no slide has what is analysed.

        Raises
        ------
        StoreError
            Always; the message lists what there is.
        """
        ...


class EmbeddingSource:
    """One embedding of the slides of a feature store.

    Parameters
    ----------
    url
        Folder or URL of the store.
    slides
        Only these; None for all that have the embedding.
    grid, encoder
        Which embedding; None where the slides have only one.
    """

    def __init__(
        self,
        url: PathOrUrl,
        slides: Sequence[str] | None = None,
        grid: str | None = None,
        encoder: str | None = None,
    ) -> None:
        self._url = as_url(url)
        self._slides = None if slides is None else tuple(slides)
        self._grid, self._encoder = grid, encoder

    def __reduce__(self) -> tuple[type["EmbeddingSource"], tuple[object, ...]]:
        # Without what is open: file systems and event loops belong to their process.
        return EmbeddingSource, (fixed_url(self._url), self._slides, self._grid, self._encoder)

    @cached_property
    def _store(self) -> tuple[Store, Any]:
        store = Store.open(self._url)
        return store, store.location.zarr(read_only=True)

    def names(self) -> list[str]:
        """Return the ids of the slides; one listing."""
        return selected_slides(self._store[0], self._slides)

    def open(self, slide_id: str, like: SlideArray | None) -> SlideEmbedding | None:
        """Open a slide's embedding, by one request.

        Raises
        ------
        AmbiguousSelectionError
            If it has several that match, or another one than the first slide has.
        IdentityMismatchError
            If it was embedded by another encoder of the same name.
        StoreError
            If it was named, and lacks the embedding.
        """
        store, zarr_store = self._store
        label = store.location.label
        found = slide_embeddings(store, slide_id, zarr_store)
        matching = matching_embeddings(found, self._grid, self._encoder)
        first = None if like is None else _as_embedding(like)
        chosen: EmbeddingName | None = None
        if first is None and matching:
            chosen = choose_embedding({slide_id: matching}, self._grid, self._encoder, label)
        elif first is not None:
            chosen = first.name
            if any(name != chosen for name in matching):
                # Seen only now, since slides are opened as they are read; to go on would leave out what may be meant.
                raise AmbiguousSelectionError(
                    f"{label} holds several embeddings, of slide {slide_id!r} others than of {first.slide_id!r}; name one "
                    f"of: {as_options(sorted({chosen, *matching}))}"
                )
        if chosen is None or chosen not in found:
            if self._slides is not None:
                wanted = as_options([chosen]) if chosen else f"--grid {self._grid} --encoder {self._encoder}"
                raise StoreError(
                    f"slide {slide_id!r} has no embedding {wanted} in {label}; it has: "
                    f"{as_options(sorted(found)) or 'none'}; leave it out, or embed it first"
                )
            return None
        if first is not None:
            check_one_encoder(first, found[chosen])
        return found[chosen]

    def fixed_to(self, first: SlideArray) -> "EmbeddingSource":
        """Return a source of the first slide's embedding alone."""
        return EmbeddingSource(self._url, self._slides, *_as_embedding(first).name)

    def refuse(self) -> None:
        """Raise the error that no slide has the embedding; it opens them all, to list what there is."""
        open_slides(self._store[0], self._slides, self._grid, self._encoder)


def _as_embedding(slide: SlideArray) -> SlideEmbedding:
    assert isinstance(slide, SlideEmbedding)
    return slide
