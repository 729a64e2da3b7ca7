"""One slide as the page shows it: its pixels, its maps, its measured spots and its domains, each read on demand.

Terms
    layer    a grid of patches that the page colours: the grid of a map, or of the feature store where there is no map
"""

import io
import threading
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray
from PIL import Image

from featurestore.byte_cache import ByteCache
from featurestore.errors import FeatureStoreError
from featurestore.grid import PatchGrid
from featurestore.slides.sample_sheet import Sample
from featurestore.storage.store import SlideRecord, Store
from featurestore.storage.zarr_metadata import read_array
from histosge.calibration.wording import CONDITIONED, SCORES, trained_on_sentence
from histosge.errors import ViewError
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.stored_map import StoredMap
from histosge.viewer.embedding_pictures import (
    COMPONENTS,
    N_CLUSTERS,
    SAMPLE_PATCHES,
    SAMPLE_SLIDES,
    EmbeddingPictures,
    Pictures,
)
from histosge.viewer.gene_reader import GeneReader, GridValues, has_depth_strata, per_gene
from histosge.viewer.map_domains import (
    Labels,
    quality_names,
    stored_domains,
    stored_domains_made_by,
    table_domains,
    table_domains_made_by,
)
from histosge.viewer.measured_spots import MeasuredSpots
from histosge.viewer.region_means import Mask, Moments, compare, map_moments, patches_inside, spot_moments
from histosge.viewer.slide_tiles import SlideTiles
from histosge.viewer.spot_agreement import SpotAgreement


@dataclass(frozen=True)
class Sources:
    """Where a page reads from.

    Parameters
    ----------
    store
        Slides, grids, thumbnails.
    expression
        Maps, if any.
    samples
        Slide id -> its row of a sample sheet: measured spots, and where the slide lies now.
    domains
        Folder with one table of labels per slide, if any.
    gene_cache
        Shared by the maps of all slides.
    pictures
        Of the embeddings, shared by all slides.
    finest_mpp
        Leave out tiles finer than this.
    """

    store: Store
    expression: ExpressionStore | None
    samples: dict[str, Sample]
    domains: Path | None
    gene_cache: ByteCache[GridValues]
    pictures: EmbeddingPictures
    finest_mpp: float = 0.0


@dataclass(frozen=True)
class Layer:
    """A grid of patches that the page colours; `stored` is None where nothing is predicted on it."""

    key: str
    grid: PatchGrid
    rgb: NDArray[np.uint8]
    tissue: NDArray[np.uint8]
    stored: StoredMap | None


