"""Which slides, maps and columns of a store are exported. An expression store and a feature store are told apart here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featurestore.errors import StoreError, StoreNotFoundError
from featurestore.location import Location, store_location
from featurestore.storage.block_array import check_whole
from featurestore.storage.layout import SPEC_NAME as FEATURE_SPEC
from featurestore.storage.store import Store
from featurestore.storage.zarr_metadata import document_label, read_array, read_attrs
from featurestore.zarr_documents import ArrayDocument, check_node
from histosge.calibration.conformal import TRUSTED
from histosge.errors import ExportError
from histosge.exporting.patch_table import PatchTable
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.stored_map import StoredMap

# Of a store's slides in a message, which is one line however many there are.
_SHOWN_NAMES = 10


@dataclass(frozen=True)
class ExportSelection:
    """What of a store to export; empty or None means all, or the only one.

    Parameters
    ----------
    slide_ids, genes
        Which slides, and which columns by name.
    grid, encoder
        Needed where the store holds several.
    """

    slide_ids: Sequence[str] = ()
    genes: Sequence[str] = ()
    grid: str | None = None
    encoder: str | None = None


def is_feature_store(url: str) -> bool:
    """Tell a feature store from an expression store.

    Raises
    ------
    StoreNotFoundError
        If there is nothing.
    """
    location = store_location(url)
    if not location.exists():
        raise StoreNotFoundError(
            f"there is no store at {location.label}; give a feature store or an expression store"
        )
    return read_attrs(location, "").get("spec") == FEATURE_SPEC


def open_tables(url: str, selection: ExportSelection, *, allow_empty: bool = False) -> list[PatchTable]:
    """Open what is to be exported, one table per slide.

    Parameters
    ----------
    allow_empty
        Also return tables without a single value; nothing but metadata is read then.

    Raises
    ------
    ExportError, StoreError
        If a slide, grid or gene is not there, or a map is not whole.
    """
    tables = _embeddings(url, selection) if is_feature_store(url) else _maps(url, selection)
    for table in tables:
        command = "embed" if table.kind == "embedding" else "predict"
        check_whole(table.array, table.planned, table.slide_id, command)
        # Now, before anything is written: with many slides the last one is not found empty after an hour.
        if not allow_empty and not len(table):
            raise ExportError(f"slide {table.slide_id!r} has no patch with values; nothing to export")
    return tables


def _maps(url: str, selection: ExportSelection) -> list[PatchTable]:
    store = ExpressionStore.open(url)
    # Listed once: on an object store a listing is a request for every slide.
    there = _listed(store)
    tables = []
    for slide_id in selection.slide_ids or there:
        stored = _choose(store, there, slide_id, selection.grid)
        # An expression store may hold arrays that a later version or a user has added: they go along.
        sizes = {"y": stored.grid.n_rows, "x": stored.grid.n_cols, "gene": len(stored.genes)}
        others = _other_arrays(store.location, f"{slide_id}/{stored.grid.spec.key}", sizes)
        tables.append(table_of_map(stored, selection.genes, others))
    return tables


def open_map(url: str, slide_id: str | None = None, grid: str | None = None) -> StoredMap:
    """Open one slide's map in an expression store, whole.

    Parameters
    ----------
    slide_id
        May be None where the store holds a single slide.
    grid
        Needed where the slide has several maps.

    Raises
    ------
    ExportError, StoreError
        If there is no such map, several fit, or its blocks are not all there.
    """
    store = ExpressionStore.open(url)
    there = _listed(store)
    if slide_id is None and len(there) > 1:
        raise ExportError(
            f"{store.location.label} holds maps of {len(there)} slides; name one with --slide: {_few(list(there))}"
        )
    stored = _choose(store, there, next(iter(there)) if slide_id is None else slide_id, grid)
    check_whole(stored.array, stored.planned(), stored.slide_id, "predict")
    return stored


def _listed(store: ExpressionStore) -> dict[str, list[str]]:
    """Return slide id -> keys of its grids; at least one."""
    there: dict[str, list[str]] = {}
    for slide_id, grid in store.maps():
        there.setdefault(slide_id, []).append(grid)
    if not there:
        raise ExportError(f"{store.location.label} holds no map; make one with: histosge predict")
    return there


def _choose(
    store: ExpressionStore, there: Mapping[str, list[str]], slide_id: str, grid: str | None
) -> StoredMap:
    grids = [key for key in there.get(slide_id, ()) if grid in (None, key)]
    if not grids and slide_id in there:
        raise ExportError(
            f"{store.location.label} holds no map of slide {slide_id!r} on grid {grid}; it has: {', '.join(there[slide_id])}"
        )
    if not grids:
        near = get_close_matches(slide_id, there, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"it has: {_few(list(there))}"
        raise ExportError(f"{store.location.label} holds no map of slide {slide_id!r}; {hint}")
    if len(grids) > 1:
        raise ExportError(f"slide {slide_id!r} has several maps; name one with --grid: {', '.join(grids)}")
    return store.map(slide_id, grids[0])


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")


MapArrays = Mapping[str, tuple[tuple[str, ...], NDArray[Any]]]
"""Name -> dims and values of what a map holds beside its expression."""


def table_of_map(stored: StoredMap, genes: Sequence[str] = (), others: MapArrays | None = None) -> PatchTable:
    """Return an opened map as a table; all genes if none is named."""
    columns = gene_columns(stored.genes, genes, stored.slide_id)
    extras = {**_own_arrays(stored), **(others or {})}
    made_by = stored.array.attrs.get("made_by", {})
    return PatchTable(
        stored.slide_id,
        stored.grid,
        stored.rgb,
        stored.array,
        tuple(stored.planned()),
        tuple(stored.genes[i] for i in columns),
        columns,
        "expression",
        {key: str(value) for key, value in made_by.items()} | _facts(stored),
        {name: values for name, (dims, values) in extras.items() if dims == ("y", "x")},
        {name: values[list(columns)] for name, (dims, values) in extras.items() if dims == ("gene",)},
        stored.tissue,
    )


def _own_arrays(stored: StoredMap) -> dict[str, tuple[tuple[str, ...], NDArray[Any]]]:
    """Return what a model predicts besides expression: depth, half widths and trust, as far as the map has them."""
    found: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {}
    if stored.depth is not None:
        depth = stored.depth.read((0, stored.grid.n_rows), (0, stored.grid.n_cols))[..., 0]
        found["log_total_counts"] = ("y", "x"), depth.astype(np.float32)
    if stored.half_width is not None and stored.trust is not None:
        found["half_width"] = ("gene",), stored.half_width
        found["trust"] = ("gene",), stored.trust
        # The decision beside the score, so that nobody has to look up the threshold.
        found["trusted"] = ("gene",), stored.trust >= TRUSTED
    if stored.strata is not None:
        # A column for each stratum, as tables of other tools know no arrays with a further dimension.
        for k, half_width in enumerate(stored.strata.half_width, start=1):
            found[f"half_width_depth_{k}"] = ("gene",), half_width
    return found


def _facts(stored: StoredMap) -> dict[str, str]:
    """Return what a reader has to know: the intervals' level, edges and whom they hold for, and what was trained on."""
    facts = {}
    if stored.strata is not None:
        # Where one half width by depth ends and the next begins, on the scale of `log_total_counts`.
        facts["half_width_depth_edges"] = " ".join(f"{edge:.9g}" for edge in stored.strata.edges)
    if stored.half_width is not None and stored.level is not None:
        facts["half_width_level"] = f"{stored.level:.9g}"
    if stored.claim:
        facts["half_width_claim"] = stored.claim
    if stored.scope:
        facts["trust_scope"] = stored.scope
    if stored.embedding_distance is not None:
        facts["embedding_distance"] = f"{stored.embedding_distance:.9g}"
    if stored.trained_on is not None:
        facts["trained_on_this_slide"] = "yes" if stored.trained_on else "no"
    return facts


