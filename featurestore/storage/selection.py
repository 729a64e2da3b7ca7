"""Open the embeddings that are analysed or trained on together: one grid, one encoder, all slides that have both.

A slide's metadata costs one request, since it is consolidated in the slide's group. Embeddings of different encoders
are never mixed: the fingerprints must agree.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from featurestore.blocks import Block, planned_blocks
from featurestore.documents import convert
from featurestore.errors import IdentityMismatchError, StoreError
from featurestore.grid import PatchGrid
from featurestore.storage.block_array import BlockArray
from featurestore.storage.choose_embedding import EmbeddingName, choose_embedding
from featurestore.storage.layout import EMBEDDING, SPOTS, embedding_path, grid_path
from featurestore.storage.slide_group import SlideGroup, open_slide_group
from featurestore.storage.store import Store
from featurestore.storage.stored_documents import EncoderAttrs, check_on_grid, parse_grid
from featurestore.storage.zarr_metadata import document_label, read_values
from featurestore.tissue.threshold import is_tissue

METADATA_THREADS = 16
"""Slides whose metadata is read at once. On an object store that is nearly all waiting, so more than the cores."""


@dataclass(frozen=True)
class SlideEmbedding:
    """One slide's embedding, opened; neither tissue nor vectors are read yet.

    Parameters
    ----------
    slide_id, grid
        The slide, and the positions of its patches.
    array
        The embedding, ``(y, x, feature)``.
    encoder
        Attributes of the encoder: `key`, `dim`, `facts`, `fingerprint`.
    """

    slide_id: str
    grid: PatchGrid
    array: BlockArray
    encoder: dict[str, Any]
    _tissue: "zarr.Array[Any]"

    @property
    def dim(self) -> int:
        """Features of one patch."""
        return self.array.shape[2]

    @property
    def fingerprint(self) -> str:
        """Of the encoder."""
        return str(self.encoder["fingerprint"])

    @property
    def name(self) -> EmbeddingName:
        """Grid key and encoder slug, as in the array's path."""
        _, grid, encoder, _ = self.array.path.split("/")
        return grid, encoder

    @property
    def columns(self) -> None:
        """Features of an embedding have no names."""
        return

    def read_tissue(self) -> NDArray[np.bool_]:
        """Read which patches are tissue, ``(n_rows, n_cols)``: one small object."""
        label = f"tissue of {self.slide_id}/{self.grid.spec.key}"
        return is_tissue(read_values(self._tissue, label, self.grid.shape))

    def planned(self, is_tissue: NDArray[np.bool_]) -> list[Block]:
        """Return the blocks with tissue: those that are stored, or will be."""
        return planned_blocks(is_tissue, self.array.block_shape)


def open_slides(
    store: Store, slide_ids: Sequence[str] | None, grid: str | None, encoder: str | None
) -> tuple[list[SlideEmbedding], list[str]]:
    """Open one embedding of every slide that has it.

    Parameters
    ----------
    slide_ids
        Only these; None for all.
    grid, encoder
        None where the slides have only one.

    Returns
    -------
    (list of SlideEmbedding, list of str)
        In the order of their ids, and the ids of slides that lack the embedding.

    Raises
    ------
    AmbiguousSelectionError
        If several embeddings fit; the message lists them.
    IdentityMismatchError
        If the slides were embedded by different encoders of the same name.
    StoreError
        If nothing matches, or a slide that was named does not.
    """
    names = selected_slides(store, slide_ids)
    zarr_store = store.location.zarr(read_only=True)
    with ThreadPoolExecutor(METADATA_THREADS) as pool:
        opened = list(pool.map(lambda name: slide_embeddings(store, name, zarr_store), names))
    found = dict(zip(names, opened, strict=True))
    chosen = choose_embedding(found, grid, encoder, store.location.label)
    slides = [pairs[chosen] for pairs in found.values() if chosen in pairs]
    lacking = [name for name, pairs in found.items() if chosen not in pairs]
    if slide_ids is not None and lacking:
        raise StoreError(
            f"slide {lacking[0]!r} has no embedding --grid {chosen[0]} --encoder {chosen[1]} "
            f"in {store.location.label}; leave it out, or embed it first"
        )
    for slide in slides[1:]:
        check_one_encoder(slides[0], slide)
    return slides, lacking


def selected_slides(store: Store, slide_ids: Sequence[str] | None) -> list[str]:
    """Return the ids of the named slides, or of all, sorted; one listing.

    Raises
    ------
    StoreError
        If the store holds no slide of a name.
    """
    known = store.slide_ids()
    unknown = sorted(set(slide_ids or []) - set(known))
    if unknown:
        raise StoreError(
            f"{store.location.label} holds no slide {unknown[0]!r}; see: histosge ls {store.location.label}"
        )
    # Sorted by id: this order decides shuffles and clusters, so it must not depend on the caller's.
    return known if slide_ids is None else sorted(set(slide_ids))


def slide_embeddings(
    store: Store, slide_id: str, zarr_store: Any = None
) -> dict[EmbeddingName, SlideEmbedding]:
    """Open all embeddings of one slide, by one request; empty for a folder that is no slide.

    Parameters
    ----------
    zarr_store
        `Location.zarr` of the store, where many slides are opened.

    Raises
    ------
    DocumentError
        If its metadata are damaged.
    """
    group = open_slide_group(store.location, slide_id, zarr_store)
    if group is None:
        return {}
    paths = group.paths()
    if paths is None:  # the run that planned the slide was killed before it consolidated the metadata
        pairs = [(g, e) for g in store.grid_keys(slide_id) for e in store.encoder_slugs(slide_id, g)]
    else:
        parts = (path.split("/") for path in paths)
        pairs = [(part[0], part[1]) for part in parts if part[2:] == [EMBEDDING]]
        # Patches at their own positions are no grid, and have no blocks.
        pairs = [pair for pair in pairs if not pair[0].startswith(SPOTS)]
    return {pair: _embedding(store, group, slide_id, pair) for pair in pairs}


def _embedding(store: Store, group: SlideGroup, slide_id: str, pair: EmbeddingName) -> SlideEmbedding:
    path, label = embedding_path(slide_id, *pair), store.location.label
    array = BlockArray(store.location, path, group.array(f"{pair[0]}/{pair[1]}/{EMBEDDING}"))
    attrs = group.attrs(pair[0]).get("grid")
    grid = parse_grid(attrs, document_label(store.location, grid_path(slide_id, pair[0])))
    check_on_grid(f"{label}/{path}", array.shape, grid)
    encoder: Any = array.attrs.get("encoder")
    convert(encoder, EncoderAttrs, document_label(store.location, path), at="attributes.encoder")
    return SlideEmbedding(slide_id, grid, array, encoder, group.array(f"{pair[0]}/tissue"))


def check_one_encoder(first: SlideEmbedding, slide: SlideEmbedding) -> None:
    """Refuse to mix embeddings of two encoders.

    Raises
    ------
    IdentityMismatchError
        With both slides and fingerprints.
    """
    # By fingerprint, since one key may have been loaded with other weights on another day.
    if slide.fingerprint != first.fingerprint:
        raise IdentityMismatchError(
            f"slides {first.slide_id!r} and {slide.slide_id!r} were embedded by different encoders "
            f"{first.encoder['key']!r}: fingerprints {first.fingerprint[:16]} and "
            f"{slide.fingerprint[:16]}; name slides of one of them"
        )