class ShownSlide:
    """One slide.

    Parameters
    ----------
    slide_id
        One of the store's.
    sources
        Where to read.
    """

    def __init__(self, slide_id: str, sources: Sources) -> None:
        self.slide_id, self._sources = slide_id, sources
        # The server answers from several threads, and `cached_property` alone lets two of them compute one value.
        # Reentrant, as some of the properties below use each other.
        self._lock = threading.RLock()

    @cached_property
    def record(self) -> SlideRecord:
        """Its record in the store."""
        return self._sources.store.slide(self.slide_id)

    @property
    def picture(self) -> SlideTiles:
        """Its H&E."""
        with self._lock:
            return self._picture

    @cached_property
    def _picture(self) -> SlideTiles:
        sample = self._sources.samples.get(self.slide_id)
        return SlideTiles(self.record, sample.slide if sample else None, self._sources.finest_mpp)

    @property
    def layers(self) -> list[Layer]:
        """Its maps, or the feature store's grids where it has none."""
        with self._lock:
            return self._layers

    @cached_property
    def _layers(self) -> list[Layer]:
        # With maps the store's other grids are left out: nothing could be coloured on them.
        maps = [self._map_layer(key) for key in self._map_keys()]
        return maps or [self._grid_layer(key) for key in self._sources.store.grid_keys(self.slide_id)]

    def _map_keys(self) -> list[str]:
        expression = self._sources.expression
        if expression is None:
            return []
        keys = expression.location.folders(self.slide_id)
        return [k for k in keys if expression.location.exists(f"{self.slide_id}/{k}/expression/zarr.json")]

    def _map_layer(self, key: str) -> Layer:
        assert self._sources.expression is not None
        stored = self._sources.expression.map(self.slide_id, key)
        return Layer(key, stored.grid, stored.rgb, stored.tissue, stored)

    def _grid_layer(self, key: str) -> Layer:
        stored = self._sources.store.grid(self.slide_id, key)
        return Layer(key, stored.grid, stored.rgb, stored.tissue, None)

    @property
    def measured(self) -> MeasuredSpots | None:
        """Its spots, if a sample sheet names them."""
        with self._lock:
            return self._measured

    @cached_property
    def _measured(self) -> MeasuredSpots | None:
        sample = self._sources.samples.get(self.slide_id)
        record = self.record
        return MeasuredSpots(sample, record.mpp, record.size_px) if sample and sample.expression else None

    def describe(self) -> dict[str, Any]:
        """Return what the page needs first; only metadata is read."""
        record, layers = self.record, self.layers
        notes = []
        if self._sources.expression is not None and not any(layer.stored for layer in layers):
            notes.append("There is no map of this slide; make one with: histosge predict")
        if not layers:
            notes.append("The store holds no grid of this slide; finish it with: histosge embed")
        return {
            "id": self.slide_id,
            "size_um": [side * record.mpp for side in record.size_px],
            "size_px": list(record.size_px),
            "mpp": record.mpp,
            "thumbnail": _grid_placement(layers[0].grid) if layers else None,
            "layers": [layer.key for layer in layers],
            "spots": self.measured is not None,
            "notes": notes,
        }

    def thumbnail(self) -> bytes:
        """Return the mean colours of the first layer's patches as PNG, one pixel a patch.

        Raises
        ------
        LookupError
            If the store holds no grid of it.
        """
        buffer = io.BytesIO()
        Image.fromarray(self._layer(0).rgb).save(buffer, "PNG")
        return buffer.getvalue()

    def _layer(self, number: int) -> Layer:
        if not 0 <= number < len(self.layers):
            raise LookupError(f"there is no layer {number}")
        return self.layers[number]

    def describe_layer(self, number: int) -> dict[str, Any]:
        """Return where a layer's patches lie, its genes, and what is known of each."""
        layer = self._layer(number)
        found: dict[str, Any] = {"key": layer.key, **_grid_placement(layer.grid), "genes": []}
        if layer.stored is not None:
            found["genes"] = list(layer.stored.genes)
            found["unit"] = layer.stored.array.attrs.get("units", "")
            found["made_by"] = {
                # Fingerprints are 64 digits long; a few tell two models apart.
                k: str(v)[:16]
                for k, v in layer.stored.array.attrs.get("made_by", {}).items()
            }
            found |= per_gene(layer.stored)
            found["caveat"] = f"{_training_sentence(layer.stored)} {SCORES}"
            found["training"] = _training_words(layer.stored)
        # A table that does not fit is a note on the page: the genes of the layer are still of use.
        try:
            labels = self.labels(number)
        except ViewError as error:
            labels = None
            found["note"] = str(error)
        found["domains"] = int(labels.max()) + 1 if labels is not None else 0
        if found["domains"]:
            found["domains_by"] = self._domains_made_by(layer)
        found["tissue"] = True
        found["agreement"] = layer.stored is not None and self.measured is not None
        found |= self._describe_embeddings(layer)
        return found

    def _describe_embeddings(self, layer: Layer) -> dict[str, Any]:
        """Return what of the feature store can be shown on a layer: pictures of embeddings, quality flags."""
        store = self._sources.store
        found: dict[str, Any] = {
            "quality": quality_names(store.location, f"{self.slide_id}/{layer.key}", layer.grid)
        }
        if found["quality"]:
            found["quality_by"] = (
                "Quality flags, as histosge embed found them. A patch with several has the colour of the first that is not "
                "hidden. Flags mark patches; only those that are skipped were left out."
            )
        encoder = self._sources.pictures.encoder(self.slide_id, layer.key)
        if encoder is not None:
            fitted = f"fitted on a sample of up to {SAMPLE_PATCHES} patches of at most {SAMPLE_SLIDES} slides, for all"
            found["components"] = (
                f"The first three principal components of the embeddings ({encoder}) as red, green and blue; {fitted}."
            )
            found["clusters"] = N_CLUSTERS
            found["clusters_by"] = (
                f"k-means on {COMPONENTS} principal components of the embeddings ({encoder}); {fitted}. For a whole "
                "cohort, and other numbers of clusters: histosge analyse STORE clusters"
            )
        return found

    def pictures(self, number: int) -> Pictures:
        """Return the pictures of a layer's embeddings.

        Raises
        ------
        LookupError
            If the store holds no embeddings of its grid.
        """
        layer = self._layer(number)
        with self._lock:
            if number not in self._pictures:
                self._pictures[number] = self._sources.pictures.pictures(self.slide_id, layer.key)
            return self._pictures[number]

    @cached_property
    def _pictures(self) -> dict[int, Pictures]:
        return {}

    def quality(self, number: int) -> NDArray[np.uint8]:
        """Return the quality flags of a layer's patches as bits, ``(n_rows, n_cols)``.

        Raises
        ------
        LookupError
            If the store holds none.
        """
        layer, location = self._layer(number), self._sources.store.location
        path = f"{self.slide_id}/{layer.key}"
        if not quality_names(location, path, layer.grid):
            raise LookupError("the store holds no quality flags of this grid")
        return read_array(location, f"{path}/quality", layer.grid.shape)

    def agreement(self, number: int, gene: int) -> dict[str, Any]:
        """Return how well a predicted gene agrees with the slide's own spots, see `SpotAgreement.pearson`.

        Raises
        ------
        LookupError
            If the slide has no spots, or no such gene is predicted.
        """
        values = self.gene_values(number, gene)
        stored = self._layer(number).stored
        if self.measured is None or stored is None or "error" in self.describe_spots():
            raise LookupError("no spots are known of this slide")
        with self._lock:
            if number not in self._agreements:
                known = np.isfinite(values) & stored.is_tissue
                self._agreements[number] = SpotAgreement(stored, self.measured.spots, known)
        column = self.measured.column.get(stored.genes[gene])
        if column is None:
            return {"r": None, "n": 0}
        return self._agreements[number].pearson(values, self.measured.values(column))

    @cached_property
    def _agreements(self) -> dict[int, SpotAgreement]:
        return {}

    def tissue(self, number: int) -> NDArray[np.uint8]:
        """Return the share of each patch of a layer that is tissue, 0..255, ``(n_rows, n_cols)``."""
        return self._layer(number).tissue

    def labels(self, number: int) -> Labels | None:
        """Return the domain of each patch, ``(n_rows, n_cols)``; None if none are known.

        Raises
        ------
        ViewError
            If the table of labels is of another grid.
        """
        layer, sources = self._layer(number), self._sources
        labels = self._stored_labels(layer)
        if labels is None and sources.domains is not None:
            labels = table_domains(sources.domains, self.slide_id, layer.grid)
        return labels

    def _stored_labels(self, layer: Layer) -> Labels | None:
        expression = self._sources.expression
        if layer.stored is None or expression is None:
            return None
        return stored_domains(expression.location, f"{self.slide_id}/{layer.key}", layer.grid)

    def _domains_made_by(self, layer: Layer) -> str:
        folder = self._sources.domains
        if folder is None or self._stored_labels(layer) is not None:
            return stored_domains_made_by()
        return table_domains_made_by(folder, self.slide_id)

    def strata(self, number: int) -> NDArray[np.int16]:
        """Return each patch's stratum of predicted depth, which selects its half width; -1 where there is none.

        Raises
        ------
        LookupError
            If the layer has no half widths by depth.
        """
        stored = self._layer(number).stored
        if stored is None or not has_depth_strata(stored):
            raise LookupError(f"layer {number} has no half widths by depth")
        return stored.read_strata()

    def gene_values(self, number: int, gene: int) -> GridValues:
        """Return a predicted gene over a layer, ``(n_rows, n_cols)``.

        Raises
        ------
        LookupError
            If there is no such layer or gene.
        """
        stored = self._layer(number).stored
        if stored is None:
            raise LookupError(f"nothing is predicted on layer {number}")
        with self._lock:
            reader = self._gene_readers.setdefault(number, GeneReader(stored, self._sources.gene_cache))
        return reader.read(gene)

    @cached_property
    def _gene_readers(self) -> dict[int, GeneReader]:
        return {}

    def compare_region(
        self, number: int, region: shapely.Geometry, other: shapely.Geometry | None = None
    ) -> dict[str, Any]:
        """Compare the genes of a region with those of another one, or with the rest of the tissue.

        Parameters
        ----------
        number
            Of the layer whose patches count.
        region, other
            In microns, see `histosge.viewer.region_means`.

        Returns
        -------
        dict
            ``predicted`` and ``measured``, each as `histosge.viewer.region_means.compare` gives it, in the order of the
            layer's and of the spots' genes; None where there is none.
        """
        found: dict[str, Any] = {"predicted": None, "measured": None}
        stored = self._layer(number).stored if self.layers else None
        if stored is not None:
            inside = patches_inside(region, stored.grid) & stored.is_tissue
            if other is None:
                within, others = self._region_and_rest(number, stored, inside)
            else:
                wanted = patches_inside(other, stored.grid) & stored.is_tissue
                within, others = map_moments(stored.array, stored.planned(), inside, wanted)
            found["predicted"] = compare(within, others)
        if self.measured is not None and "error" not in self.describe_spots():
            values, xy_um = self.measured.log_values, self.measured.spots.xy_um
            inside = shapely.contains_xy(region, xy_um)
            outside = ~inside if other is None else shapely.contains_xy(other, xy_um)
            found["measured"] = compare(spot_moments(values, inside), spot_moments(values, outside))
        return found

    def _region_and_rest(self, number: int, stored: StoredMap, inside: Mask) -> list[Moments]:
        """Return those of a region and of the rest of the tissue; after the first time, from the region's blocks alone."""
        with self._lock:
            total = self._totals.get(number)
        if total is not None:
            (within,) = map_moments(stored.array, stored.planned(), inside)
            return [within, total - within]
        # Not under the lock, as the whole map is read: other requests of this slide go on meanwhile.
        within, others = map_moments(stored.array, stored.planned(), inside, stored.is_tissue & ~inside)
        with self._lock:
            self._totals[number] = within + others
        return [within, others]

    @cached_property
    def _totals(self) -> dict[int, Moments]:
        return {}

    def describe_spots(self) -> dict[str, Any]:
        """Return the measured spots; an ``error`` in their place where they cannot be read."""
        if self.measured is None:
            raise LookupError("no spots are named for this slide")
        # Expression that cannot be read is the sheet's fault: the page shows the reason, and the map all the same.
        try:
            return self.measured.describe()
        except FeatureStoreError as error:
            return {"error": str(error)}


def _training_sentence(stored: StoredMap) -> str:
    if "spots" in stored.array.attrs.get("made_by", {}):
        return CONDITIONED
    return trained_on_sentence(stored.trained_on)


def _training_words(stored: StoredMap) -> str:
    """Return in two words whether the slide was held out, as the model's card had it when the map was made."""
    if "spots" in stored.array.attrs.get("made_by", {}):
        return "conditioned on spots"
    if stored.trained_on is None:
        return "training not recorded"
    return "trained on" if stored.trained_on else "held out"


def _grid_placement(grid: PatchGrid) -> dict[str, Any]:
    """Return where a grid's pixels lie when each patch is drawn as the square of one stride around its centre."""
    corner = (grid.patch_um - grid.stride_um) / 2
    origin = [corner + start for start in grid.origin_um]
    return {"shape": list(grid.shape), "origin_um": origin, "step_um": grid.stride_um}
