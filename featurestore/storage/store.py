"""A feature store: slides, their grids, and one embedding array per encoder.

Metadata is written by one process (the planner), blocks by many. An array or group that exists
carries the identity of what it was made from; asking for another is refused, with both values.
`docs/SPEC.md` says what each name means; `validate` checks it.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec
from zarr.errors import ContainsArrayError

from featurestore.blocks import DEFAULT_BLOCK, Block, planned_blocks
from featurestore.credentials import redact
from featurestore.documents import DocumentError, convert
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import (
    IdentityMismatchError,
    StoreError,
)
from featurestore.grid import PatchGrid
from featurestore.location import Location, PathOrUrl, store_location
from featurestore.names import RESERVED, check_new_name, check_segment, is_segment, slug
from featurestore.storage.block_array import FLOAT16, BlockArray
from featurestore.storage.choose_embedding import choose_embedding
from featurestore.storage.coding import Coding
from featurestore.storage.layout import (
    EMBEDDING,
    EMBEDDING_DIMS,
    FAILURES,
    GRID_ARRAYS,
    SPEC_NAME,
    SPEC_VERSION,
    check_encoder_key,
    embedding_path,
    encoder_path,
    failure_path,
    grid_path,
)
from featurestore.storage.private_map import PrivateMap, new_token
from featurestore.storage.private_text import remove_names
from featurestore.storage.stored_documents import (
    EncoderAttrs,
    FailureRecord,
    SlideAttrs,
    check_on_grid,
    parse_grid,
)
from featurestore.storage.zarr_metadata import (
    consolidate,
    consolidated_documents,
    create_root,
    document_label,
    open_array,
    open_root,
    read_array,
    read_attrs,
    write_group,
)
from featurestore.tissue.survey import Survey
from featurestore.tissue.threshold import is_tissue

MAX_REASON = 2000
"""Letters that are shown of why something failed."""


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
        attrs = self._encoder_attrs(embedding_path(slide_id, grid_key, encoder_key))
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

    def _encoder_attrs(self, path: str) -> EncoderAttrs | None:
        found = read_attrs(self.location, path).get("encoder")
        label = document_label(self.location, path)
        return convert(found, EncoderAttrs, label, at="attributes.encoder") if found else None

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
        path = grid_path(slide_id, grid.spec.key)
        values: dict[str, NDArray[Any]] = {
            "y": grid.y_um,
            "x": grid.x_um,
            "tissue": survey.tissue,
            "rgb": survey.rgb,
        }
        for name, (dims, dtype) in GRID_ARRAYS.items():
            attrs: dict[str, Any] = {"units": "micrometer"} if name in dims else {}
            _write_array(self.location, f"{path}/{name}", np.asarray(values[name], dtype=dtype), dims, attrs)
        # Last, since a grid counts as written once its group has attributes: a killed run leaves arrays without them.
        write_group(
            self.location,
            path,
            {"grid": grid.to_attrs(), "tissue": dict(survey.method), "software": dict(software)},
        )

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
        check_encoder_key(identity.key)
        path = embedding_path(slide_id, grid.spec.key, identity.key)
        stored = self._encoder_attrs(path)
        if stored is not None:
            self._check_encoder(stored, identity, slide_id, grid.spec.key)
            return self._check_coding(self._open_embedding(path, grid), coding)
        if self.location.exists(f"{path}/c") and not self.location.exists(f"{path}/zarr.json"):
            # Blocks without an array: a run wrote them after `rm` had removed it. They would count as done, although
            # they may come from another encoder.
            self.location.remove(f"{path}/c")
        write_group(self.location, encoder_path(slide_id, grid.spec.key, identity.key), {})
        # A block larger than the grid would be stored with its padding.
        rows, cols = min(block_shape[0], grid.n_rows), min(block_shape[1], grid.n_cols)
        try:
            return BlockArray.create(
                self.location,
                path,
                shape=(grid.n_rows, grid.n_cols, identity.dim),
                chunks=(rows, cols, identity.dim),
                dtype="float16",
                dims=EMBEDDING_DIMS,
                attrs={**(attrs or {}), "encoder": {**identity_attrs(identity)}},
                coding=coding or FLOAT16,
            )
        except ContainsArrayError:  # another run created it since we looked: it must be the same encoder, too
            stored = self._encoder_attrs(path) or EncoderAttrs("-", 1, {}, "")
            self._check_encoder(stored, identity, slide_id, grid.spec.key)
            return self._check_coding(self._open_embedding(path, grid), coding)

    def _check_coding(self, array: BlockArray, coding: Coding | None) -> BlockArray:
        if coding is not None and array.coding != coding:
            slide_id, grid_key, encoder_slug, _ = array.path.split("/")
            raise IdentityMismatchError(
                f"the embedding {array.path} is stored as {array.coding.name}, now it is to be {coding.name}; leave out "
                f"--store-as to go on, or clear it with: histosge rm {self.location.label} --slide {slide_id} --grid "
                f"{grid_key} --encoder {encoder_slug}"
            )
        return array

    def _open_embedding(self, path: str, grid: PatchGrid) -> BlockArray:
        array = BlockArray.open(self.location, path, read_only=False)
        check_on_grid(f"{self.location.label}/{path}", array.shape, grid)
        return array

    def _check_encoder(
        self, stored: EncoderAttrs, identity: EncoderIdentity, slide_id: str, grid_key: str
    ) -> None:
        # The key, too: `a:b` and `a/b` have the same slug.
        if stored.fingerprint == identity.fingerprint and stored.key == identity.key:
            return
        raise IdentityMismatchError(
            f"{slide_id}/{grid_key} holds embeddings of encoder {stored.key!r} with fingerprint "
            f"{stored.fingerprint[:16]}, now it is {identity.key!r} with {identity.fingerprint[:16]}; clear them with: "
            f"histosge rm {self.location.label} --slide {slide_id} --grid {grid_key} --encoder {slug(identity.key)}"
        )

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
        record = {key: redact(value) if isinstance(value, str) else value for key, value in reason.items()}
        if self.is_private and isinstance(text := record.get("reason"), str):
            record["reason"] = remove_names(text, files, [str(record.get("slide_id", ""))])
        self.location.write_json(path, record)

    def failures(self) -> tuple[dict[str, str], dict[str, list[str]]]:
        """Return why slides could not be opened, and where the records of blocks are; one listing.

        Returns
        -------
        (dict, dict)
            Slide id -> reason, and ``slide/grid/encoder`` -> paths of records.
        """
        blocks: dict[str, list[str]] = {}
        slides: list[str] = []
        for name in sorted(self.location.sizes(FAILURES)):
            of, slash, _ = name.rpartition("/")
            if slash:
                blocks.setdefault(of, []).append(f"{FAILURES}/{name}")
            elif is_segment(name.removesuffix(".json")):
                slides.append(name.removesuffix(".json"))
        return {name: str(self.failure_record(failure_path(name)).reason) for name in slides}, blocks

    def failure_record(self, path: str) -> FailureRecord:
        """Read why something could not be read. A record that is damaged gives its own damage as the reason."""
        # Records decide nothing, so none of them may stop what the blocks themselves decide.
        try:
            label = f"{self.location.label}/{path}"
            found = convert(self.location.read_json(path) or {}, FailureRecord, label)
        except DocumentError as error:
            return FailureRecord(str(error))
        # One line, without characters that a terminal would obey.
        reason = "".join(c if c.isprintable() else " " for c in str(found.reason))[:MAX_REASON]
        return FailureRecord(" ".join(reason.split()), found.block, found.patches)

    def block_failures(self, slide_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield ``(path below the slide's failures, record)`` of every block with unreadable patches."""
        base = f"{FAILURES}/{check_segment(slide_id, 'slide id')}"
        if not self.location.exists(base):
            return
        for name in sorted(self.location.sizes(base)):
            # Only records that name a block: what else may lie there is no record of ours.
            if name.count("/") == 2 and self.failure_record(f"{base}/{name}").block is not None:
                yield name.removesuffix(".json"), self.location.read_json(f"{base}/{name}") or {}

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


def _write_array(
    location: Location, path: str, values: NDArray[Any], dims: tuple[str, ...], attrs: dict[str, Any]
) -> None:
    """Write a small array as one object; an existing one is replaced.

    It is replaced in place, not removed first, since another run of the same command may be reading it.
    """
    store = location.zarr()
    try:
        zarr.create_array(
            store,
            name=path,
            data=values,
            chunks=values.shape,
            compressors=[Crc32cCodec()],
            dimension_names=dims,
            attributes=attrs,
        )
    except ContainsArrayError:
        array = open_array(location, path, read_only=False)
        if array.shape != values.shape or array.dtype != values.dtype:
            location.remove(path)
            _write_array(location, path, values, dims, attrs)
            return
        array[...] = values


def identity_attrs(identity: EncoderIdentity) -> dict[str, Any]:
    """Return an encoder's identity as JSON-ready attributes."""
    return {
        "key": identity.key,
        "dim": identity.dim,
        "facts": identity.facts,
        "fingerprint": identity.fingerprint,
    }
