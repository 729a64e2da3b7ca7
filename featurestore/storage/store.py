"""A feature store: slides, their grids, and one embedding array per encoder.

Metadata is written by one process (the planner), blocks by many. An array or group that exists
carries the identity of what it was made from; asking for another is refused, with both values.
`docs/SPEC.md` says what each name means; `validate` checks it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.blocks import DEFAULT_BLOCK, Block, planned_blocks
from featurestore.documents import DocumentError, convert
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import IdentityMismatchError, StoreError
from featurestore.grid import PatchGrid
from featurestore.location import Location, PathOrUrl, store_location
from featurestore.names import RESERVED, check_new_name, check_segment, is_segment, slug
from featurestore.storage import failure_records
from featurestore.storage.block_array import BlockArray
from featurestore.storage.choose_embedding import choose_embedding
from featurestore.storage.coding import Coding
from featurestore.storage.embedding_array import create_or_open, read_encoder
from featurestore.storage.grid_group import write_grid
from featurestore.storage.layout import (
    EMBEDDING,
    FAILURES,
    SPEC_NAME,
    SPEC_VERSION,
    embedding_path,
    failure_path,
    grid_path,
)
from featurestore.storage.private_map import PrivateMap, new_token
from featurestore.storage.quality_array import read_quality, replace_quality
from featurestore.storage.stored_documents import FailureRecord, SlideAttrs, parse_grid
from featurestore.storage.zarr_metadata import (
    consolidate,
    consolidated_documents,
    create_root,
    document_label,
    open_root,
    read_array,
    read_attrs,
    write_group,
)
from featurestore.tissue.survey import Survey
from featurestore.tissue.threshold import is_tissue


@dataclass(frozen=True)
class SlideRecord:
    """The metadata of a slide in a store.

    Parameters
    ----------
    slide_id
        Its name in the store.
    source
        Path or URL of the file, without credentials.
    size_px, mpp
        ``(width, height)`` and microns per pixel at level 0.
    fingerprint
        Of the file's content, see `featurestore.slides.fingerprint`.
    """

    slide_id: str
    source: str
    size_px: tuple[int, int]
    mpp: float
    fingerprint: str

    def to_attrs(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return {
            "source": self.source,
            "size_px": list(self.size_px),
            "mpp": self.mpp,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class StoredGrid:
    """A grid as it is stored: the positions of its patches, and which of them hold tissue.

    Parameters
    ----------
    slide_id, grid
        The slide, and the grid.
    tissue
        Share of each patch that is tissue, 0..255, shape ``(n_rows, n_cols)``.
    rgb
        Mean colour of each patch, ``(n_rows, n_cols, 3)``.
    """

    slide_id: str
    grid: PatchGrid
    tissue: NDArray[np.uint8]
    rgb: NDArray[np.uint8]

    @property
    def is_tissue(self) -> NDArray[np.bool_]:
        """Which patches hold enough tissue to be encoded."""
        return is_tissue(self.tissue)

    def planned(self, block_shape: tuple[int, int]) -> list[Block]:
        """Return the blocks that hold at least one tissue patch: those that are stored, or will be."""
        return planned_blocks(self.is_tissue, block_shape)


class Store:
    """A feature store at a location. Make one with `Store.open` or `Store.open_or_create`."""

    def __init__(self, location: Location, private_token: str = "") -> None:
        self.location = location
        self.private_map = PrivateMap(private_token) if private_token else None
        """Where the file names of a private store are; None for a store that holds them itself."""

    @property
    def is_private(self) -> bool:
        """Whether no name of a slide's file may stand in it."""
        return self.private_map is not None

    @classmethod
    def open(cls, url: PathOrUrl) -> "Store":
        """Open a store that exists.

        Raises
        ------
        StoreNotFoundError
            If there is nothing at `url`.
        StoreError
            If there is something else, or a store of a newer version.
        """
        location = store_location(url)
        absent = f"there is no store at {location.label}; make one with: histosge embed"
        root = open_root(location, SPEC_NAME, SPEC_VERSION, "feature store", absent)
        return cls(location, root.private)

    @classmethod
    def open_or_create(cls, url: PathOrUrl, *, private: bool | None = None) -> "Store":
        """Open a store, or make an empty one where there is nothing yet.

        Parameters
        ----------
        private
            Whether it keeps file names out; None to open one of either kind.

        Raises
        ------
        StoreError
            If there is something else, or a store of the other kind.
        """
        location = store_location(url, writable=True)
        attrs = {"private": new_token()} if private else None
        root = create_root(location, SPEC_NAME, SPEC_VERSION, "feature store", attrs)
        if private and not root.private:
            raise StoreError(
                f"{location.label} was made without --private and may hold file names; give a new store, or leave --private "
                "out"
            )
        if private is False and root.private:
            raise StoreError(
                f"{location.label} was made with --private and holds no file names; give --private again"
            )
        return cls(location, root.private)

    # ------------------------------------------------------------------ what the store holds

    def slide_ids(self) -> list[str]:
        """Return the slides with metadata, sorted; one listing."""
        # Not the folders that begin with an underscore, which hold no slides.
        names = [name for name in self.location.folders() if is_segment(name)]
        # Other programs leave folders of their own, such as .ipynb_checkpoints. To look into every folder of a remote store
        # would be a request each, minutes for ten thousand slides: there only names that begin with a dot are doubtful.
        return [
            name
            for name in names
            if not (self.location.is_local or name.startswith("."))
            or self.location.is_file(f"{name}/zarr.json")
        ]

    def grid_keys(self, slide_id: str) -> list[str]:
        """Return the grids of a slide whose survey was written completely."""
        names = filter(is_segment, self.location.folders(check_segment(slide_id, "slide id")))
        return [key for key in names if read_attrs(self.location, grid_path(slide_id, key)).get("grid")]

    def encoder_slugs(self, slide_id: str, grid_key: str) -> list[str]:
        """Return the slugs of the encoders with an embedding array on a grid."""
        path = grid_path(slide_id, grid_key)
        # The array's document is looked for, since an encoder's group is written first: a killed run leaves it alone.
        return [
            name
            for name in self.location.folders(path)
            if is_segment(name)
            and name not in RESERVED
            and self.location.exists(f"{path}/{name}/{EMBEDDING}/zarr.json")
        ]

    def slide(self, slide_id: str) -> SlideRecord:
        """Return the metadata of a slide.

        Raises
        ------
        StoreError
            If there is no such slide.
        """
        attrs = self._slide_attrs(slide_id)
        if attrs is None:
            raise StoreError(f"{self.location.label} holds no slide {slide_id!r}; see: histosge ls")
        source = attrs.source
        if not source and self.private_map is not None:
            source = self.private_map.sources.get(slide_id, "")
        return SlideRecord(slide_id, source, attrs.size_px, attrs.mpp, attrs.fingerprint)

    def _slide_attrs(self, slide_id: str) -> SlideAttrs | None:
        found = read_attrs(self.location, check_segment(slide_id, "slide id")).get("slide")
        label = document_label(self.location, slide_id)
        return convert(found, SlideAttrs, label, at="attributes.slide") if found else None

    def grid_attrs(self, slide_id: str, grid_key: str) -> dict[str, Any]:
        """Return the attributes of a grid's group; empty if there is none.

        Raises
        ------
        DocumentError
            If ``grid`` or ``tissue`` is there and is no object.
        """
        attrs = read_attrs(self.location, grid_path(slide_id, grid_key))
        for name in ("grid", "tissue"):
            if attrs.get("grid") and not isinstance(attrs.get(name), dict):
                label = document_label(self.location, grid_path(slide_id, grid_key))
                raise DocumentError(f"{label} is damaged: attributes.{name} is no object")
        return attrs

    def grid(self, slide_id: str, grid_key: str) -> StoredGrid:
        """Read a grid with its tissue and thumbnail.

        Raises
        ------
        StoreError
            If there is no such grid.
        """
        attrs = self.grid_attrs(slide_id, grid_key)
        if not attrs.get("grid"):
            raise StoreError(f"{self.location.label} holds no grid {grid_key!r} of slide {slide_id!r}")
        path = grid_path(slide_id, grid_key)
        grid = parse_grid(attrs["grid"], document_label(self.location, path))
        tissue = read_array(self.location, f"{path}/tissue", grid.shape)
        return StoredGrid(slide_id, grid, tissue, read_array(self.location, f"{path}/rgb", (*grid.shape, 3)))

    def quality(self, slide_id: str, grid_key: str, shape: tuple[int, int]) -> NDArray[np.uint8] | None:
        """Read the flags of a grid's patches, see `featurestore.tissue.flags`; None if the grid has none.

        Parameters
        ----------
        shape
            Of the grid, which is checked before memory is taken.

        Raises
        ------
        DocumentError
            If they are damaged.
        """
        return read_quality(self.location, grid_path(slide_id, grid_key), shape)

    def embedding(
        self, slide_id: str, grid_key: str, encoder_key: str, *, read_only: bool = True
    ) -> BlockArray:
        """Open an embedding array.

        Raises
        ------
        StoreError
            If there is none.
        """
        return BlockArray.open(
            self.location, embedding_path(slide_id, grid_key, encoder_key), read_only=read_only
        )

    def identity(self, slide_id: str, grid_key: str, encoder_key: str) -> EncoderIdentity:
        """Return the identity of the encoder that made an embedding.

        Raises
        ------
        StoreError
            If there is no such embedding.
        """
        attrs = read_encoder(self.location, embedding_path(slide_id, grid_key, encoder_key))
        if attrs is None:
            raise StoreError(f"{slide_id}/{grid_key} holds no embedding of {encoder_key!r}; see: histosge ls")
        return EncoderIdentity(attrs.key, attrs.dim, attrs.facts)

    def stain(self, slide_id: str, grid_key: str, encoder_key: str) -> tuple[dict[str, Any], str] | None:
        """Return how the stain of a slide was normalised for an encoder, and the document's label; None if it was not.

        The values are as they are stored: see `featurestore.encoders.stain_normalisation.parse_fit`.
        """
        path = embedding_path(slide_id, grid_key, encoder_key)
        found = read_attrs(self.location, path).get("stain")
        if found is None:
            return None
        label = document_label(self.location, path)
        if not isinstance(found, dict):
            raise DocumentError(f"{label} is damaged: attributes.stain is no object")
        return found, label

    def select(self, grid_key: str | None, encoder_key: str | None, slide_id: str) -> tuple[str, str]:
        """Return the grid and the encoder of a slide where the user named only one of them, or none.

        Returns
        -------
        (str, str)
            Grid key and encoder slug.

        Raises
        ------
        AmbiguousSelectionError
            If several fit; the message lists them.
        StoreError
            If none fits.
        """
        pairs = [(g, e) for g in self.grid_keys(slide_id) for e in self.encoder_slugs(slide_id, g)]
        return choose_embedding(
            {slide_id: pairs}, grid_key, encoder_key, f"slide {slide_id!r} in {self.location.label}"
        )

    # ------------------------------------------------------------------ the planner writes

    def add_slide(self, record: SlideRecord) -> None:
        """Write a slide's metadata, or check that what is there is the same slide.

        Raises
        ------
        IdentityMismatchError
            If the store holds another file or another mpp under this id: patches of two scales would share a grid.
        StoreError
            If the id cannot be a name in a store.
        """
        check_new_name(record.slide_id, "slide id")
        stored = self._slide_attrs(record.slide_id)
        if stored is not None:
            # Not the path: a slide may be moved, or be read from a copy.
            for name in ("fingerprint", "mpp"):
                if getattr(stored, name) != getattr(record, name):
                    raise IdentityMismatchError(
                        f"slide {record.slide_id!r} is stored with {name} {getattr(stored, name)}, now it is "
                        f"{getattr(record, name)}; clear it with: histosge rm {self.location.label} "
                        f"--slide {record.slide_id}"
                    )
            return
        source = "" if self.is_private else record.source
        write_group(self.location, record.slide_id, {"slide": {**record.to_attrs(), "source": source}})

    def add_grid(self, slide_id: str, grid: PatchGrid, survey: Survey, software: dict[str, str]) -> None:
        """Write a grid with its tissue and thumbnail."""
        write_grid(self.location, slide_id, grid, survey, software)

    def write_quality(self, slide_id: str, grid_key: str, quality: NDArray[np.uint8]) -> None:
        """Replace the flags of a grid that has some, in one object.

        Raises
        ------
        StoreError
            If the grid has none.
        """
        replace_quality(self.location, grid_path(slide_id, grid_key), quality)

    def add_embedding(
        self,
        slide_id: str,
        grid: PatchGrid,
        identity: EncoderIdentity,
        block_shape: tuple[int, int] = DEFAULT_BLOCK,
        attrs: Mapping[str, Any] | None = None,
        coding: Coding | None = None,
    ) -> BlockArray:
        """Create an encoder's embedding array, or open the one that is there.

        Parameters
        ----------
        attrs
            Attributes besides the encoder's identity; written only if the array is created.
        coding
            How values are coded; None for float16, or as the array that is there.

        Raises
        ------
        IdentityMismatchError
            If what is stored under the encoder's slug was made by another encoder, or is coded otherwise.
        StoreError
            If the encoder's key cannot name a folder.
        """
        return create_or_open(self.location, slide_id, grid, identity, block_shape, attrs, coding)

    def is_consolidated(self, slide_id: str, paths: Iterable[str]) -> bool:
        """Tell whether a slide's group already holds the metadata of some arrays."""
        known = consolidated_documents(self.location, slide_id)
        return all(path.removeprefix(f"{slide_id}/") in known for path in paths)

    def consolidate(self, slide_id: str) -> None:
        """Copy the metadata of a slide's arrays into its group, so that opening the slide costs one request."""
        consolidate(self.location, slide_id)

    # ------------------------------------------------------------------ failures and removal

    def record_failure(self, path: str, reason: dict[str, Any], files: Sequence[str] = ()) -> None:
        """Write down why something could not be read. It is for diagnosis; no decision depends on it.

        Parameters
        ----------
        files
            What the reason may be about: a private store keeps their names out.
        """
        failure_records.write(self.location, path, reason, files if self.is_private else None)

    def failures(self) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Return why slides could not be opened, and where the records of blocks are; one listing.

        Returns
        -------
        (dict, dict)
            Slide id -> reason, and ``slide/grid/encoder`` -> paths of records.
        """
        return failure_records.list_all(self.location)

    def failure_record(self, path: str) -> FailureRecord:
        """Read why something could not be read. A record that is damaged gives its own damage as the reason."""
        return failure_records.read(self.location, path)

    def block_failures(self, slide_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(path below the slide's failures, record)`` of every block with unreadable patches."""
        return failure_records.of_blocks(self.location, slide_id)

    def remove(self, slide_id: str, grid_key: str | None = None, encoder_key: str | None = None) -> None:
        """Remove a slide, one of its grids, or one encoder of a grid, with its failure records."""
        parts = [slide_id, *([grid_key] if grid_key else []), *([slug(encoder_key)] if encoder_key else [])]
        for part in parts:
            check_segment(part, "name")  # `..` would remove what lies beside the store
        self.location.remove("/".join(parts))
        self.location.remove("/".join([FAILURES, *parts]))
        if grid_key is None:
            self.location.remove(failure_path(slide_id))
        elif self.location.exists(f"{slide_id}/zarr.json"):
            self.consolidate(slide_id)  # it still lists what was removed
