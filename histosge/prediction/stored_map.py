"""One slide's map in an expression store, opened and checked: its arrays, and what is claimed of them."""

import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.errors import UnstableSpecificationWarning

from featurestore.blocks import Block, planned_blocks
from featurestore.documents import DocumentError
from featurestore.errors import StoreError
from featurestore.grid import PatchGrid
from featurestore.location import Location
from featurestore.storage.block_array import BlockArray
from featurestore.storage.layout import grid_path
from featurestore.storage.stored_documents import check_on_grid, parse_grid
from featurestore.storage.zarr_metadata import document_label, read_array, read_attrs
from featurestore.tissue.threshold import is_tissue
from histosge.calibration.depth_strata import DepthStrata, interval_bounds
from histosge.calibration.wording import claim_text
from histosge.data.gaussian_pooling import RIM_SHARE

_MAX_WORDS = 200


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
    claim, scope
        For whom intervals and trust hold, in a few words, and what they were measured on, see
        `histosge.calibration.conformal.Intervals`; maps of earlier versions claim nothing.
    embedding_distance
        How far the slide's embeddings lie from those of the training sections, see
        `histosge.calibration.embedding_distance`; None where it was trained on, or that is not recorded.
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
    claim: str = ""
    scope: str = ""
    embedding_distance: float | None = None

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
        return planned_blocks(self.is_tissue, self.array.block_shape)

    @property
    def is_rim(self) -> NDArray[np.bool_]:
        """Which tissue patches lie at the rim: less than half of them is tissue, ``(n_rows, n_cols)``.

        From `tissue`, so that it is known of maps of earlier versions, too.
        """
        return is_rim(self.tissue)

    @property
    def is_tissue(self) -> NDArray[np.bool_]:
        """Which patches hold enough tissue to be predicted, ``(n_rows, n_cols)``."""
        return is_tissue(self.tissue)


def open_map(location: Location, slide_id: str, grid_key: str, *, read_only: bool = True) -> StoredMap:
    """Open one slide's map; see `histosge.prediction.expression_store.ExpressionStore.map`."""
    path = grid_path(slide_id, grid_key)
    label = f"{location.label}/{path}"
    attrs = read_attrs(location, path).get("grid")
    if not attrs:
        raise StoreError(f"{location.label} holds no map {path}")
    grid = parse_grid(attrs, document_label(location, path))
    array = _open_on_grid(location, f"{path}/expression", grid, read_only)
    if not isinstance(array.attrs.get("made_by", {}), dict):
        raise DocumentError(f"{label}/expression is damaged: attributes.made_by is no object")
    n_genes = array.shape[2]
    genes = _read_genes(location, path, n_genes)
    # Intervals are optional: a model need not be calibrated.
    half_width = _read_optional(location, f"{path}/half_width", (n_genes,))
    of_widths = read_attrs(location, f"{path}/half_width")
    claim = "" if half_width is None else _words(of_widths.get("claim")) or claim_text("", ())
    level, trained_on = of_widths.get("coverage"), array.attrs.get("trained_on")
    distance = array.attrs.get("embedding_distance")
    return StoredMap(
        slide_id,
        grid,
        genes,
        _read(location, f"{path}/tissue", grid.shape),
        _read(location, f"{path}/rgb", (*grid.shape, 3)),
        array,
        half_width,
        _read_optional(location, f"{path}/trust", (n_genes,)),
        _open_depth(location, path, grid, array, read_only=read_only),
        _read_depth_strata(location, path, n_genes),
        # A store from elsewhere may hold anything under these names.
        level if isinstance(level, float) and 0 < level < 1 else None,
        trained_on if isinstance(trained_on, bool) else None,
        claim,
        _words(read_attrs(location, f"{path}/trust").get("scope")),
        distance if isinstance(distance, float) and 0 <= distance < float("inf") else None,
    )


def _read_genes(location: Location, path: str, n_genes: int) -> tuple[str, ...]:
    genes = tuple(str(gene) for gene in _read(location, f"{path}/gene", (n_genes,), "TOU"))
    if unprintable := [gene for gene in genes if not gene.isprintable()]:
        raise DocumentError(
            f"{location.label}/{path}/gene is damaged: it names a gene {unprintable[0][:60]!r}"
        )
    return genes


def _read_depth_strata(location: Location, path: str, n_genes: int) -> DepthStrata | None:
    edges = _read_optional(location, f"{path}/depth_edge", (None,))
    widths = _read_optional(location, f"{path}/half_width_by_depth", (None, n_genes))
    if edges is None or widths is None:
        return None
    if len(widths) != len(edges) + 1:
        raise DocumentError(
            f"{location.label}/{path} is damaged: half_width_by_depth has {len(widths)} strata for {len(edges)} edges"
        )
    return DepthStrata(edges, widths)


def _open_depth(
    location: Location, path: str, grid: PatchGrid, array: BlockArray, *, read_only: bool
) -> BlockArray | None:
    if not location.exists(f"{path}/depth/zarr.json"):
        return None
    depth = _open_on_grid(location, f"{path}/depth", grid, read_only)
    if depth.block_shape != array.block_shape or depth.shape[2] != 1:
        raise DocumentError(
            f"{location.label}/{path}/depth is damaged: its shape is {depth.shape} in blocks of "
            f"{depth.block_shape}, those of expression are {array.block_shape}"
        )
    return depth


def _open_on_grid(location: Location, path: str, grid: PatchGrid, read_only: bool) -> BlockArray:
    array = BlockArray.open(location, path, read_only=read_only)
    check_on_grid(f"{location.label}/{path}", array.shape, grid)
    return array


def _read_optional(
    location: Location, path: str, shape: tuple[int | None, ...]
) -> NDArray[np.float32] | None:
    return _read(location, path, shape, "f") if location.exists(f"{path}/zarr.json") else None


def _read(location: Location, path: str, shape: tuple[int | None, ...], kinds: str = "u") -> NDArray[Any]:
    """Read a whole array of one object, after its shape and dtype were compared."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UnstableSpecificationWarning)
        return read_array(location, path, shape, kinds)


def is_rim(tissue: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Return which patches are tissue but less than half, from their shares 0..255; where models pool them differently."""
    return np.asarray(is_tissue(tissue) & (tissue < RIM_SHARE * 255))


def _words(found: Any) -> str:
    """Return text of a store as one short line; empty where it is no text."""
    text = " ".join(found.split()) if isinstance(found, str) else ""
    return "".join(letter for letter in text if letter.isprintable())[:_MAX_WORDS]
