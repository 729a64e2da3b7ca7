"""Xenium output: cells with their transcripts counted, or single ones; positions brought from its own frame to the H&E's.

The H&E is stained and scanned after the run. What ties it to the run is an alignment matrix, a CSV of
3 x 3 numbers that Xenium Explorer writes: H&E pixels -> pixels of the morphology picture.

Terms
    pixel size   microns per pixel of the morphology picture, in ``experiment.xenium``
    prefix       the sample's name in front of every file's, as downloads have it
"""

import gzip
import io
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.foreign_files import parquet_slices, reading, require_file
from histosge.data.expression.loaded_expression import (
    LoadedExpression,
    SlideFrame,
    left_out,
    make_spots,
    parse_number,
    read_json,
)
from histosge.data.expression.molecules import Molecules
from histosge.data.expression.section_choice import MARK, is_named, listed
from histosge.data.expression.tenx import TenxMatrix, choose_matrix, find_matrices, read_matrix
from histosge.errors import ExpressionError

MATRIX = "cell_feature_matrix"
EXPERIMENT = "experiment.xenium"
CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
TRANSCRIPTS = ("transcripts.parquet", "transcripts.csv.gz", "transcripts.csv")
MIN_QV = 20.0
"""Quality from which on the instrument counts a molecule into ``cell_feature_matrix``."""
BLOCK_BYTES = 1 << 25
"""Of a table of molecules as text, read at once: some 400,000 rows."""
PIXEL_UM = 0.2125
"""Of every Xenium instrument so far: assumed where ``experiment.xenium`` is missing."""
CELL_UM = 10.0
"""Diameter of a cell where the areas are not given."""
ALIGNMENTS = ("*alignment*.csv", "*matrix.csv", "*alignment*/*matrix.csv")
"""As 10x and Xenium Explorer name them: ``X_he_imagealignment.csv``, ``X_matrix.csv``, ``X_alignment_files/matrix.csv``."""
MOST_ALIGNMENT_BYTES = 1 << 16
MPP_RANGE = (0.01, 100.0)
"""Of the H&E by an alignment: beyond these a matrix is no alignment of two microscopes' pictures."""
_HE = {"he", "hne", "hematoxylin", "haematoxylin", "eosin"}
_IF = {"if", "dapi", "immunofluorescence", "fluorescence", "morphology"}
_ENDS = re.compile(r"[_.-]*(image)?(alignment)?([_-]?files)?([/_-]*matrix)?(\.csv)?$", re.IGNORECASE)


