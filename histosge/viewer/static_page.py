"""A page as files for any web server, or as one HTML file: the same content that the live one serves.

Tiles down to a stated scale, chosen genes. The folder appears when it is complete; an older page there stays until then.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featurestore.earlier_results import staged_result
from featurestore.errors import SlideError
from featurestore.events import OnMessage
from featurestore.whole_file import check_output, restore_replaced
from histosge.errors import ViewError
from histosge.viewer.assets import assets
from histosge.viewer.collection import Collection
from histosge.viewer.one_file import MAX_BYTES, EmbeddedData, one_html_file
from histosge.viewer.shown_slide import ShownSlide

MAX_ALL_GENES = 500
"""Genes that are written without being named. Each is a file per slide, so more have to be chosen."""
PAGE_NAMES = frozenset({"index.html", "static", "data"})
"""Names directly below a page's folder."""
THREADS = 4
# In place of reasons, which name paths of this machine: the page is for others to read.
UNREADABLE = "it could not be read when this page was written"


@dataclass(frozen=True)
class WrittenPage:
    """What was written; nothing if `was_there`: the same page, complete."""

    slides: int
    tiles: int
    genes: int
    n_bytes: int
    was_there: bool = False


def export_page(
    collection: Collection,
    out: Path,
    genes: Sequence[str] = (),
    on_message: OnMessage = lambda _: None,
    *,
    overwrite: bool = False,
) -> WrittenPage:
    """Write a page into a folder.

    Parameters
    ----------
    collection
        What to show; its `finest_mpp` bounds the tiles.
    out
        A new or empty folder, or one of an earlier export.
    genes
        Which; all predicted ones if empty, as long as they are at most `MAX_ALL_GENES`.
    overwrite
        Replace a page of other content, when the new one is complete.

    Raises
    ------
    EarlierResultError
        If a page of other content is there, and `overwrite` is not set.
    ViewError
        If the folder holds something else, a gene is unknown, or too many would be written.
    """
    _check_folder(out)
    chosen = _choose_genes(collection, genes)
    with staged_result(out, overwrite=overwrite) as staged:
        writer = _FolderWriter(staged.path)
        tiles = _write_data(writer, collection, chosen, on_message)
        for name, asset in assets().items():
            writer.write(name, asset.content)
        writer.json("data/index.json", collection.describe())
    return WrittenPage(len(collection.slides), tiles, len(chosen), writer.n_bytes, staged.was_there)


def export_one_file(
    collection: Collection,
    out: Path,
    genes: Sequence[str] = (),
    on_message: OnMessage = lambda _: None,
    *,
    overwrite: bool = False,
) -> WrittenPage:
    """Write a page as one HTML file that opens by a double click; parameters as of `export_page`.

    Raises
    ------
    EarlierResultError
        If a file of other content is there, and `overwrite` is not set.
    ViewError
        If a gene is unknown, or the file would be larger than `MAX_BYTES`.
    """
    if "://" in str(out):
        raise ViewError(f"a page is written to this machine, not to {out}; copy it on from there")
    check_output(out)
    chosen = _choose_genes(collection, genes)
    data = EmbeddedData()
    data.json("data/index.json", collection.describe())
    # Before tiles, which take long: what does not fit without them is refused at once.
    tiles = _write_data(
        data, collection, chosen, on_message, lambda: _check_size(data, out, chosen, collection)
    )
    content = one_html_file(data)
    with staged_result(out, overwrite=overwrite) as staged:
        staged.path.write_bytes(content)
    return WrittenPage(len(collection.slides), tiles, len(chosen), len(content), staged.was_there)


def _check_size(data: EmbeddedData, out: Path, chosen: Sequence[str], collection: Collection) -> None:
    if data.n_bytes <= MAX_BYTES:
        return
    tiles, of_genes, others = (data.sizes.get(kind, 0) / 1e6 for kind in ("tiles", "genes", "other"))
    raise ViewError(
        f"{out} would be larger than {MAX_BYTES / 1e6:.0f} MB (so far {tiles:.0f} MB of tiles, {of_genes:.0f} MB of "
        f"{len(chosen)} genes, {others:.0f} MB of {len(collection.slides)} slides' grids and spots): choose fewer with "
        "--genes A,B and --slide ID, or coarser tiles with --tiles-mpp 8; or give a folder, which has no limit"
    )


