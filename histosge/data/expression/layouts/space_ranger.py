"""Space Ranger output: Visium (1.x to 4.x, CytAssist too) and Visium HD bins.

Positions are pixels of the full-resolution picture that Space Ranger was given: the microscope's with
CytAssist, if there was one. That picture must be the sheet's `slide`.

Terms
    spot_diameter_fullres   in Visium folders 65/55 of a spot's diameter, in spite of its name: on public
                            sections it is 0.653 of the chip's pitch of 100 µm, so it is not used
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.wording import counted
from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.foreign_files import reading
from histosge.data.expression.loaded_expression import (
    VISIUM_SPOT_UM,
    LoadedExpression,
    SlideFrame,
    implied_mpp,
    left_out,
    make_spots,
    parse_flags,
    parse_number,
    read_json,
)
from histosge.data.expression.section_choice import choose_section, listed, no_such_section
from histosge.data.expression.tenx import TenxMatrix, choose_matrix, find_matrices, read_matrix
from histosge.data.sections import Spots
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
AGGREGATED_POSITIONS = "aggr_tissue_positions.csv"
"""Of all runs that `spaceranger aggr` joined, beside its matrix."""
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
    # A matrix that is named is the one that is meant, also beside others.
    named = path if path.is_file() else None
    return _read_bin(home, frame, (), named) if _bin_size(home) else _read_visium(home, frame, named)


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
    return parse_number(read_json(file).get("bin_size_um"), "bin_size_um", file) if file.is_file() else None


def _read_bins(home: Path, frame: SlideFrame) -> LoadedExpression:
    bins = _bins(home)
    size = DEFAULT_BIN_UM if DEFAULT_BIN_UM in bins else min(bins)
    others = ", ".join(f"{child.name}" for um, child in bins.items() if um != size)
    note = f"{bins[size].name} taken, of others there: {others}" if others else f"{bins[size].name} taken"
    return _read_bin(bins[size], frame, (note,))


def _read_bin(
    folder: Path, frame: SlideFrame, notes: tuple[str, ...], named: Path | None = None
) -> LoadedExpression:
    located = _locate(folder, frame, named)
    file = located.spatial / "scalefactors_json.json"
    scale = _scale_factors(located.spatial)
    side, mpp = (parse_number(scale.get(key), key, file) for key in ("bin_size_um", "microns_per_pixel"))
    if side is None or mpp is None:
        raise ExpressionError(f"{file} does not give bin_size_um and microns_per_pixel")
    spots = located.spots(frame, folder, side, "square")
    return LoadedExpression(spots, f"Visium HD, {side:g} µm bins", mpp, (*notes, *located.notes(frame)))


def _read_visium(home: Path, frame: SlideFrame, named: Path | None) -> LoadedExpression:
    located = _locate(home, frame, named)
    _scale_factors(located.spatial)  # not used, but a folder without them is incomplete
    matrix = located.matrix
    spots = located.spots(frame, home, VISIUM_SPOT_UM, "disc")
    notes = [f"{matrix.other_features} features are no genes"] if matrix.other_features else []
    if matrix.file.name.removesuffix(".h5").endswith(MATRICES[1]):
        notes.append(
            "no filtered matrix, so the raw one was read" if named is None else "the raw matrix was read"
        )
    cytassist = (located.spatial / "cytassist_image.tiff").is_file()
    if cytassist:
        notes.append(
            "positions are of the microscope's picture, not of cytassist_image.tiff, where both were given"
        )
    return LoadedExpression(
        spots,
        "Visium, CytAssist" if cytassist else "Visium",
        visium_mpp(located.array, located.xy_px),
        (*notes, *located.notes(frame)),
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


def _scale_factors(spatial: Path) -> dict[str, Any]:
    file = spatial / "scalefactors_json.json"
    if not file.is_file():
        raise ExpressionError(
            f"{spatial.parent} has no {spatial.name}/scalefactors_json.json; give a whole Space Ranger output folder"
        )
    return read_json(file)


@dataclass(frozen=True)
class _Located:
    """A matrix, and where its barcodes lie.

    Parameters
    ----------
    spatial
        The folder with the positions and the scale factors.
    xy_px, array
        ``(x, y)`` at level 0 and ``(row, col)`` on the chip of each barcode, ``(n, 2)``; NaN where there is none.
    on_tissue
        ``(n,)``.
    found
        What was chosen, matched or is missing, in words.
    """

    matrix: TenxMatrix
    spatial: Path
    xy_px: NDArray[np.float64]
    on_tissue: NDArray[np.bool_]
    array: NDArray[np.float64]
    found: tuple[str, ...]

    def spots(self, frame: SlideFrame, path: Path, diameter_um: float, shape: str) -> Spots:
        return make_spots(
            frame,
            path,
            self.matrix.barcodes,
            self.xy_px * frame.mpp,
            self.matrix.counts,
            self.matrix.genes,
            diameter_um=diameter_um,
            shape=shape,
            keep=self.on_tissue,
        )

    def notes(self, frame: SlideFrame) -> tuple[str, ...]:
        return (*self.found, *left_out(self.xy_px * frame.mpp, self.on_tissue))


def _locate(home: Path, frame: SlideFrame, named: Path | None) -> _Located:
    """Read the row's matrix of a folder, and the positions of its barcodes."""
    place = named or choose_matrix(home, MATRICES, frame)
    if place is None:
        raise ExpressionError(f"{home} has no {MATRICES[0]}.h5; give a whole Space Ranger output folder")
    several = find_matrices(home, MATRICES)
    matrix = read_matrix(place)
    # What chose the matrix does not name a run within it, too.
    inner = replace(frame, section=None) if len(several) > 1 and named is None else frame
    matrix, library, notes = _choose_run(matrix, home, inner)
    spatial = home / "spatial"
    if library is not None and (spatial / library).is_dir():
        spatial = spatial / library
    aggregated = home / AGGREGATED_POSITIONS
    is_own = spatial.name != "spatial" or (library is not None and aggregated.is_file())
    file = aggregated if library is not None and aggregated.is_file() else _positions_file(spatial)
    positions = _read_positions(file)
    joined, is_by_core = _join(matrix, positions, file)
    if is_by_core:
        notes.append("barcodes matched without their suffix")
    is_there = joined["in_tissue"].is_not_null().to_numpy()
    on_tissue = joined["in_tissue"].fill_null(value=False).to_numpy()
    n_absent = int(positions["in_tissue"].sum()) - int(on_tissue.sum())
    if not is_own and (len(several) > 1 or library is not None) and (n_absent or not on_tissue.all()):
        # The filtered matrix of a sample holds just the barcodes under its tissue. Barcodes of all chips are alike.
        raise ExpressionError(
            f"{place} is not of the sample whose positions are in {spatial}: {int((~on_tissue).sum())} of its "
            f"{len(on_tissue)} barcodes are off tissue there, {n_absent} on tissue are missing; give each sample a "
            "folder of its own"
        )
    if n_absent and library is None:
        notes.append(f"{counted(n_absent, 'spot')} on tissue without counts")
    xy_px = joined.select("pxl_col_in_fullres", "pxl_row_in_fullres").to_numpy().astype(np.float64)
    array = joined.select("array_row", "array_col").to_numpy().astype(np.float64)
    # A barcode without a position is counted as such, not as one off tissue.
    return _Located(matrix, spatial, xy_px, on_tissue | ~is_there, array, tuple(notes))


