"""Space Ranger output: Visium (1.x to 4.x, CytAssist too) and Visium HD bins.

Positions are pixels of the full-resolution picture that Space Ranger was given: the microscope's with
CytAssist, if there was one. That picture must be the sheet's `slide`.

Terms
    spot_diameter_fullres   in Visium folders 65/55 of a spot's diameter, in spite of its name: on public
                            sections it is 0.653 of the chip's pitch of 100 µm, so it is not used
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.errors import first_line
from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.loaded_expression import (
    VISIUM_SPOT_UM,
    LoadedExpression,
    SlideFrame,
    implied_mpp,
    make_spots,
    read_json,
)
from histosge.data.expression.tenx import TenxMatrix, find_matrix, read_matrix
from histosge.errors import ExpressionError

PITCH_UM = 100.0
"""Between the centres of neighbouring Visium spots, which stand in a hexagonal lattice."""
MATRICES = ("filtered_feature_bc_matrix", "raw_feature_bc_matrix")
POSITION_COLUMNS = (
    "barcode",
    "in_tissue",
    "array_row",
    "array_col",
    "pxl_row_in_fullres",
    "pxl_col_in_fullres",
)
DEFAULT_BIN_UM = 8
THEORETICAL_UM = (63.0, 67.0)
"""What Space Ranger's ``spot_diameter_fullres`` comes to on a Visium chip, whose spots are 55 µm wide."""
VISIUM_NOTE = "a Visium chip: its spots are 55 µm wide, not the 65 of spot_diameter_fullres"
_BIN = re.compile(r"square_(\d{3})um")


def recognises(path: Path) -> bool:
    """Tell whether this is a Space Ranger folder, one of its bin folders, or its matrix file."""
    return _home(path) is not None


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read Visium spots or Visium HD bins; of several bin sizes 8 µm, unless the folder names one."""
    home = _home(path)
    if home is None:
        raise ExpressionError(f"{path} is no Space Ranger output folder")
    if _bins(home):
        return _read_bins(home, frame)
    return _read_bin(home, frame, ()) if _bin_size(home) else _read_visium(home, frame)


def _home(path: Path) -> Path | None:
    """Return the folder that holds ``spatial/`` or the bin folders."""
    start = path.parent if path.is_file() and path.name.endswith("feature_bc_matrix.h5") else path
    # Bins first: the output of a Visium HD run has a folder ``spatial`` beside them, too.
    for folder in (start, start / "outs", start / "binned_outputs", start / "outs" / "binned_outputs"):
        if _bins(folder):
            return folder
    for folder in (start / "outs", start):
        if (folder / "spatial").is_dir() and not (folder / "cell_feature_matrix.h5").exists():
            return folder
    return None


def _bins(folder: Path) -> dict[int, Path]:
    """Return the bin folders by their bin size in microns."""
    if not folder.is_dir():
        return {}
    found = ((_BIN.fullmatch(child.name), child) for child in sorted(folder.iterdir()))
    return {int(match[1]): child for match, child in found if match and child.is_dir()}


def _bin_size(folder: Path) -> float | None:
    # Visium and Visium HD folders look alike; only the latter's scale factors give a size of bins.
    file = folder / "spatial" / "scalefactors_json.json"
    return read_json(file).get("bin_size_um") if file.is_file() else None


def _read_bins(home: Path, frame: SlideFrame) -> LoadedExpression:
    bins = _bins(home)
    size = DEFAULT_BIN_UM if DEFAULT_BIN_UM in bins else min(bins)
    others = ", ".join(f"{child.name}" for um, child in bins.items() if um != size)
    note = f"{bins[size].name} taken, of others there: {others}" if others else f"{bins[size].name} taken"
    return _read_bin(bins[size], frame, (note,))


def _read_bin(folder: Path, frame: SlideFrame, notes: tuple[str, ...]) -> LoadedExpression:
    matrix, xy_px, on_tissue, _ = _located_matrix(folder)
    scale = _scale_factors(folder)
    try:
        side, mpp = float(scale["bin_size_um"]), float(scale["microns_per_pixel"])
    except KeyError as error:
        raise ExpressionError(f"{folder}/spatial/scalefactors_json.json does not give {error}") from error
    spots = make_spots(
        frame,
        folder,
        matrix.barcodes,
        xy_px * frame.mpp,
        matrix.counts,
        matrix.genes,
        diameter_um=side,
        shape="square",
        keep=on_tissue,
    )
    return LoadedExpression(spots, f"Visium HD, {side:g} µm bins", mpp, notes)


def _read_visium(home: Path, frame: SlideFrame) -> LoadedExpression:
    matrix, xy_px, on_tissue, array = _located_matrix(home)
    _scale_factors(home)  # not used, but a folder without them is incomplete
    spots = make_spots(
        frame,
        home,
        matrix.barcodes,
        xy_px * frame.mpp,
        matrix.counts,
        matrix.genes,
        diameter_um=VISIUM_SPOT_UM,
        keep=on_tissue,
    )
    notes = [f"{matrix.other_features} features are no genes"] if matrix.other_features else []
    if matrix.file.name.startswith("raw"):
        notes.append("no filtered matrix, so the raw one was read")
    cytassist = (home / "spatial" / "cytassist_image.tiff").is_file()
    if cytassist:
        notes.append(
            "positions are of the microscope's picture, not of cytassist_image.tiff, where both were given"
        )
    return LoadedExpression(
        spots, "Visium, CytAssist" if cytassist else "Visium", visium_mpp(array, xy_px), tuple(notes)
    )


def visium_mpp(array: NDArray[np.float64], xy_px: NDArray[np.float64]) -> float | None:
    """Return the mpp that a Visium chip's lattice implies.

    Parameters
    ----------
    array
        ``(array_row, array_col)`` of each spot; columns count in half steps.
    xy_px
        ``(x, y)`` of each spot in level-0 pixels.
    """
    step = np.array([PITCH_UM / 2, PITCH_UM * np.sqrt(3) / 2])
    return implied_mpp(array[:, ::-1] * step, xy_px)


def chip_mpp(obs: Any, xy_px: NDArray[np.float64]) -> float | None:
    """Return the mpp that a table's places on a Visium chip imply; None without places, or on another chip."""
    if not {"array_row", "array_col"} <= set(obs.columns):
        return None
    try:
        array = obs[["array_row", "array_col"]].to_numpy().astype(np.float64)
    except (TypeError, ValueError):  # places of another array, written as words
        return None
    if (array.sum(axis=1) % 2).any():
        return None  # not hexagonal: bins side by side would pass for 65 µm too
    return visium_mpp(array, xy_px)