def recognises(path: Path) -> bool:
    """Tell whether this is a Xenium output folder."""
    return _home(path) is not None


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read cells: centroids in microns, through the alignment matrix if there is one."""
    home, prefix, matrix = _run(path, frame)
    cells = _cells(home, prefix, matrix)
    run_um = cells.select("x_centroid", "y_centroid").to_numpy().astype(np.float64)
    xy_px, mpp, note = place_on_slide(home, prefix, run_um, frame)
    xy_um = xy_px * frame.mpp
    spots = make_spots(
        frame,
        home,
        matrix.barcodes,
        xy_um,
        matrix.counts,
        matrix.genes,
        diameter_um=_diameter(cells),
    )
    notes = [note, *([f"{matrix.other_features} control features left out"] if matrix.other_features else [])]
    return LoadedExpression(spots, "Xenium, one spot a cell", mpp, (*notes, *left_out(xy_um)))


def molecules(path: Path, frame: SlideFrame) -> Molecules | None:
    """Return where the run's transcripts are; None if its folder has no table of them.

    Raises
    ------
    ExpressionError
        If the table lacks a column.
    """
    home, prefix, matrix = _run(path, frame)
    file = _file(home, prefix, TRANSCRIPTS)
    if file is None:
        return None
    require_file(file)
    # The columns of all versions of the instrument's software; `is_gene` is younger than the others.
    needed = ("feature_name", "x_location", "y_location", "qv", "cell_id")
    with reading(file, "a table of transcripts"):
        is_table = file.suffix == ".parquet"
        names = list(pl.read_parquet_schema(file)) if is_table else _header(file)
    missing = [name for name in needed if name not in names]
    if missing:
        raise ExpressionError(
            f"{file} has no column {missing[0]!r} (it has {', '.join(names[:9])}); give the transcripts of a Xenium run"
        )
    columns = [*needed, *(["is_gene"] if "is_gene" in names else [])]

    def batches() -> Iterator[pl.DataFrame]:
        found = parquet_slices(file, columns) if is_table else _csv_blocks(file, columns)
        for table in found:
            with reading(file, "a table of transcripts"):
                part = _plain(table)
            xy_px = place_on_slide(home, prefix, part.select("x", "y").to_numpy(), frame)[0]
            x_um, y_um = (xy_px * frame.mpp).T
            yield part.drop("x", "y").with_columns(x_um=pl.Series(x_um), y_um=pl.Series(y_um))

    return Molecules(file, tuple(matrix.genes), tuple(matrix.barcodes), MIN_QV, batches)


def _plain(table: pl.DataFrame) -> pl.DataFrame:
    """Return transcripts with the same types from every version: names were bytes and cells numbers in early ones."""
    is_gene = pl.lit(value=True)
    if "is_gene" in table.columns:
        is_gene = pl.col("is_gene").cast(pl.String).str.to_lowercase().is_in(["false", "0"]).not_()
    return table.select(
        pl.col("feature_name").cast(pl.String).alias("feature"),
        pl.col("x_location").cast(pl.Float64).fill_null(np.nan).alias("x"),
        pl.col("y_location").cast(pl.Float64).fill_null(np.nan).alias("y"),
        pl.col("qv").cast(pl.Float64),
        pl.col("cell_id").cast(pl.String).alias("cell"),
        is_gene.alias("is_gene"),
    )


def _header(file: Path) -> list[str]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        first = stream.readline(1 << 16)
    return pl.read_csv(io.BytesIO(first)).columns


def _csv_blocks(file: Path, columns: list[str]) -> Iterator[pl.DataFrame]:
    """Yield a table of text in blocks: polars (2.1) unpacks a compressed one whole."""
    kinds = dict.fromkeys(columns, pl.String) | dict.fromkeys(("x_location", "y_location", "qv"), pl.Float64)
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
        with reading(file, "a table of transcripts"):
            head, rest = stream.readline(1 << 16), b""
        while True:
            with reading(file, "a table of transcripts"):
                block = stream.read(BLOCK_BYTES)
                # A block ends within a line, which belongs to the next one.
                whole, mark, rest = (rest + block).rpartition(b"\n") if block else (rest, b"", b"")
                found = pl.read_csv(io.BytesIO(head + whole + mark), columns=columns, schema_overrides=kinds)
            if len(found):
                yield found
            if not block:
                return


def _run(path: Path, frame: SlideFrame) -> tuple[Path, str, TenxMatrix]:
    """Return the folder of a run, the prefix of its files, and its matrix."""
    home = _home(path)
    if home is None:
        raise ExpressionError(f"{path} has no {MATRIX}.h5; give a whole Xenium output folder")
    several = find_matrices(home, (MATRIX,))
    place = (
        path
        if path.is_file() and path.name.endswith(f"{MATRIX}.h5")
        else choose_matrix(home, (MATRIX,), frame)
    )
    assert place is not None
    prefix = next((name for name, found in several.items() if found == place), "")
    return home, prefix, read_matrix(place)


def _home(path: Path) -> Path | None:
    start = path.parent if path.is_file() and path.name.endswith((f"{MATRIX}.h5", EXPERIMENT)) else path
    for folder in (start, start / "outs"):
        if folder.is_dir() and find_matrices(folder, (MATRIX,)):
            return folder
    return None


def _file(home: Path, prefix: str, names: tuple[str, ...]) -> Path | None:
    """Return the first file of these names, that with the sample's prefix before others."""
    places = [home / f"{prefix}_{name}" for name in names if prefix] + [home / name for name in names]
    found = [place for place in places if place.is_file()]
    if not found:
        # The matrix may have been renamed alone, or the others: of one sample there is just one of each.
        found = [place for name in names for place in sorted(home.glob(f"*_{name}")) if place.is_file()]
        found = found if len(found) == 1 else []
    return found[0] if found else None


def _cells(home: Path, prefix: str, matrix: TenxMatrix) -> pl.DataFrame:
    """Return the cells of the matrix, in its order; null where a cell is not in the table."""
    file = _file(home, prefix, CELLS)
    if file is None:
        raise ExpressionError(
            f"{home} has no cells.parquet or cells.csv.gz; give a whole Xenium output folder"
        )
    with reading(file, "a table of cells"):
        frame = pl.read_parquet(file) if file.suffix == ".parquet" else pl.read_csv(file)
        areas = [name for name in ("cell_area",) if name in frame.columns]
        frame = frame.select(
            pl.col("cell_id").cast(pl.String),
            *(pl.col(name).cast(pl.Float64, strict=False) for name in ("x_centroid", "y_centroid", *areas)),
        )
    if frame["cell_id"].is_duplicated().any():
        raise ExpressionError(f"{file} names a cell twice; give the table of one run")
    ids = pl.DataFrame({"cell_id": matrix.barcodes}, schema={"cell_id": pl.String})
    if not ids["cell_id"].is_in(frame["cell_id"].implode()).any():
        raise ExpressionError(
            f"none of {len(ids)} cells of {matrix.file}, such as {matrix.barcodes[:1]}, is in {file}, which has such as "
            f"{frame['cell_id'][:1].to_list()}; give the files of one run"
        )
    # The table of cells may be in another order than the matrix, and lack cells.
    return ids.join(frame, on="cell_id", how="left", maintain_order="left")