def _choose_run(
    matrix: TenxMatrix, home: Path, frame: SlideFrame
) -> tuple[TenxMatrix, str | None, list[str]]:
    """Return the row's part of an aggregated matrix, its library and notes; the whole and None for a single run.

    `spaceranger aggr` numbers the runs: barcodes end in ``-1``, ``-2`` ..., in the order of ``aggregation.csv``.
    """
    suffixes = np.array([_split(barcode)[1] for barcode in matrix.barcodes], dtype=np.str_)
    runs = sorted(set(suffixes.tolist()), key=lambda run: (len(run), run))
    libraries = _libraries(home)
    names = [libraries.get(run, run) or "none" for run in runs]
    if len(runs) < 2 and (frame.section is None or not libraries):
        if frame.section is not None and frame.section not in names:
            raise no_such_section(names or ["1"], frame, home, "runs by the end of their barcodes")
        return matrix, None, []
    if frame.section in runs:  # by its number
        name = names[runs.index(frame.section)]
    else:
        name = choose_section(names, frame, home, "aggregated runs")
    rows = np.flatnonzero(suffixes == runs[names.index(name)])
    part = replace(matrix, barcodes=[matrix.barcodes[i] for i in rows], counts=matrix.counts[rows])
    return (
        part,
        name,
        [f"run {name!r} of {len(runs)} aggregated ones, {len(rows)} of {len(suffixes)} barcodes"],
    )


def _split(barcode: str) -> tuple[str, str]:
    """Return a barcode's sequence and the number of its run; the latter is empty where there is none."""
    core, _, suffix = barcode.rpartition("-")
    return (core, suffix) if core and suffix.isdigit() else (barcode, "")


