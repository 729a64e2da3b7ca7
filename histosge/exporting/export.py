"""One call for every format: what lies in a store -> files of other tools, one per slide unless said otherwise.

Nothing that exists is overwritten but single files, which are replaced when the new one is whole.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from featurestore.events import OnMessage, ignore_message
from featurestore.exchange.h5 import write_h5
from featurestore.slides.protocol import Slide
from featurestore.storage.store import Store
from histosge.errors import ExportError
from histosge.exporting.domain_labels import domain_labels, read_labels
from histosge.exporting.formats.anndata_files import write_anndata
from histosge.exporting.formats.geojson import write_geojson
from histosge.exporting.formats.heat_map_tiff import write_tiffs
from histosge.exporting.formats.ome_zarr import write_ome_zarr
from histosge.exporting.formats.parquet import write_parquet
from histosge.exporting.formats.spatialdata_zarr import write_spatialdata
from histosge.exporting.open_tables import Choice, is_feature_store, open_tables
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.slide_picture import find_slide

SUFFIXES = {
    "h5ad": ".h5ad",
    "spatialdata": ".zarr",
    "ome-zarr": ".ome.zarr",
    "geojson": ".geojson",
    "tiff": "",
    "parquet": ".parquet",
    "trident": ".h5",
}
"""Format -> how its files end."""


@dataclass(frozen=True)
class ExportSettings:
    """How to write, for the formats that ask.

    Parameters
    ----------
    store
        Feature store that knows where the slides are, for pictures; None to do without.
    picture_mpp
        Of the picture in SpatialData.
    domains
        How many, where the map holds none; or a folder with a table of labels per slide.
    ngff
        Version of OME-Zarr.
    """

    store: str | None = None
    picture_mpp: float = 2.0
    domains: int | Path = 7
    ngff: str = "0.4"


def export(
    url: str,
    out: str | Path,
    to: str,
    choice: Choice | None = None,
    settings: ExportSettings | None = None,
    *,
    on_message: OnMessage = ignore_message,
) -> list[str]:
    """Write a feature store's embeddings or an expression store's maps in another tool's format.

    Parameters
    ----------
    url
        Feature store or expression store, a folder or URL: which of them is seen.
    out
        File or folder on this machine. With several slides, a folder with one file each; SpatialData holds all.
    to
        One of `SUFFIXES`.
    on_message
        Called with remarks, such as on a slide that cannot be reached.

    Returns
    -------
    list of str
        One line per thing written.

    Raises
    ------
    ExportError, StoreError, MissingExtraError
        If the format is unknown, the store does not fit it, something is in the way, or an extra is missing.
    """
    choice, settings, out = choice or Choice(), settings or ExportSettings(), Path(out)
    _check(url, out, to)
    if to == "trident":
        return _trident(url, out, choice)
    tables = open_tables(url, choice)
    with ExitStack() as stack:
        slides = [_slide(table, url, to, settings, stack, on_message) for table in tables]
        if to == "spatialdata":
            _check_free(out)
            names = write_spatialdata(tables, slides, out, settings.picture_mpp)
            return [f"{out}: {', '.join(names)}"]
        return [
            _write(table, slide, _place(out, to, table, len(tables)), to, settings)
            for table, slide in zip(tables, slides, strict=True)
        ]


def _check(url: str, out: Path, to: str) -> None:
    if to not in SUFFIXES:
        raise ExportError(f"cannot export to {to!r}; known: {', '.join(SUFFIXES)}")
    if "://" in str(out) or str(out).startswith(("s3:/", "memory:/")):
        raise ExportError(f"{out} is no folder on this machine; export there, then copy it up")
    if to == "trident" and not is_feature_store(url):
        raise ExportError(
            f"TRIDENT files hold embeddings; {url} is an expression store, give the feature store"
        )
    if to in ("ome-zarr", "tiff") and is_feature_store(url):
        raise ExportError(f"{to} pictures are of genes; {url} is a feature store, give an expression store")


def _slide(
    table: PatchTable, url: str, to: str, settings: ExportSettings, stack: ExitStack, on_message: OnMessage
) -> Slide | None:
    if to not in ("h5ad", "spatialdata"):
        return None
    slide, remark = find_slide(table, settings.store, url)
    if slide is not None:
        stack.callback(slide.close)
    else:
        on_message(remark)
    return slide


def _place(out: Path, to: str, table: PatchTable, n_tables: int) -> Path:
    """Return where one slide goes: `out` itself if it is the only one and `out` is named like such a file."""
    suffixes = {"h5ad": (".h5ad", ".zarr"), "tiff": ()}.get(to, (SUFFIXES[to],))
    if n_tables == 1 and (out.name.lower().endswith(suffixes) or to == "ome-zarr"):
        return out
    return out / f"{table.slide_id}{SUFFIXES[to]}"


def _check_free(path: Path) -> None:
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise ExportError(f"{path} exists and is not overwritten; remove it, or give another OUT")
    if path.is_dir():
        path.rmdir()


def _write(table: PatchTable, slide: Slide | None, path: Path, to: str, settings: ExportSettings) -> str:
    if path.suffix == ".zarr":
        _check_free(path)
    elif path.is_dir() and to not in ("tiff", "ome-zarr"):
        raise ExportError(f"{path} is a folder, where a file would go; give another OUT")
    columns = "genes" if table.what == "expression" else "features"
    size = f"{len(table)} patches x {len(table.names)} {columns}"
    if to == "h5ad":
        write_anndata(table, path, slide)
    elif to == "parquet":
        write_parquet(table, path)
    elif to == "ome-zarr":
        _check_free(path)
        size = f"{len(table.names)} genes, {write_ome_zarr(table, path, settings.ngff)} levels"
    elif to == "tiff":
        size = f"{write_tiffs(table, path)} files"
    else:
        given = settings.domains
        labels = domain_labels(table, given) if isinstance(given, int) else read_labels(table, given)
        pieces = write_geojson(labels, table.grid, path)
        size = f"{len(set(labels[labels >= 0].tolist()))} domains in {pieces} polygons"
    return f"{path}: {size}"


def _trident(url: str, out: Path, choice: Choice) -> list[str]:
    source = Store.open(url)
    lines = []
    slide_ids: Sequence[str] = choice.slide_ids or source.slide_ids()
    for slide_id in slide_ids:
        grid_key, key = source.select(choice.grid, choice.encoder, slide_id)
        path = out / f"{slide_id}.h5"
        lines.append(f"{path}: {write_h5(source, slide_id, grid_key, key, path)} patches")
    return lines
