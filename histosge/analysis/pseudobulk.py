"""Pseudobulk of maps: one profile for each slide, or for each region that was drawn on it, as AnnData.

A profile is a sample for scanpy or pydeseq2, a patch is not: neighbouring patches repeat each other.

Terms
    rate    counts per 10,000: expm1 of a map's values
    counts  rate times predicted library size, summed over patches: what a measurement of the region would have, about
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from featurestore.exchange.hdf5_file import whole_hdf5
from featurestore.input_file import shown
from histosge.analysis.cohort_maps import CohortMaps
from histosge.data.outlines.json_outlines import read_json_outlines
from histosge.data.outlines.outline_batch import RawOutline, to_batch
from histosge.errors import ExportError
from histosge.exporting.cell_table import DEPTH
from histosge.exporting.patch_table import PatchTable


@dataclass(frozen=True)
class _Profile:
    slide_id: str
    region: str
    n_patches: int
    rate: NDArray[np.float64]
    log_mean: NDArray[np.float64]
    counts: NDArray[np.float64] | None


def read_regions(file: Path) -> dict[str, Any]:
    """Return the regions of a GeoJSON by name: the annotation's own, else its class; parts of one name belong together.

    Raises
    ------
    ExpressionError, ExportError
        If the file cannot be read, or holds no area with a name.
    """
    parts: dict[str, list[RawOutline]] = {}
    for outline in read_json_outlines(file):
        if outline is not None:
            parts.setdefault(outline.name or outline.kind or outline.id or "region", []).append(outline)
    regions = {name: shapely.union_all(to_batch(some).polygons) for name, some in parts.items()}
    regions = {name: area for name, area in regions.items() if not area.is_empty}
    if not regions:
        raise ExportError(f"{shown(file)} holds no area; draw regions in QuPath and export them as GeoJSON")
    return regions


def pseudobulk(maps: CohortMaps, regions: Path | None = None) -> Any:
    """Return AnnData with a row for each slide, or each region on it.

    ``X`` is log1p of the mean rate; ``layers["mean_log1p"]`` the mean of the map's values;
    ``layers["counts"]``, where the model predicts library size, predicted counts, whole numbers. ``obs`` has `slide`,
    `region` and `n_patches`.

    Parameters
    ----------
    regions
        GeoJSON for a single slide, or a folder with ``<slide id>.geojson`` for each; a patch belongs to a region if its
        centre does. None for whole slides.

    Raises
    ------
    ExpressionError, ExportError
        If a file of regions cannot be read, or no patch lies in any region.
    """
    import anndata
    import pandas as pd

    files = _region_files(maps, regions)
    profiles = [profile for table in maps.tables() for profile in _profiles(table, files.get(table.slide_id))]
    if not profiles:
        raise ExportError(
            f"no patch of {', '.join(maps.slide_ids[:5])} lies in a region of {shown(regions or '')}"
        )
    obs = pd.DataFrame(
        {
            "slide": pd.Categorical([p.slide_id for p in profiles]),
            "region": pd.Categorical([p.region for p in profiles]),
            "n_patches": [p.n_patches for p in profiles],
        },
        index=pd.Index([f"{p.slide_id}_{p.region}" if p.region else p.slide_id for p in profiles]),
    )
    data = anndata.AnnData(
        X=np.log1p([p.rate for p in profiles]).astype(np.float32),
        obs=obs,
        var=pd.DataFrame(index=pd.Index(list(maps.genes))),
    )
    data.layers["mean_log1p"] = np.array([p.log_mean for p in profiles], dtype=np.float32)
    counts = [p.counts for p in profiles if p.counts is not None]
    if len(counts) == len(profiles):
        data.layers["counts"] = np.rint(np.stack(counts)).astype(np.int64)
    data.uns["log1p"] = {"base": np.e}
    data.uns["histosge"] = {
        "values": "log1p of the mean of predicted counts per 10,000",
        "note": "Predicted, not measured. A row is one sample; its patches are not independent.",
    }
    return data


def write_profiles(data: Any, path: Path) -> None:
    """Write profiles as an HDF5 file, whole or not at all."""
    from anndata.io import write_elem

    with whole_hdf5(path) as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore", category=UserWarning)
        warnings.simplefilter("ignore", category=FutureWarning)
        write_elem(opened.file, "/", data)


def _region_files(maps: CohortMaps, regions: Path | None) -> dict[str, Path | None]:
    if regions is None:
        return dict.fromkeys(maps.slide_ids)
    if not regions.is_dir():
        if len(maps.slide_ids) > 1:
            raise ExportError(
                f"{shown(regions)} has regions of one slide, the store has {len(maps.slide_ids)}: name it with --slide, or "
                "give a folder with SLIDE.geojson for each"
            )
        return {maps.slide_ids[0]: regions}
    found = {slide_id: regions / f"{slide_id}.geojson" for slide_id in maps.slide_ids}
    missing = [slide_id for slide_id, file in found.items() if not file.is_file()]
    if missing:
        raise ExportError(
            f"there is no {shown(found[missing[0]])}; add it, or name the slides that have regions with --slide"
        )
    return dict(found)


def _profiles(table: PatchTable, file: Path | None) -> Iterator[_Profile]:
    members: dict[str, NDArray[np.bool_]] = {"": np.ones(len(table), dtype=bool)}
    if file is not None:
        x, y = (table.xy_um / table.grid.slide_mpp).T
        members = {name: shapely.contains_xy(area, x, y) for name, area in read_regions(file).items()}
    names = [name for name, inside in members.items() if inside.any()]
    if not names:
        return
    inside = np.stack([members[name] for name in names]).astype(np.float64)
    shape = (len(names), len(table.names))
    rate, log_mean = np.zeros(shape), np.zeros(shape)
    depth = table.per_patch.get(DEPTH)
    counts = None if depth is None else np.zeros(shape)
    for rows, values in table.chunks():
        values64 = values.astype(np.float64)
        rates = np.expm1(values64)
        rate += inside[:, rows] @ rates
        log_mean += inside[:, rows] @ values64
        if counts is not None and depth is not None:
            library = np.exp(depth[table.rows[rows], table.cols[rows]].astype(np.float64))
            counts += inside[:, rows] @ (rates * (np.nan_to_num(library) / 1e4)[:, None])
    n = inside.sum(axis=1)
    for i, name in enumerate(names):
        yield _Profile(
            table.slide_id,
            name,
            int(n[i]),
            rate[i] / n[i],
            log_mean[i] / n[i],
            None if counts is None else counts[i],
        )
