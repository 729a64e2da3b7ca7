"""Means of embeddings or expression in each annotated class of each slide: one pass over the store.

A patch belongs to every class that covers at least half of it: classes may overlap, such as tumour within a region.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.analysis.patch_stream import PatchStream
from featurestore.analysis.summary import Moments, shift_from, with_named_features
from featurestore.errors import MaskError, SampleSheetError
from featurestore.grid import PatchGrid
from featurestore.input_file import kind_of
from featurestore.slides.sample_sheet import read_samples
from featurestore.slides.sheet_table import SHEETS, SPREADSHEETS
from featurestore.tissue.annotation import Frame
from featurestore.tissue.annotation_file import masks_by_slide, read_annotation
from featurestore.tissue.outlines import Outlines
from featurestore.tissue.survey import patch_means

COVERED = 0.5
"""Share of a patch that a class covers at least."""
WITHOUT_CLASS = "(no class)"
"""What stands for areas that are annotated as nothing."""
PIXELS_A_PATCH = 8
"""Pixels on a side of a patch in which classes are drawn: a share is then exact to a few percent."""
FRAME_MPP = (2.0, 8.0)
"""Finest and coarsest microns per pixel of that drawing: finer ones would take 100 MB of a large slide."""

SizeOf = Callable[[str], tuple[int, int] | None]
"""Slide id -> ``(width, height)`` at level 0; None if the store does not know it, as one of maps."""


def annotation_files(place: str, slide_ids: Sequence[str]) -> dict[str, str]:
    """Return the annotation file of each slide.

    Parameters
    ----------
    place
        A file for the only slide, a folder with files named by slide id, or a sample sheet with a column `mask`.

    Raises
    ------
    MaskError
        If there are none, or one file is given for several slides.
    """
    if Path(place).suffix.lower() in (*SHEETS, *SPREADSHEETS) and kind_of(place) == "file":
        found = {row.slide_id: row.mask for row in read_samples(place) if row.mask is not None}
        if not found:
            raise SampleSheetError(f"{place} has no masks; write the annotations' files into its column mask")
    elif kind_of(place) == "file":
        if len(slide_ids) != 1:
            raise MaskError(
                f"--annotations {place} is one file, and the store has {len(slide_ids)} slides; name one with --slide, or "
                "give a folder or a sample sheet"
            )
        return {slide_ids[0]: place}
    else:
        found = masks_by_slide(place, slide_ids, "--annotations")
    files = {name: found[name] for name in slide_ids if name in found}
    if not files:
        raise MaskError(
            f"--annotations {place} has no file for any of the {len(slide_ids)} slides, such as {slide_ids[0]}"
        )
    return files


def covered_patches(
    grid: PatchGrid, file: str, size_px: tuple[int, int] | None
) -> dict[str, NDArray[np.bool_]]:
    """Return which patches each class of a file covers, ``(n_rows, n_cols)``, by class.

    Parameters
    ----------
    size_px
        ``(width, height)`` of the slide at level 0; None if it is not known, which is enough for outlines.

    Raises
    ------
    MaskError
        If the file cannot be used for the slide.
    """
    patch_um = grid.spec.patch_px * grid.effective_mpp
    mpp = float(np.clip(patch_um / PIXELS_A_PATCH, *FRAME_MPP))
    side_um = [
        origin + (n - 1) * grid.spec.stride_px * grid.effective_mpp + patch_um
        for origin, n in zip(grid.origin_um[::-1], (grid.n_rows, grid.n_cols), strict=True)
    ]
    height, width = (int(np.ceil(side / mpp)) for side in side_um)
    slide_px = size_px or (round(side_um[1] / grid.slide_mpp), round(side_um[0] / grid.slide_mpp))
    frame = Frame(slide_px, grid.slide_mpp, (height, width), mpp)
    opened = read_annotation(file, (width, height))
    found = opened.annotation
    unchecked = found if size_px is None and isinstance(found, Outlines) else None
    if size_px is None and unchecked is None:
        raise MaskError(
            f"{opened.label} is a picture, and maps do not know the size of their slide; give GeoJSON, or summarise the "
            "feature store"
        )
    covered = {}
    for name in found.classes:
        # Without the slide's size, how far outlines reach beyond it cannot be checked.
        drawn = found.draw([name], frame) if unchecked is None else unchecked.draw([name], frame, 1.0)
        shares = patch_means(drawn.astype(np.float64), grid, grid.effective_mpp / mpp)
        covered[name or WITHOUT_CLASS] = shares >= COVERED
    return covered


def summarise_classes(stream: PatchStream, files: Mapping[str, str], size_of: SizeOf) -> pl.DataFrame:
    """Summarise each annotated class of each slide in one pass, in this process.

    Parameters
    ----------
    files
        Slide id -> annotation file; slides without one are left out, of the cohort's means as well.

    Returns
    -------
    polars.DataFrame
        One row per slide and class, then one for each class with a null `slide`, of all slides together: `patches`, `shift`
        (distance of the class's mean from that of all annotated slides, in standard deviations), `mean` and `sd` of each
        feature. Where the features have names, as the genes of maps, each has a column of its means and one,
        ``sd_<name>``, of its deviations.

    Raises
    ------
    MaskError
        If a file cannot be used for its slide.
    """
    cohort = Moments(stream.dim)
    by_class: dict[str, Moments] = {}
    slides: list[tuple[str, str, Moments]] = []
    for slide, blocks in stream.by_slide():
        file = files.get(slide.slide_id)
        if file is None:
            for _ in blocks:  # a stream's blocks come in order, so those of this slide are read past
                pass
            continue
        covered = covered_patches(slide.grid, file, size_of(slide.slide_id))
        moments = {name: Moments(stream.dim) for name in covered}
        for patches in blocks:
            cohort.add(patches)
            for name, inside in covered.items():
                moments[name].add_rows(patches.values[inside[patches.rows, patches.cols]])
        for name in sorted(covered):
            slides.append((slide.slide_id, name, moments[name]))
            by_class.setdefault(name, Moments(stream.dim)).merge(moments[name])
    every = [*slides, *((None, name, by_class[name]) for name in sorted(by_class))]
    vector = pl.Array(pl.Float64, stream.dim)
    frame = pl.DataFrame(
        [
            (
                slide_id,
                name,
                found.n,
                shift_from(found, cohort),
                found.mean if found.n else None,
                found.sd if found.n > 1 else None,
            )
            for slide_id, name, found in every
        ],
        schema={
            "slide": pl.String,
            "class": pl.String,
            "patches": pl.Int64,
            "shift": pl.Float64,
            "mean": vector,
            "sd": vector,
        },
        orient="row",
    )
    return frame if stream.columns is None else with_named_features(frame, stream.columns)
