"""The expression store: a dense map of genes per slide, written block by block.

The same shape and commit rules as the feature store: one object per block and gene group, and a block is done when its
objects exist. Readable by plain zarr and xarray.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.errors import UnstableSpecificationWarning, ZarrUserWarning

from featurestore.errors import IdentityMismatchError, StoreError
from featurestore.location import Location, PathOrUrl, store_location
from featurestore.names import is_segment
from featurestore.storage.block_array import BlockArray
from featurestore.storage.layout import grid_path
from featurestore.storage.store import StoredGrid
from featurestore.storage.zarr_metadata import (
    consolidate,
    create_root,
    open_array,
    open_root,
    read_attrs,
    write_group,
)
from featurestore.whole_file import is_partial, whole_folder
from histosge.calibration.conformal import Intervals
from histosge.prediction.stored_map import StoredMap, is_rim, open_map

SPEC_NAME = "histosge-expression"
SPEC_VERSION = 1
GENE_GROUP = 256
"""Genes in one object: few objects to write, and not too much to read for a viewer that shows one gene."""


class ExpressionStore:
    """Dense maps at a location, opened by `open` or `open_or_create`."""

    def __init__(self, location: Location) -> None:
        self.location = location

    @classmethod
    def open(cls, url: str) -> "ExpressionStore":
        """Open an expression store that exists.

        Raises
        ------
        StoreNotFoundError
            If there is nothing at `url`.
        StoreError
            If it is no expression store, or of a newer version.
        """
        location = store_location(url)
        absent = f"there is no expression store at {location.label}; make one with: histosge predict"
        open_root(location, SPEC_NAME, SPEC_VERSION, "expression store", absent)
        return cls(location)

    @classmethod
    def open_or_create(cls, url: str) -> "ExpressionStore":
        """Open an expression store, or make an empty one where there is nothing yet."""
        location = store_location(url, writable=True)
        create_root(location, SPEC_NAME, SPEC_VERSION, "expression store")
        return cls(location)

    def remove_without_blocks(self, slide_id: str) -> None:
        """Remove the maps of a slide of which no block was written; leave any other."""
        for grid_key in filter(is_segment, self.location.folders(slide_id)):
            if is_partial(grid_key) or not self.holds(slide_id, grid_key):
                continue
            stored = self.map(slide_id, grid_key)
            planned = stored.planned()
            if len(stored.array.missing(planned)) < len(planned):
                continue
            self.location.remove(f"{slide_id}/{grid_key}")
            if self.location.folders(slide_id):
                consolidate(self.location, slide_id)
            else:
                self.location.remove(slide_id)

    def remove_if_empty(self) -> None:
        """Remove the store if it holds no map: a run that was refused leaves nothing."""
        if not self.location.folders():
            self.location.remove("zarr.json")
            self.location.remove("")

    def maps(self) -> Iterator[tuple[str, str]]:
        """Yield ``(slide id, grid key)`` of every map."""
        for slide_id in filter(is_segment, self.location.folders()):
            for grid_key in filter(is_segment, self.location.folders(slide_id)):
                if is_partial(grid_key):
                    continue
                # A folder without it is a map whose creation was interrupted.
                if self.location.exists(f"{slide_id}/{grid_key}/expression/zarr.json"):
                    yield slide_id, grid_key

    def add_map(
        self,
        stored: StoredGrid,
        genes: tuple[str, ...],
        block_shape: tuple[int, int],
        made_by: dict[str, Any],
        *,
        intervals: Intervals | None = None,
        depth: bool = False,
        trained_on: bool | None = None,
        embedding_distance: float | None = None,
    ) -> StoredMap:
        """Create a slide's map, or open the one that the same model began.

        Parameters
        ----------
        stored
            Grid and tissue of the slide.
        genes
            Names of the map's genes, in order.
        block_shape
            Patches of one object, ``(rows, cols)``: that of the embedding.
        made_by
            JSON-ready identity of the model and of the embeddings.
        intervals
            Of these genes: their half widths and trust are written beside the expression.
        depth
            Whether the model predicts depth, and the map gets an array for it.
        trained_on
            Whether the model was trained on spots of this slide; None where that is not known.
        embedding_distance
            How far its embeddings lie from those of the training sections; None where that is not known.

        Raises
        ------
        IdentityMismatchError
            If the slide has a map by another model, of other embeddings or of other genes.
        """
        slide_id, grid = stored.slide_id, stored.grid
        path = grid_path(slide_id, grid.spec.key)
        attrs = read_attrs(self.location, f"{path}/expression")
        if attrs:
            # Blocks of two models would be indistinguishable in one array.
            if attrs.get("made_by") != made_by:
                raise IdentityMismatchError(
                    f"{self.location.label}/{path} was predicted by {_brief(attrs.get('made_by'))}, this prediction is by "
                    f"{_brief(made_by)}; give another OUT, or replace the map with --overwrite"
                )
            found = self.map(slide_id, grid.spec.key, read_only=False)
            if found.genes != genes:
                raise IdentityMismatchError(
                    f"{self.location.label}/{path} holds {len(found.genes)} genes {found.genes[0]}..{found.genes[-1]}, "
                    f"this prediction is of {len(genes)}, {genes[0]}..{genes[-1]}; give another OUT, or replace the map "
                    "with --overwrite"
                )
            return found
        # Coordinates before the arrays that they describe: whoever finds a map can place it on the slide.
        write_group(self.location, slide_id, {})
        self._write_coordinates(path, stored, genes, intervals)
        write_group(self.location, path, {"grid": grid.to_attrs()})
        if depth:
            BlockArray.create(
                self.location,
                f"{path}/depth",
                shape=(*grid.shape, 1),
                chunks=(*block_shape, 1),
                dtype="float16",
                dims=("y", "x", "library"),
                attrs={"units": "log of a spot's total counts"},
            )
        # Last: a map counts as created when its expression exists, so an interruption before starts over.
        BlockArray.create(
            self.location,
            f"{path}/expression",
            shape=(*grid.shape, len(genes)),
            # The blocks of the embedding: a block of the map needs one block to be read, and its halo.
            chunks=(*block_shape, min(GENE_GROUP, len(genes))),
            # Steps of 0.004 at most below 8, far less than the noise of counts, at half the size.
            dtype="float16",
            dims=("y", "x", "gene"),
            # Beside `made_by`, not in it: maps that were begun without it are still of the same model.
            attrs={"made_by": made_by, "units": "log1p of counts per 10,000"}
            | ({} if trained_on is None else {"trained_on": trained_on})
            | ({} if embedding_distance is None else {"embedding_distance": embedding_distance}),
        )
        consolidate(self.location, slide_id)
        return self.map(slide_id, grid.spec.key, read_only=False)

    def holds(self, slide_id: str, grid_key: str) -> bool:
        """Tell whether a slide has a map, whole or begun."""
        return self.location.exists(f"{slide_id}/{grid_key}/expression/zarr.json")

    def holds_other(
        self, slide_id: str, grid_key: str, genes: tuple[str, ...], made_by: dict[str, Any]
    ) -> bool:
        """Tell whether a slide has a map that `add_map` would refuse to go on with."""
        attrs = read_attrs(self.location, f"{slide_id}/{grid_key}/expression")
        return bool(attrs) and (
            attrs.get("made_by") != made_by or self.map(slide_id, grid_key).genes != genes
        )

    @contextmanager
    def replacing(self, slide_id: str, grid_key: str) -> "Iterator[ExpressionStore]":
        """Yield an empty store; the map that is written into it takes the place of the one here when the block ends.

        Until then the old map stays as it is, also if the process is killed.

        Raises
        ------
        StoreError
            If the store is not on this machine: object stores rename nothing.
        """
        if not self.location.is_local:
            raise StoreError(
                f"{self.location.label} is not on this machine, where a map could be replaced in one step; give another "
                f"OUT, or remove {slide_id}/{grid_key}"
            )
        with whole_folder(Path(self.location.path(f"{slide_id}/{grid_key}"))) as work:
            work.mkdir()
            # One level deeper than a map, so that nobody who lists maps meanwhile takes it for one.
            fresh = work / "new"
            yield ExpressionStore.open_or_create(str(fresh))
            for part in (fresh / slide_id / grid_key).iterdir():
                part.rename(work / part.name)
            shutil.rmtree(fresh)
            # Its copy of the metadata is the old map's, and a kill must not leave it beside the new one.
            write_group(self.location, slide_id, {})
        consolidate(self.location, slide_id)

    def _write_coordinates(
        self, path: str, stored: StoredGrid, genes: tuple[str, ...], intervals: Intervals | None
    ) -> None:
        grid = stored.grid
        attrs: dict[str, dict[str, Any]] = {name: {"units": "micrometer"} for name in ("y", "x")}
        values: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {
            "y": (("y",), grid.y_um),
            "x": (("x",), grid.x_um),
            "tissue": (("y", "x"), stored.tissue),
            "rgb": (("y", "x", "channel"), stored.rgb),
            # The flag beside the share, so that nobody has to look up the threshold.
            "rim": (("y", "x"), is_rim(stored.tissue).astype(np.uint8)),
            "gene": (("gene",), np.array(genes, dtype=np.dtypes.StringDType())),
        }
        if intervals is not None:
            values["half_width"] = (("gene",), intervals.half_width)
            values["trust"] = (("gene",), intervals.trust)
            if intervals.strata is not None:
                values["depth_edge"] = (("edge",), intervals.strata.edges)
                values["half_width_by_depth"] = (("stratum", "gene"), intervals.strata.half_width)
            of_widths = {"coverage": intervals.level, "claim": intervals.claim, "method": intervals.method}
            attrs |= dict.fromkeys(("half_width", "half_width_by_depth"), of_widths)
            attrs["trust"] = {"claim": intervals.claim, "scope": intervals.scope}
        with warnings.catch_warnings():
            # zarr 3.1 warns that variable-length strings are not yet part of the format's specification.
            warnings.simplefilter("ignore", category=UnstableSpecificationWarning)
            for name, (dims, data) in values.items():
                zarr.create_array(
                    self.location.zarr(),
                    name=f"{path}/{name}",
                    data=data,
                    chunks=data.shape,
                    # A checksum: without one a flipped bit is read as a value.
                    compressors=[Crc32cCodec()],
                    dimension_names=dims,
                    attributes=attrs.get(name, {}),
                    # Creating the map may have been interrupted after some of these.
                    overwrite=True,
                )

    def map(self, slide_id: str, grid_key: str, *, read_only: bool = True) -> StoredMap:
        """Open one slide's map.

        Raises
        ------
        StoreError
            If there is none.
        DocumentError
            If what describes it is damaged, or its parts do not fit each other.
        """
        return open_map(self.location, slide_id, grid_key, read_only=read_only)


def is_expression_store(url: PathOrUrl) -> bool:
    """Tell whether there is an expression store; False where there is nothing, or something else."""
    location = store_location(url)
    return location.exists() and read_attrs(location, "").get("spec") == SPEC_NAME


def _brief(made_by: Any) -> str:
    if not isinstance(made_by, dict):
        return "nobody that its attributes name"
    return ", ".join(f"{key} {str(value)[:16]}" for key, value in sorted(made_by.items()))


def open_optional(location: Location, path: str) -> "zarr.Array[Any] | None":
    """Open an array of an expression store; None where there is none."""
    if not location.exists(f"{path}/zarr.json"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=ZarrUserWarning)
        return open_array(location, path)
