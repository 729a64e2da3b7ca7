"""One call for every format: what lies in a store -> files of other tools, one per slide unless the format says otherwise.

What is there with the same content stays as it is; other content is replaced only where that is wanted, once the new
output is complete.
"""

import json
import math
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path

from featurestore.earlier_results import staged_result
from featurestore.events import OnMessage, ignore_message
from featurestore.slides.sample_sheet import Sample, read_samples
from featurestore.whole_file import check_output
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.errors import ExportError
from histosge.exporting.export_format import FORMATS, ExportFormat, ExportItem, ExportSettings
from histosge.exporting.open_tables import ExportSelection, is_feature_store, open_tables
from histosge.exporting.patch_table import PatchTable
from histosge.exporting.slide_picture import find_slide


def export(
    url: str | Path,
    out: str | Path,
    to: str,
    selection: ExportSelection | None = None,
    settings: ExportSettings | None = None,
    *,
    overwrite: bool = False,
    on_message: OnMessage = ignore_message,
) -> list[str]:
    """Write a feature store's embeddings or an expression store's maps in another tool's format.

    Parameters
    ----------
    url
        Feature store or expression store, a folder or URL; the kind is recognised.
    out
        File or folder on this machine. With several slides, a folder with one output each, unless the format holds
        all slides in one.
    to
        Name of a registered format: one of `FORMATS.names()`.
    overwrite
        Replace outputs of other content that are there; each stays until the new one is complete.
    on_message
        Called with remarks, such as on a slide that cannot be reached.

    Returns
    -------
    list of str
        One line per thing written.

    Raises
    ------
    ExportError, StoreError, MissingExtraError
        If the format is unknown, the store does not fit it, the output exists and is not overwritten, or an extra is
        missing.
    """
    url, out = str(url), Path(out)
    selection, settings = selection or ExportSelection(), settings or ExportSettings()
    chosen = FORMATS.get(to)
    _check(url, out, chosen)
    if not 0 < settings.picture_mpp < math.inf:
        raise ExportError(
            f"{settings.picture_mpp} microns per pixel is no scale for a picture; give a positive number, such as 2"
        )
    # All of them before the first is written: a slide that is missing or half done is refused while nothing is there yet.
    tables = open_tables(url, selection, allow_empty=chosen.takes_empty)
    parts = [tables] if chosen.one_for_all else [[table] for table in tables]
    paths = [out if chosen.one_for_all else _place(out, chosen, part[0], len(tables)) for part in parts]
    # As with the tables: the last place must not be refused after an hour.
    for path in paths:
        check_output(path, folder=chosen.is_folder or path.suffix == ".zarr")
        _check_replaceable(path, chosen)
    samples = _samples(settings, chosen)
    lines = []
    for path, part in zip(paths, parts, strict=True):
        with ExitStack() as opened:
            items = [_item(table, url, chosen, settings, samples, opened, on_message) for table in part]
            with staged_result(path, overwrite=overwrite) as staged:
                written = chosen.write(items, staged.path, settings)
            lines.append(f"{path}: {'nothing to do, ' if staged.was_there else ''}{written}")
    return lines


def _check(url: str, out: Path, chosen: ExportFormat) -> None:
    # Path() turns s3:// into s3:/ and a folder of that name would be made here.
    if "://" in str(out) or str(out).startswith(("s3:/", "memory:/")):
        raise ExportError(f"{out} is no folder on this machine; export there, then copy it up")
    if is_feature_store(url):
        if not chosen.embeddings:
            raise ExportError(
                f"{chosen.name} takes maps of genes; {url} is a feature store, give an expression store"
            )
    elif not chosen.maps:
        raise ExportError(
            f"{chosen.name} takes embeddings; {url} is an expression store, give the feature store"
        )


def _item(
    table: PatchTable,
    url: str,
    chosen: ExportFormat,
    settings: ExportSettings,
    samples: Mapping[str, Sample],
    opened: ExitStack,
    on_message: OnMessage,
) -> ExportItem:
    slide = None
    if chosen.wants_slide:
        slide, remark = find_slide(table, settings.store, url)
        if slide is None:
            on_message(remark)
        else:
            opened.callback(slide.close)
    if not samples:
        return ExportItem(table, url, slide)
    sample = samples.get(table.slide_id)
    if sample is None or sample.expression is None:
        on_message(
            f"{table.slide_id}: the sample sheet names no expression of this slide, so its spots are left out"
        )
        return ExportItem(table, url, slide)
    frame = SlideFrame(table.slide_id, sample.donor, table.grid.slide_mpp, slide.size_px if slide else None)
    return ExportItem(table, url, slide, find_expression(sample.expression, frame).spots)


def _samples(settings: ExportSettings, chosen: ExportFormat) -> dict[str, Sample]:
    """Return the rows of the sample sheet by slide id; none where no sheet is given."""
    if settings.samples is None:
        return {}
    if not chosen.wants_spots:
        takers = ", ".join(record.name for record in FORMATS.records() if record.wants_spots)
        raise ExportError(
            f"{chosen.name} holds no measured spots: leave out --samples, or export to {takers}"
        )
    return {sample.slide_id: sample for sample in read_samples(settings.samples)}


def _place(out: Path, chosen: ExportFormat, table: PatchTable, n_tables: int) -> Path:
    """Return where one slide goes: `out` itself if it is the only one and `out` is named like such an output."""
    suffixes = tuple(suffix for suffix in (chosen.suffix, *chosen.also) if suffix)
    # A Zarr folder may have any name, so OUT is the output even without a suffix.
    if n_tables == 1 and (out.name.lower().endswith(suffixes) or chosen.is_zarr):
        return out
    return out / f"{table.slide_id}{chosen.suffix}"


def _check_replaceable(path: Path, chosen: ExportFormat) -> None:
    """Refuse a folder that holds something else than a Zarr: it is never replaced, also if it is to be overwritten."""
    is_zarr = chosen.is_zarr or path.suffix == ".zarr"
    documents = ("zarr.json", ".zgroup", ".zarray")
    if is_zarr and path.is_dir() and any(path.iterdir()) and not any((path / n).exists() for n in documents):
        raise ExportError(f"{path} holds something that is no Zarr; remove it, or give another OUT")
    # A store of ours is a Zarr, too, and holds what took hours.
    if is_zarr and (found := _store_at(path)):
        raise ExportError(f"{path} is {found}, which no export replaces; give another OUT")


def _store_at(path: Path) -> str:
    try:
        document = json.loads((path / "zarr.json").read_bytes())
        spec = str(document["attributes"]["spec"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""
    return f"a store ({spec})" if spec.startswith("histosge-") else ""