def _diameter(cells: pl.DataFrame) -> float:
    areas = cells["cell_area"].drop_nulls().to_numpy() if "cell_area" in cells.columns else np.empty(0)
    areas = areas[np.isfinite(areas) & (areas > 0)]
    # The median: a few badly segmented cells of any size do not move it.
    return 2 * float(np.sqrt(np.median(areas) / np.pi)) if len(areas) else CELL_UM


def place_on_slide(
    home: Path, prefix: str, run_um: NDArray[np.float64], frame: SlideFrame
) -> tuple[NDArray[np.float64], float | None, str]:
    """Return positions in level-0 pixels of the H&E, the mpp that the alignment implies, and a note."""
    file, note = _alignment(home, prefix, frame)
    if file is None:
        return run_um / frame.mpp, None, note
    matrix = _read_alignment(file)
    pixel_um = _pixel_um(home, prefix)
    mpp = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2])))) * pixel_um
    if not MPP_RANGE[0] <= mpp <= MPP_RANGE[1]:
        raise ExpressionError(f"{file} would make the H&E {mpp:.3g} µm/px: it is no alignment matrix")
    morphology = np.column_stack([run_um / pixel_um, np.ones(len(run_um))])
    placed = morphology @ np.linalg.inv(matrix).T
    # Homogeneous coordinates: the third is 1 for an affine, and another number for a projective matrix.
    return placed[:, :2] / placed[:, 2:], mpp, note


def _read_alignment(file: Path) -> NDArray[np.float64]:
    require_file(file)
    try:
        if file.stat().st_size > MOST_ALIGNMENT_BYTES:
            raise ValueError(f"it has {file.stat().st_size} bytes")
        if not file.read_bytes().strip():
            raise ValueError("it is empty")
        matrix = np.loadtxt(file, delimiter=",", dtype=np.float64, encoding="utf-8-sig", ndmin=2)
        if matrix.shape != (3, 3):
            raise ValueError(f"it is {matrix.shape}, not 3 x 3")
        if not np.isfinite(matrix).all() or np.linalg.matrix_rank(matrix) < 3:
            raise ValueError("it has no inverse")
    except ValueError as error:
        raise ExpressionError(f"{file} is no alignment matrix: {error}") from error
    return matrix


def _alignment(home: Path, prefix: str, frame: SlideFrame) -> tuple[Path | None, str]:
    """Return the file that aligns the row's H&E with the run, and a note; None if there is none."""
    found = {
        str(file.relative_to(home)): file for pattern in ALIGNMENTS for file in sorted(home.glob(pattern))
    }
    found = {
        name: file for name, file in found.items() if "keypoint" not in file.name.lower() and file.is_file()
    }
    named = {name: file for name, file in found.items() if frame.section in (name, _picture(name))}
    if frame.section is not None and frame.section != prefix:
        if len(named) == 1:
            return next(iter(named.values())), f"placed by {next(iter(named))}"
        raise ExpressionError(
            f"{home} has no alignment {frame.section!r} (there are: {listed(found) or 'none'}); name one of them"
        )
    # Xenium Explorer names them after the picture, as the slide is by default.
    ours = {name: file for name, file in found.items() if is_named(_picture(name), frame)}
    he = {name: file for name, file in found.items() if _words(name) & _HE}
    others = {name: file for name, file in found.items() if not _words(name) & _IF}
    # By what is certain first: a slide's own name, then a stain's; a picture of neither kind may be any.
    candidates = ours or he or others
    if not candidates:
        unused = f"; {listed(found)} is of a fluorescence picture and not used" if found else ""
        return (
            None,
            f"no alignment matrix (*alignment.csv, *matrix.csv): the slide is taken as registered already{unused}",
        )
    matrices = [_read_alignment(file) for file in candidates.values()]
    if any((matrix != matrices[0]).any() for matrix in matrices):
        first = next(iter(candidates))
        raise ExpressionError(
            f"{home} has several alignments that may be the slide's ({listed(candidates)}); name its own in the sheet's "
            f"expression column, such as {home.name}{MARK}{first}"
        )
    return next(iter(candidates.values())), f"placed by {next(iter(candidates))}"


def _picture(name: str) -> str:
    """Return the picture that an alignment's path names: ``slide1`` of ``slide1_alignment_files/matrix.csv``."""
    return _ENDS.sub("", name)


def _words(name: str) -> set[str]:
    # Whole words, since "if" is also in "specific" and "he" in "sheet". "H&E" is one.
    return set(re.split(r"[^a-z0-9]+", name.lower().replace("h&e", "he")))


def _pixel_um(home: Path, prefix: str) -> float:
    file = _file(home, prefix, (EXPERIMENT,))
    stated = parse_number(read_json(file).get("pixel_size"), "pixel_size", file) if file else None
    return stated or PIXEL_UM


RECORD = ExpressionLayout(
    "xenium", "a Xenium output folder", recognises, read, order=30, has_sections=True, molecules=molecules
)