def _libraries(home: Path) -> dict[str, str]:
    """Return the library of each run number, as the aggregation's own table has them; empty without one."""
    file = home / "aggregation.csv"
    if not file.is_file():
        return {}
    with reading(file, "an aggregation table"):
        table = pl.read_csv(file, infer_schema=False)
    column = next((name for name in ("library_id", "sample_id") if name in table.columns), None)
    if column is None:
        raise ExpressionError(f"{file} has no column library_id; give a whole Space Ranger output folder")
    return {str(i): str(name) for i, name in enumerate(table[column], 1)}


def _join(matrix: TenxMatrix, positions: pl.DataFrame, file: Path) -> tuple[pl.DataFrame, bool]:
    """Return the positions in the matrix' order, null where there is none, and whether suffixes were ignored."""
    barcodes = pl.DataFrame({"barcode": matrix.barcodes}, schema={"barcode": pl.String})
    is_by_core = not barcodes["barcode"].is_in(positions["barcode"].implode()).any()
    if is_by_core:
        # Tools drop the "-1", and aggregation replaces it. Sequences alone must still be of one spot each.
        barcodes, positions = (_cores(frame) for frame in (barcodes, positions))
        if not barcodes["barcode"].is_in(positions["barcode"].implode()).any():
            raise ExpressionError(
                f"none of {len(matrix.barcodes)} barcodes of {matrix.file}, such as {listed(matrix.barcodes[:1])!r}, is in "
                f"{file}, which has such as {listed(positions['barcode'][:1])!r}; give the files of one sample"
            )
    for frame, source in ((barcodes, matrix.file), (positions, file)):
        if frame["barcode"].is_duplicated().any():
            twice = frame["barcode"].filter(frame["barcode"].is_duplicated())[0]
            raise ExpressionError(
                f"{source} names barcode {str(twice)[:60]!r} twice; give the files of one sample"
            )
    # Without `maintain_order` polars may return the rows of a join in any order.
    return barcodes.join(positions, on="barcode", how="left", maintain_order="left"), is_by_core


def _cores(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(pl.col("barcode").str.replace(r"-\d+$", ""))


def _positions_file(spatial: Path) -> Path:
    for name in ("tissue_positions.parquet", "tissue_positions.csv", "tissue_positions_list.csv"):
        if (spatial / name).is_file():
            return spatial / name
    raise ExpressionError(
        f"{spatial.parent} has none of {spatial.name}/tissue_positions.parquet, tissue_positions.csv and "
        "tissue_positions_list.csv; give a Space Ranger output folder"
    )


def _read_positions(file: Path) -> pl.DataFrame:
    """Return barcode, in_tissue (a truth value) and the four numbers of each spot, NaN where there is none."""
    has_names = True
    with reading(file, "tissue positions"):
        if file.suffix == ".parquet":
            table = pl.read_parquet(file)
        else:
            # Space Ranger 1.x wrote no header, and tools that write the table again may leave it out or add one.
            table = pl.read_csv(file, has_header=False, infer_schema=False)
            first = [str(cell).strip() for cell in table.row(0)] if len(table) else []
            has_names = not _are_numbers(first[2:])  # the flag before them may be a word
            if has_names:
                table = table[1:].rename(dict(zip(table.columns, first, strict=True)))
    if set(POSITION_COLUMNS) <= set(table.columns):
        table = table.select(POSITION_COLUMNS)
    elif len(table.columns) == len(POSITION_COLUMNS) and not has_names:
        table = table.rename(dict(zip(table.columns, POSITION_COLUMNS, strict=True)))
    else:
        raise ExpressionError(
            f"{file} has {len(table.columns)} columns ({listed(table.columns)}); Space Ranger writes "
            f"{', '.join(POSITION_COLUMNS)}"
        )
    numbers = [pl.col(c).cast(pl.Float64, strict=False).fill_null(np.nan) for c in POSITION_COLUMNS[2:]]
    flags = pl.Series("in_tissue", parse_flags(table["in_tissue"].to_numpy(), file))
    return table.with_columns(pl.col("barcode").cast(pl.String).str.strip_chars(), flags, *numbers)


def _are_numbers(cells: list[str]) -> bool:
    try:
        return all(isinstance(float(cell), float) for cell in cells)
    except ValueError:
        return False


# After Xenium: both are looked for in a folder ``outs``, and this one asks for little more than a folder ``spatial``.
RECORD = ExpressionLayout(
    "space-ranger",
    "a Space Ranger folder (Visium or Visium HD)",
    recognises,
    read,
    order=40,
    has_sections=True,
)
