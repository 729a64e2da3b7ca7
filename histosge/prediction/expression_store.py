"""The expression store: a dense map of genes per slide, written block by block.

The same shape and commit rules as the feature store: one object per block and gene group, and a block is done when its
objects exist. Readable by plain zarr and xarray.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.errors import UnstableSpecificationWarning, ZarrUserWarning

from featurestore.blocks import Block, planned_blocks
from featurestore.errors import IdentityMismatchError, StoreError, StoreNotFoundError
from featurestore.grid import PatchGrid
from featurestore.location import Location
from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import StoredGrid
from featurestore.storage.zarr_metadata import check_root, consolidate, create_root, read_attrs, write_group
from featurestore.tissue.threshold import is_tissue
from histosge.calibration.conformal import Intervals
from histosge.calibration.depth_strata import DepthStrata, interval_bounds

SPEC_NAME = "histosge-expression"
SPEC_VERSION = 1
GENE_GROUP = 256
"""Genes in one object: few objects to write, and not too much to read for a viewer that shows one gene."""


@dataclass(frozen=True)
class StoredMap:
    """One slide's map, opened.

    Parameters
    ----------
    slide_id, grid
        Slide, and grid of its patches.
    genes
        Names along the last dim.
    tissue
        Share of each patch that is tissue, 0..255.
    rgb
        Mean colour of each patch.
    array
        ``(y, x, gene)``, log1p(CP10k); NaN off tissue.
    half_width, trust
        Per gene, see `histosge.calibration.conformal`; None where the model was not calibrated.
    strata
        Half widths by predicted depth; None where one for all depths was as good.
    depth
        ``(y, x, 1)``, log of the total counts that a spot there would have; None if it was not predicted.
    level
        Share of spots that the intervals cover; None where it is not recorded.
    trained_on
        Whether the model was trained on spots of this slide; None where it is not recorded.
    """

    slide_id: str
    grid: PatchGrid
    genes: tuple[str, ...]
    tissue: NDArray[np.uint8]
    rgb: NDArray[np.uint8]
    array: BlockArray
    half_width: NDArray[np.float32] | None = None
    trust: NDArray[np.float32] | None = None
    depth: BlockArray | None = None
    strata: DepthStrata | None = None
    level: float | None = None
    trained_on: bool | None = None

    def half_widths(self, gene: int) -> list[float]:
        """Return a gene's half width in each stratum of depth, from low to high; one where there are no strata."""
        if self.strata is not None:
            return [float(width) for width in self.strata.half_width[:, gene]]
        return [] if self.half_width is None else [float(self.half_width[gene])]

    def read_strata(self) -> NDArray[np.int16]:
        """Return each patch's stratum of predicted depth, ``(n_rows, n_cols)``; -1 where no depth is predicted.

        Raises
        ------
        StoreError
            If the map has no strata.
        """
        if self.strata is None or self.depth is None:
            raise StoreError(f"the map of {self.slide_id!r} has no half widths by depth")
        depth = self.depth.read((0, self.grid.n_rows), (0, self.grid.n_cols))[..., 0]
        return np.where(np.isfinite(depth), self.strata.stratum_at(depth), -1).astype(np.int16)

    def read_with_bounds(
        self, rows: tuple[int, int], cols: tuple[int, int]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
        """Return prediction, lower and upper end of its interval, each ``(rows, cols, gene)``.

        Raises
        ------
        StoreError
            If the map has no intervals.
        """
        if self.half_width is None:
            raise StoreError(
                f"the map of {self.slide_id!r} has no intervals, since its model was not calibrated: train it again "
                "with TrainSettings(intervals=True), and predict into another OUT"
            )
        values = self.array.read(rows, cols).astype(np.float32)
        half_width = self.half_width
        if self.strata is not None and self.depth is not None:
            half_width = self.strata.half_width_at(self.depth.read(rows, cols)[..., 0])
        return values, *interval_bounds(values, half_width)

    def planned(self) -> list[Block]:
        """Return the blocks with tissue: those that exist once the map is complete."""
        return planned_blocks(is_tissue(self.tissue), self.array.block_shape)


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
        location = Location(url)
        if not location.exists():
            raise StoreNotFoundError(
                f"there is no expression store at {location.label}; make one with: histosge predict"
            )
        check_root(location, SPEC_NAME, SPEC_VERSION, "expression store")
        return cls(location)

    @classmethod
    def open_or_create(cls, url: str) -> "ExpressionStore":
        """Open an expression store, or make an empty one where there is nothing yet."""
        location = Location(url)
        create_root(location, SPEC_NAME, SPEC_VERSION, "expression store")
        return cls(location)

    def maps(self) -> Iterator[tuple[str, str]]:
        """Yield ``(slide id, grid key)`` of every map."""
        for slide_id in self.location.folders():
            for grid_key in self.location.folders(slide_id):
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

        Raises
        ------
        IdentityMismatchError
            If the slide has a map by another model, of other embeddings or of other genes.
        """
        slide_id, grid = stored.slide_id, stored.grid
        path = f"{slide_id}/{grid.spec.key}"
        attrs = read_attrs(self.location, f"{path}/expression")
        if attrs:
            # Blocks of two models would be indistinguishable in one array.
            if attrs["made_by"] != made_by:
                raise IdentityMismatchError(
                    f"{self.location.label}/{path} was predicted by {_brief(attrs['made_by'])}, this prediction is by "
                    f"{_brief(made_by)}; give another OUT or remove that folder"
                )
            found = self.map(slide_id, grid.spec.key, read_only=False)
            if found.genes != genes:
                raise IdentityMismatchError(
                    f"{self.location.label}/{path} holds {len(found.genes)} genes {found.genes[0]}..{found.genes[-1]}, "
                    f"this prediction is of {len(genes)}, {genes[0]}..{genes[-1]}; give another OUT or remove that folder"
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
            | ({} if trained_on is None else {"trained_on": trained_on}),
        )
        consolidate(self.location, slide_id)
        return self.map(slide_id, grid.spec.key, read_only=False)

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
            "gene": (("gene",), np.array(genes, dtype=np.dtypes.StringDType())),
        }
        if intervals is not None:
            values["half_width"] = (("gene",), intervals.half_width)
            values["trust"] = (("gene",), intervals.trust)
            if intervals.strata is not None:
                values["depth_edge"] = (("edge",), intervals.strata.edges)
                values["half_width_by_depth"] = (("stratum", "gene"), intervals.strata.half_width)
            attrs |= {name: {"coverage": intervals.level} for name in ("half_width", "half_width_by_depth")}
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
        """Open one slide's map."""
        path = f"{slide_id}/{grid_key}"
        attrs = read_attrs(self.location, path).get("grid")
        if not attrs:
            raise StoreError(f"{self.location.label} holds no map {path}")
        genes = tuple(str(gene) for gene in self._read(f"{path}/gene"))
        tissue, rgb = (self._read(f"{path}/{name}") for name in ("tissue", "rgb"))
        array = BlockArray.open(self.location, f"{path}/expression", read_only=read_only)
        half_width, trust, edges, widths = (
            # Optional: a model need not be calibrated, nor have strata.
            self._read(f"{path}/{name}") if self.location.exists(f"{path}/{name}/zarr.json") else None
            for name in ("half_width", "trust", "depth_edge", "half_width_by_depth")
        )
        strata = DepthStrata(edges, widths) if edges is not None and widths is not None else None
        depth = None
        if self.location.exists(f"{path}/depth/zarr.json"):
            depth = BlockArray.open(self.location, f"{path}/depth", read_only=read_only)
        grid = PatchGrid.from_attrs(attrs)
        level = read_attrs(self.location, f"{path}/half_width").get("coverage")
        trained_on = array.attrs.get("trained_on")
        return StoredMap(
            slide_id,
            grid,
            genes,
            tissue,
            rgb,
            array,
            half_width,
            trust,
            depth,
            strata,
            # A store from elsewhere may hold anything under these names.
            level if isinstance(level, float) and 0 < level < 1 else None,
            trained_on if isinstance(trained_on, bool) else None,
        )

    def _read(self, path: str) -> NDArray[Any]:
        """Read a whole array; for those of one object."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", category=UnstableSpecificationWarning)
            return np.asarray(
                zarr.open_array(self.location.zarr(read_only=True), path=path, mode="r", zarr_format=3)[...]
            )


def _brief(made_by: dict[str, Any]) -> str:
    return ", ".join(f"{key} {str(value)[:16]}" for key, value in sorted(made_by.items()))


def open_optional(location: Location, path: str) -> "zarr.Array[Any] | None":
    """Open an array of an expression store; None where there is none."""
    if not location.exists(f"{path}/zarr.json"):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=ZarrUserWarning)
        return zarr.open_array(location.zarr(read_only=True), path=path, mode="r", zarr_format=3)
