"""Expression maps as the analyses of `featurestore.analysis` read them: genes in place of features."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.analysis.slide_source import SlideArray
from featurestore.blocks import Block, planned_blocks
from featurestore.documents import DocumentError
from featurestore.errors import AmbiguousSelectionError, IdentityMismatchError, StoreError
from featurestore.file_systems import fixed_url
from featurestore.grid import PatchGrid
from featurestore.location import PathOrUrl, as_url
from featurestore.names import is_segment
from featurestore.storage.block_array import BlockArray
from featurestore.storage.layout import grid_path
from featurestore.storage.slide_group import SlideGroup, open_slide_group
from featurestore.storage.stored_documents import check_on_grid, parse_grid
from featurestore.storage.zarr_metadata import document_label, read_values
from featurestore.tissue.threshold import is_tissue
from featurestore.whole_file import is_partial
from histosge.prediction.expression_store import ExpressionStore

EXPRESSION = "expression"
RESERVED = ("slide", "patches", "absent", "shift", "component", "variance", "ratio")
"""Columns of the analyses' tables, beside those of the genes."""
# `warnings.catch_warnings` changes what all threads see, and slides are opened in several.
_warning_lock = Lock()


@dataclass(frozen=True)
class SlideMap:
    """One slide's map, opened; neither tissue nor expression is read yet.

    Parameters
    ----------
    slide_id, grid
        The slide, and the positions of its patches.
    array
        ``(y, x, gene)``, log1p of counts per 10,000.
    columns
        Names of the genes.
    fingerprint
        Of the model and of the encoder of its embeddings.
    """

    slide_id: str
    grid: PatchGrid
    array: BlockArray
    columns: tuple[str, ...]
    fingerprint: str
    _tissue: Any  # a zarr array, which only what reads stores imports

    @property
    def dim(self) -> int:
        """Number of genes."""
        return self.array.shape[2]

    def read_tissue(self) -> NDArray[np.bool_]:
        """Read which patches are tissue, ``(n_rows, n_cols)``."""
        label = f"tissue of {self.slide_id}/{self.grid.spec.key}"
        return is_tissue(read_values(self._tissue, label, self.grid.shape))

    def planned(self, is_tissue: NDArray[np.bool_]) -> list[Block]:
        """Return the blocks with tissue."""
        return planned_blocks(is_tissue, self.array.block_shape)


