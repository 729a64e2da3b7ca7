"""Xenium output: cells with their transcripts counted; positions brought from its own frame to the H&E's.

The H&E is stained and scanned after the run. What ties it to the run is an alignment matrix, a CSV of
3 x 3 numbers that Xenium Explorer writes: H&E pixels -> pixels of the morphology picture.

Terms
    pixel size   microns per pixel of the morphology picture, in ``experiment.xenium``
"""

from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from featurestore.errors import first_line
from histosge.data.expression.expression_layout import ExpressionLayout
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame, make_spots, read_json
from histosge.data.expression.tenx import find_matrix, read_matrix
from histosge.errors import ExpressionError

MATRIX = "cell_feature_matrix"
CELLS = ("cells.parquet", "cells.csv.gz", "cells.csv")
PIXEL_UM = 0.2125
"""Of every Xenium instrument so far: assumed where ``experiment.xenium`` is missing."""
CELL_UM = 10.0
"""Diameter of a cell where the areas are not given."""
# The H&E's own first: a folder may hold the alignment of another picture, too.
ALIGNMENTS = ("*he_imagealignment.csv", "*imagealignment.csv", "*alignment*.csv", "matrix.csv")


def recognises(path: Path) -> bool:
    """Tell whether this is a Xenium output folder."""
    return _home(path) is not None


def read(path: Path, frame: SlideFrame) -> LoadedExpression:
    """Read cells: centroids in microns, through the alignment matrix if there is one."""
    home = _home(path)
    place = find_matrix(home, (MATRIX,)) if home else None
    if home is None or place is None:
        raise ExpressionError(f"{path} has no {MATRIX}.h5; give a whole Xenium output folder")
    matrix = read_matrix(place)
    cells = _cells(home)
    # The table of cells may be in another order than the matrix, and lack cells.
    joined = pl.DataFrame({"cell_id": matrix.barcodes}).join(
        cells, on="cell_id", how="left", maintain_order="left"
    )
    run_um = joined.select("x_centroid", "y_centroid").to_numpy().astype(np.float64)
    xy_px, mpp, note = _on_slide(home, run_um, frame.mpp)
    notes = [note, *([f"{matrix.other_features} control features left out"] if matrix.other_features else [])]
    spots = make_spots(
        frame,
        home,
        matrix.barcodes,
        xy_px * frame.mpp,
        matrix.counts,
        matrix.genes,
        diameter_um=_diameter(joined),
    )
    return LoadedExpression(spots, "Xenium, one spot a cell", mpp, tuple(notes))


def _home(path: Path) -> Path | None:
    start = path.parent if path.is_file() and path.name in (f"{MATRIX}.h5", "experiment.xenium") else path
    for folder in (start, start / "outs"):
        if folder.is_dir() and any((folder / name).exists() for name in (f"{MATRIX}.h5", MATRIX)):
            return folder
    return None


def _cells(home: Path) -> pl.DataFrame:
    file = next((home / name for name in CELLS if (home / name).is_file()), None)
    if file is None:
        raise ExpressionError(
            f"{home} has no cells.parquet or cells.csv.gz; give a whole Xenium output folder"
        )
    try:
        frame = pl.read_parquet(file) if file.suffix == ".parquet" else pl.read_csv(file)
        return frame.with_columns(pl.col("cell_id").cast(pl.String))
    except (pl.exceptions.PolarsError, OSError) as error:
        raise ExpressionError(f"{file} cannot be read: {first_line(error)}") from error


def _diameter(cells: pl.DataFrame) -> float:
    # The median: a few badly segmented cells of any size do not move it.
    areas = cells["cell_area"].drop_nulls().to_numpy() if "cell_area" in cells.columns else np.empty(0)
    return 2 * float(np.sqrt(np.median(areas) / np.pi)) if len(areas) else CELL_UM


def _on_slide(
    home: Path, run_um: NDArray[np.float64], slide_mpp: float
) -> tuple[NDArray[np.float64], float | None, str]:
    """Return positions in level-0 pixels of the H&E, the mpp that the alignment implies, and a note."""
    file = next((f for pattern in ALIGNMENTS for f in sorted(home.glob(pattern))), None)
    if file is None:
        return (
            run_um / slide_mpp,
            None,
            "no alignment matrix (*alignment.csv): the slide is taken as registered already",
        )
    try:
        matrix = np.loadtxt(file, delimiter=",", dtype=np.float64)
        if matrix.shape != (3, 3):
            raise ValueError(f"it is {matrix.shape}, not 3 x 3")
        inverse = np.linalg.inv(matrix)
    except (ValueError, np.linalg.LinAlgError) as error:
        raise ExpressionError(f"{file} is no alignment matrix: {error}") from error
    pixel_um = _pixel_um(home)
    morphology = np.column_stack([run_um / pixel_um, np.ones(len(run_um))])
    placed = morphology @ inverse.T
    mpp = float(np.sqrt(abs(np.linalg.det(matrix[:2, :2])))) * pixel_um
    # Homogeneous coordinates: the third is 1 for an affine, and another number for a projective matrix.
    return placed[:, :2] / placed[:, 2:], mpp, f"placed by {file.name}"


def _pixel_um(home: Path) -> float:
    file = home / "experiment.xenium"
    return float(read_json(file).get("pixel_size", PIXEL_UM)) if file.is_file() else PIXEL_UM


RECORD = ExpressionLayout("xenium", "a Xenium output folder", recognises, read, order=30)