def _write_data(
    writer: "_Writer",
    collection: Collection,
    chosen: Sequence[str],
    on_message: OnMessage,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Write everything that the page requests, but its list of slides; return the number of tiles."""
    tiles = 0
    for number, slide in enumerate(collection.slides):
        on_message(f"{slide.slide_id}: maps and spots")
        _write_slide(writer, f"data/{number}", slide, chosen)
        check()
    for number in range(len(collection.slides)):
        tiles += _write_tiles(writer, collection, number, on_message, check)
    if collection.gene_sets:
        writer.json("data/gene-sets.json", collection.describe_gene_sets())
    check()
    return tiles


class _Writer(Protocol):
    """Takes what a page requests, by name."""

    def write(self, name: str, content: bytes) -> None: ...

    def json(self, name: str, value: dict[str, Any]) -> None: ...


@dataclass
class _FolderWriter:
    """Files below one folder, and their bytes."""

    out: Path
    n_bytes: int = 0

    def write(self, name: str, content: bytes) -> None:
        file = self.out / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        self.n_bytes += len(content)

    def json(self, name: str, value: dict[str, Any]) -> None:
        self.write(name, json.dumps(value).encode())


def _write_array(writer: _Writer, name: str, values: "np.ndarray[Any, Any]", kind: str) -> None:
    writer.write(name, np.ascontiguousarray(values, dtype=kind).tobytes())


def _check_folder(out: Path) -> None:
    if "://" in str(out):
        raise ViewError(
            f"a page is written into a folder of this machine, not to {out}; copy it on from there"
        )
    check_output(out, folder=True)
    restore_replaced(out)
    if not out.is_dir() or not any(out.iterdir()):
        return
    # A page may replace a page; its script tells one from a folder of somebody's own.
    if not (out / "static" / "main.js").is_file():
        raise ViewError(
            f"{out} holds something that is no page; nothing was written, give a new or empty folder"
        )
    # The whole folder is replaced, and what a user has put beside the page would be lost.
    if others := sorted({path.name for path in out.iterdir()} - PAGE_NAMES):
        raise ViewError(
            f"{out} holds {', '.join(others[:3])} beside a page, which would be lost; give another folder, or move "
            f"{'it' if len(others) == 1 else 'them'} away first"
        )


def _choose_genes(collection: Collection, genes: Sequence[str]) -> list[str]:
    predicted = dict.fromkeys(gene for gene in _predicted(collection))
    if not genes and predicted:
        if len(predicted) > MAX_ALL_GENES:
            raise ViewError(
                f"the maps hold {len(predicted)} genes; choose up to {MAX_ALL_GENES} with --genes A,B,C"
            )
        return list(predicted)
    measured = dict.fromkeys(
        gene
        for slide in collection.slides
        if slide.measured is not None
        for gene in slide.describe_spots().get("genes", [])
    )
    if not genes and measured:
        raise ViewError(
            f"nothing is predicted and {len(measured)} genes are measured; choose with --genes A,B,C"
        )
    known = predicted | measured
    for gene in genes:
        if gene not in known:
            near = get_close_matches(gene, known, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"{len(known)} genes are known"
            raise ViewError(f"gene {gene!r} is neither predicted nor measured: {hint}")
    return list(dict.fromkeys(genes))


def _predicted(collection: Collection) -> Iterator[str]:
    for slide in collection.slides:
        for layer in slide.layers:
            yield from layer.stored.genes if layer.stored else ()


def _write_slide(writer: _Writer, base: str, slide: ShownSlide, chosen: Sequence[str]) -> None:
    writer.json(f"{base}/slide.json", slide.describe())
    if slide.layers:
        writer.write(f"{base}/thumbnail.png", slide.thumbnail())
    for number in range(len(slide.layers)):
        _write_layer(writer, f"{base}/layers/{number}", slide, number, chosen)
    if slide.measured is not None:
        _write_spots(writer, base, slide, chosen)


def _write_layer(writer: _Writer, base: str, slide: ShownSlide, number: int, chosen: Sequence[str]) -> None:
    found = slide.describe_layer(number)
    if "note" in found:
        found["note"] = f"Domains: {UNREADABLE}."
    column = {gene: i for i, gene in enumerate(found["genes"])}
    kept = [gene for gene in chosen if gene in column]
    for name in ("half_widths", "half_width_texts", "trust", "abstained"):
        if name in found:
            found[name] = [found[name][column[gene]] for gene in kept]
    writer.json(f"{base}/layer.json", {**found, "genes": kept})
    _write_pictures(writer, base, slide, number, found)
    for i, gene in enumerate(kept):
        if found["agreement"]:
            writer.json(f"{base}/agreement/{i}.json", _agreement(slide, number, column[gene]))
        _write_array(writer, f"{base}/genes/{i}.f16", slide.gene_values(number, column[gene]), "<f2")
    if found.get("strata"):
        _write_array(writer, f"{base}/strata.i16", slide.strata(number), "<i2")
    labels = slide.labels(number) if found["domains"] else None
    if labels is not None:
        _write_array(writer, f"{base}/domains.i16", labels, "<i2")


def _write_pictures(
    writer: _Writer, base: str, slide: ShownSlide, number: int, found: dict[str, Any]
) -> None:
    _write_array(writer, f"{base}/tissue.u8", slide.tissue(number), "u1")
    if found["quality"]:
        _write_array(writer, f"{base}/quality.u8", slide.quality(number), "u1")
    if found.get("components"):
        pictures = slide.pictures(number)
        _write_array(writer, f"{base}/components.u8", pictures.rgba, "u1")
        _write_array(writer, f"{base}/clusters.i16", pictures.clusters, "<i2")


def _agreement(slide: ShownSlide, number: int, gene: int) -> dict[str, Any]:
    try:
        return slide.agreement(number, gene)
    except LookupError:
        return {"r": None, "n": 0}  # the spots could not be read, as spots.json says


def _write_spots(writer: _Writer, base: str, slide: ShownSlide, chosen: Sequence[str]) -> None:
    found = slide.describe_spots()
    measured = slide.measured
    if measured is None or "error" in found:
        writer.json(f"{base}/spots.json", {"error": UNREADABLE})
        return
    column = {gene: i for i, gene in enumerate(found["genes"])}
    kept = [gene for gene in chosen if gene in column]
    writer.json(f"{base}/spots.json", {**found, "genes": kept})
    for i, gene in enumerate(kept):
        _write_array(writer, f"{base}/spots/{i}.f16", measured.values(column[gene]), "<f2")


def _write_tiles(
    writer: _Writer,
    collection: Collection,
    number: int,
    on_message: OnMessage,
    check: Callable[[], None],
) -> int:
    slide, base = collection.slides[number], f"data/{number}"
    found, pyramid = slide.picture.describe(None), slide.picture.tiles()
    if pyramid is None:
        on_message(f"{slide.slide_id}: {found['reason']}; its thumbnail takes the picture's place")
        writer.json(f"{base}/picture.json", {**found, "reason": UNREADABLE})
        return 0
    writer.json(f"{base}/picture.json", found)
    names = [
        (level, col, row)
        for level in range(pyramid.min_level, pyramid.max_level + 1)
        for row in range(pyramid.count(level)[1])
        for col in range(pyramid.count(level)[0])
    ]
    on_message(f"{slide.slide_id}: {len(names)} tiles down to {pyramid.mpp:.3g} microns per pixel")
    with ThreadPoolExecutor(THREADS) as pool:
        # In parts: `map` submits all it is given, and a slide of a million tiles would be held in memory.
        for first in range(0, len(names), 256):
            part = names[first : first + 256]
            for name, content in zip(part, pool.map(lambda n: _tile(slide, n), part), strict=True):
                if content is not None:
                    level, col, row = name
                    writer.write(f"{base}/tiles/{level}/{col}_{row}.jpg", content)
            check()
    return len(names)


def _tile(slide: ShownSlide, name: tuple[int, int, int]) -> bytes | None:
    try:
        return slide.picture.tile(*name)
    except SlideError:
        return None  # the page leaves the tile out, as the live one does