class ExpressionSource:
    """The maps of an expression store, for `featurestore.analysis.patch_stream.PatchStream`.

    Parameters
    ----------
    url
        Folder or URL of the store.
    slides
        Only these; None for all.
    grid
        Which grid; None where the slides have only one.
    """

    def __init__(self, url: PathOrUrl, slides: Sequence[str] | None = None, grid: str | None = None) -> None:
        self._url = as_url(url)
        self._slides = None if slides is None else tuple(slides)
        self._grid = grid

    def __reduce__(self) -> tuple[type["ExpressionSource"], tuple[object, ...]]:
        # Without what is open: file systems and event loops belong to their process.
        return ExpressionSource, (fixed_url(self._url), self._slides, self._grid)

    @cached_property
    def _store(self) -> ExpressionStore:
        return ExpressionStore.open(self._url)

    def names(self) -> list[str]:
        """Return the ids of the slides, sorted; one listing.

        Raises
        ------
        StoreError
            If there is no expression store, or it lacks a slide that was named.
        """
        location = self._store.location
        known = [name for name in location.folders() if is_segment(name)]
        unknown = sorted(set(self._slides or ()) - set(known))
        if unknown:
            raise StoreError(f"{location.label} holds no map of slide {unknown[0]!r}; it has: {_few(known)}")
        return known if self._slides is None else sorted(set(self._slides))

    def open(self, slide_id: str, like: SlideArray | None) -> SlideMap | None:
        """Open a slide's map.

        Raises
        ------
        AmbiguousSelectionError
            If it has maps on several grids that match, or on another grid than the first slide has.
        IdentityMismatchError
            If another model predicted it, or other genes.
        StoreError
            If it was named, and has no such map.
        """
        location = self._store.location
        group = open_slide_group(location, slide_id)
        grids = [] if group is None else self._grids(group, slide_id)
        matching = [key for key in grids if self._grid in (None, key)]
        wanted = sorted({*matching, *([like.grid.spec.key] if like is not None else [])})
        if len(wanted) > 1:
            raise AmbiguousSelectionError(
                f"{location.label} holds maps on several grids, slide {slide_id!r} too; name one of: "
                f"{'; '.join(f'--grid {key}' for key in wanted)}"
            )
        if group is None or not matching:
            if self._slides is not None:
                raise StoreError(
                    f"slide {slide_id!r} has no map on grid {self._grid or 'any'} in {location.label}; it has: "
                    f"{_few(grids)}; leave it out, or predict it first"
                )
            return None
        found = self._open_map(group, slide_id, matching[0])
        if like is not None:
            _check_alike(like, found)
        return found

    def _grids(self, group: SlideGroup, slide_id: str) -> list[str]:
        paths = group.paths()
        if paths is None:  # the run that began the map was killed before it consolidated the metadata
            location = self._store.location
            return [
                key
                for key in filter(is_segment, location.folders(slide_id))
                if not is_partial(key) and location.exists(f"{slide_id}/{key}/{EXPRESSION}/zarr.json")
            ]
        return sorted(path.split("/")[0] for path in paths if path.split("/")[1:] == [EXPRESSION])

    def _open_map(self, group: SlideGroup, slide_id: str, grid_key: str) -> SlideMap:
        location = self._store.location
        path = grid_path(slide_id, grid_key)
        array = BlockArray(location, f"{path}/{EXPRESSION}", group.array(f"{grid_key}/{EXPRESSION}"))
        grid = parse_grid(group.attrs(grid_key).get("grid"), document_label(location, path))
        check_on_grid(f"{location.label}/{path}", array.shape, grid)
        made_by = array.attrs.get("made_by")
        if not isinstance(made_by, dict):
            raise DocumentError(f"{location.label}/{path} is damaged: attributes.made_by is no object")
        with _warning_lock, warnings.catch_warnings():
            # zarr 3.1 warns that variable-length strings are not yet part of the format's specification.
            warnings.simplefilter("ignore")
            names = read_values(
                group.array(f"{grid_key}/gene"), f"{location.label}/{path}/gene", (array.shape[2],), "TOU"
            )
        genes = tuple(str(name) for name in names)
        if unprintable := [gene for gene in genes if not gene.isprintable()]:
            raise DocumentError(
                f"{location.label}/{path}/gene is damaged: it names a gene {unprintable[0][:60]!r}"
            )
        columns = [*RESERVED, *genes, *(f"sd_{gene}" for gene in genes)]
        if len(set(columns)) < len(columns):
            twice = next(name for name in columns if columns.count(name) > 1)
            raise DocumentError(f"{location.label}/{path}/gene is damaged: {twice[:60]!r} is there twice")
        # Not the slide nor the spots that a map was conditioned on, which differ from map to map.
        maker = json.dumps([made_by.get("model"), made_by.get("encoder")])
        tissue = group.array(f"{grid_key}/tissue")
        return SlideMap(slide_id, grid, array, genes, maker, tissue)

    def fixed_to(self, first: SlideArray) -> "ExpressionSource":
        """Return a source of maps on the first slide's grid alone."""
        return ExpressionSource(self._url, self._slides, first.grid.spec.key)

    def refuse(self) -> None:
        """Raise the error that no slide has a map.

        Raises
        ------
        StoreError
            Always.
        """
        grids = sorted({key for _, key in self._store.maps()})
        raise StoreError(
            f"{self._store.location.label} holds no map on grid {self._grid or 'any'}; it has: {_few(grids)}"
        )


def _check_alike(first: SlideArray, found: SlideMap) -> None:
    if found.columns != first.columns:
        raise IdentityMismatchError(
            f"the maps of slides {first.slide_id!r} and {found.slide_id!r} are of {first.dim} and {found.dim} genes, not "
            "the same ones in the same order; name slides whose maps have the same genes"
        )
    if found.fingerprint != first.fingerprint:
        raise IdentityMismatchError(
            f"the maps of slides {first.slide_id!r} and {found.slide_id!r} were predicted by different models; name slides "
            "of one of them"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:20]) or "none"