def theoretical_visium_mpp(obs: Any, xy_px: NDArray[np.float64], diameter_px: float) -> float | None:
    """Return the mpp of what Space Ranger's tools wrote for a Visium chip; None for anything else."""
    mpp = chip_mpp(obs, xy_px)
    # Any other diameter is the file's own statement, and is taken as it is.
    return mpp if mpp and THEORETICAL_UM[0] < diameter_px * mpp < THEORETICAL_UM[1] else None


def _scale_factors(folder: Path) -> dict[str, Any]:
    file = folder / "spatial" / "scalefactors_json.json"
    if not file.is_file():
        raise ExpressionError(
            f"{folder} has no spatial/scalefactors_json.json; give a whole Space Ranger output folder"
        )
    return read_json(file)


def _located_matrix(
    folder: Path,
) -> tuple[TenxMatrix, NDArray[np.float64], NDArray[np.bool_], NDArray[np.float64]]:
    """Return the matrix, and for each of its barcodes (x, y) in pixels, on tissue or not, (row, col)."""
    positions = _positions(folder)
    place = find_matrix(folder, MATRICES)
    if place is None:
        raise ExpressionError(f"{folder} has no {MATRICES[0]}.h5; give a whole Space Ranger output folder")
    matrix = read_matrix(place)
    # Without `maintain_order` polars may return the rows of a join in any order.
    joined = pl.DataFrame({"barcode": matrix.barcodes}).join(
        positions, on="barcode", how="left", maintain_order="left"
    )
    xy = joined.select("pxl_col_in_fullres", "pxl_row_in_fullres").to_numpy().astype(np.float64)
    array = joined.select("array_row", "array_col").to_numpy().astype(np.float64)
    return matrix, xy, joined["in_tissue"].fill_null(0).to_numpy() > 0, array


def _positions(folder: Path) -> pl.DataFrame:
    for name in ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv"):
        file = folder / "spatial" / name
        if file.is_file():
            break
    else:
        raise ExpressionError(
            f"{folder} has none of spatial/tissue_positions.parquet, tissue_positions.csv and "
            "tissue_positions_list.csv; give a Space Ranger output folder"
        )
    try:
        if file.suffix == ".parquet":
            frame = pl.read_parquet(file).with_columns(pl.col("barcode").cast(pl.String))
        else:
            # Space Ranger 1.x wrote the list without a header.
            frame = pl.read_csv(file, has_header=not name.endswith("_list.csv"), infer_schema=False)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExpressionError(f"{file} cannot be read: {first_line(error)}") from error
    if len(frame.columns) != len(POSITION_COLUMNS):
        raise ExpressionError(f"{file} has {len(frame.columns)} columns; Space Ranger writes 6")
    numbers = [pl.col(c).cast(pl.Float64, strict=False) for c in POSITION_COLUMNS[1:]]
    return frame.rename(dict(zip(frame.columns, POSITION_COLUMNS, strict=True))).with_columns(numbers)


# After Xenium: both are looked for in a folder ``outs``, and this one asks for little more than a folder ``spatial``.
RECORD = ExpressionLayout(
    "space-ranger", "a Space Ranger folder (Visium or Visium HD)", recognises, read, order=40
)