def _other_arrays(location: Location, path: str, sizes: Mapping[str, int]) -> MapArrays:
    """Read arrays of a map that this version does not know, with a value for each patch or for each gene."""
    found: dict[str, tuple[tuple[str, ...], NDArray[Any]]] = {}
    for name in location.folders(path):
        document = location.read_json(f"{path}/{name}/zarr.json")
        if document is None:
            continue
        node = check_node(document, document_label(location, f"{path}/{name}"))
        dims = tuple(node.dimension_names or ()) if isinstance(node, ArrayDocument) else ()
        # By dimension names: anything else (x, y, expression itself) is no value of a patch or of a gene.
        if name not in ("tissue", "rim", "gene") and dims in (("y", "x"), ("gene",)):
            # The shape first: a lone array of another size belongs to nothing in the table, and may be of any size.
            found[name] = (
                dims,
                read_array(location, f"{path}/{name}", tuple(sizes[d] for d in dims), "fiubTOU"),
            )
    return found


def gene_columns(names: Sequence[str], wanted: Sequence[str], slide_id: str) -> tuple[int, ...]:
    """Return the places of some genes in a map, in the order in which they are named, each once; of all if none is.

    Raises
    ------
    ExportError
        If the map lacks one, with those of similar names.
    """
    known = {name: i for i, name in enumerate(names)}
    for name in wanted:
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.5)
            hint = (
                f"did you mean {' or '.join(near)}?" if near else f"it has {len(known)}, such as {names[0]!r}"
            )
            raise ExportError(f"the map of {slide_id!r} has no gene {name!r}: {hint}")
    # In the order in which they were named, each once; all of them if none was.
    return tuple(known[name] for name in dict.fromkeys(wanted)) or tuple(range(len(names)))


def _embeddings(url: str, selection: ExportSelection) -> list[PatchTable]:
    if selection.genes:
        raise ExportError(
            "--genes chooses from an expression store; a feature store holds embeddings, not genes"
        )
    store = Store.open(url)
    tables = []
    for slide_id in selection.slide_ids or store.slide_ids():
        grid_key, slug = store.select(selection.grid, selection.encoder, slide_id)
        stored, array = store.grid(slide_id, grid_key), store.embedding(slide_id, grid_key, slug)
        identity = store.identity(slide_id, grid_key, slug)
        dim = array.shape[2]
        tables.append(
            PatchTable(
                slide_id,
                stored.grid,
                stored.rgb,
                array,
                tuple(stored.planned(array.block_shape)),
                tuple(f"{identity.key}_{i}" for i in range(dim)),
                tuple(range(dim)),
                "embedding",
                {"encoder": identity.key, "fingerprint": identity.fingerprint},
                {},
                {},
                stored.tissue,
            )
        )
    if not tables:
        raise StoreError(f"{store.location.label} holds no slide; fill it with: histosge embed")
    return tables
