"""Open the embeddings that are analysed or trained on together: one grid, one encoder, all slides that have both.

A slide's metadata costs one request, since it is consolidated in the slide's group. Embeddings of different encoders
are never mixed: the fingerprints must agree.
"""

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.errors import ZarrUserWarning

from featurestore.blocks import Block, planned_blocks
from featurestore.documents import DocumentError, convert
from featurestore.errors import IdentityMismatchError, StoreError, first_line
from featurestore.grid import PatchGrid
from featurestore.storage.block_array import BlockArray
from featurestore.storage.choose_embedding import EmbeddingName, choose_embedding
from featurestore.storage.layout import EMBEDDING, embedding_path, grid_path
from featurestore.storage.store import Store
from featurestore.storage.stored_documents import EncoderAttrs, check_on_grid, parse_grid
from featurestore.storage.zarr_metadata import ZARR_ERRORS, document_label, read_values
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
    known = store.slide_ids()
    unknown = sorted(set(slide_ids or []) - set(known))
    if unknown:
        raise StoreError(
            f"{store.location.label} holds no slide {unknown[0]!r}; see: histosge ls {store.location.label}"
        )
    # Sorted by id: this order decides shuffles and clusters, so it must not depend on the caller's.
    names = known if slide_ids is None else sorted(set(slide_ids))
    zarr_store = store.location.zarr(read_only=True)
    with warnings.catch_warnings(), ThreadPoolExecutor(METADATA_THREADS) as pool:
        warnings.simplefilter("ignore", category=ZarrUserWarning)
        opened = list(pool.map(lambda name: _embeddings(store, zarr_store, name), names))
    found = dict(zip(names, opened, strict=True))
    chosen = choose_embedding(found, grid, encoder, store.location.label)
    slides = [pairs[chosen] for pairs in found.values() if chosen in pairs]
    lacking = [name for name, pairs in found.items() if chosen not in pairs]
    if slide_ids is not None and lacking:
        raise StoreError(
            f"slide {lacking[0]!r} has no embedding --grid {chosen[0]} --encoder {chosen[1]} "
            f"in {store.location.label}; leave it out, or embed it first"
        )
    _check_one_encoder(slides)
    return slides, lacking


def _embeddings(store: Store, zarr_store: Any, slide_id: str) -> dict[EmbeddingName, SlideEmbedding]:
    try:
        group = zarr.open_group(zarr_store, path=slide_id, mode="r", zarr_format=3)
    except FileNotFoundError:
        return {}  # a folder that is no slide: of a remote store they are not looked for
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(
            f"{document_label(store.location, slide_id)} is damaged: {first_line(error)}"
        ) from error
    consolidated = group.metadata.consolidated_metadata
    if consolidated is None:  # the run that planned the slide was killed before it consolidated the metadata
        pairs = [(g, e) for g in store.grid_keys(slide_id) for e in store.encoder_slugs(slide_id, g)]
    else:
        paths = (path.split("/") for path in consolidated.flattened_metadata)
        pairs = [(parts[0], parts[1]) for parts in paths if parts[2:] == [EMBEDDING]]
    return {pair: _embedding(store, group, slide_id, pair) for pair in pairs}


def _embedding(store: Store, group: zarr.Group, slide_id: str, pair: EmbeddingName) -> SlideEmbedding:
    path, label = embedding_path(slide_id, *pair), store.location.label
    array = BlockArray(store.location, path, _array(group, f"{pair[0]}/{pair[1]}/{EMBEDDING}", label))
    attrs = dict(_node(group, pair[0], label).attrs).get("grid")
    grid = parse_grid(attrs, document_label(store.location, grid_path(slide_id, pair[0])))
    check_on_grid(f"{label}/{path}", array.shape, grid)
    encoder: Any = array.attrs.get("encoder")
    convert(encoder, EncoderAttrs, document_label(store.location, path), at="attributes.encoder")
    return SlideEmbedding(slide_id, grid, array, encoder, _array(group, f"{pair[0]}/tissue", label))


def _node(group: zarr.Group, path: str, label: str) -> "zarr.Array[Any] | zarr.Group":
    try:
        return group[path]
    except KeyError as error:
        raise StoreError(
            f"{label}/{group.path}/{path} is not there; see: histosge validate {label}"
        ) from error
    except StoreError:
        raise
    except ZARR_ERRORS as error:
        raise DocumentError(
            f"{label}/{group.path}/{path}/zarr.json is damaged: {first_line(error)}"
        ) from error


def _array(group: zarr.Group, path: str, label: str) -> "zarr.Array[Any]":
    array = _node(group, path, label)
    if not isinstance(array, zarr.Array):
        raise StoreError(f"{label}/{group.path}/{path} is no array; see: histosge validate {label}")
    return array


def _check_one_encoder(slides: Sequence[SlideEmbedding]) -> None:
    # By fingerprint, since one key may have been loaded with other weights on another day.
    first = slides[0]
    for slide in slides[1:]:
        if slide.encoder["fingerprint"] != first.encoder["fingerprint"]:
            raise IdentityMismatchError(
                f"slides {first.slide_id!r} and {slide.slide_id!r} were embedded by different encoders "
                f"{first.encoder['key']!r}: fingerprints {first.encoder['fingerprint'][:16]} and "
                f"{slide.encoder['fingerprint'][:16]}; name slides of one of them"
            )
