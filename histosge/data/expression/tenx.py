"""The 10x files that Space Ranger and Xenium share: the count matrix, as HDF5 or as a Matrix Market folder."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import h5py
import numpy as np
import polars as pl
from scipy import io, sparse

from featurestore.errors import first_line
from histosge.errors import ExpressionError

GENE_EXPRESSION = "Gene Expression"


@dataclass(frozen=True)
class TenxMatrix:
    """Counts of genes, ``(n_barcodes, n_genes)``; other features (antibodies, controls) are left out.

    Parameters
    ----------
    file
        Where it was read from.
    other_features
        How many were left out.
    """

    file: Path
    barcodes: list[str]
    genes: list[str]
    counts: sparse.csr_matrix
    other_features: int


def find_matrix(folder: Path, names: tuple[str, ...]) -> Path | None:
    """Return the first of the named matrices in a folder: ``<name>.h5``, with a prefix too, or ``<name>/``."""
    for name in names:
        # Files from the download page carry the sample's name in front.
        files = [folder / f"{name}.h5", *sorted(folder.glob(f"*_{name}.h5"))]
        for place in files:
            if place.is_file():
                return place
        if (folder / name).is_dir():
            return folder / name
    return None


def read_matrix(place: Path) -> TenxMatrix:
    """Read a matrix that `find_matrix` found.

    Raises
    ------
    ExpressionError
        If it is none.
    """
    try:
        return _read_folder(place) if place.is_dir() else _read_h5(place)
    except (OSError, KeyError, ValueError, pl.exceptions.PolarsError) as error:
        if isinstance(error, ExpressionError):
            raise
        raise ExpressionError(f"{place} is no 10x matrix: {first_line(error)}") from error


def _read_h5(file: Path) -> TenxMatrix:
    with h5py.File(file) as h5:
        matrix = h5["matrix"]
        barcodes = [b.decode() for b in matrix["barcodes"][:]]
        features = matrix["features"]
        names = [g.decode() for g in features["name"][:]]
        kinds = [k.decode() for k in features["feature_type"][:]]
        arrays = (matrix["data"][:], matrix["indices"][:], matrix["indptr"][:])
    # Stored as columns of barcodes: the same arrays are rows of barcodes.
    counts = sparse.csr_matrix(arrays, shape=(len(barcodes), len(names)))
    return _genes_only(file, barcodes, names, kinds, counts)


def _read_folder(folder: Path) -> TenxMatrix:
    barcodes = [row[0] for row in _tsv(folder, "barcodes.tsv")]
    name = "features.tsv" if _find_file(folder, "features.tsv") else "genes.tsv"
    features = _tsv(folder, name)
    matrix = _find_file(folder, "matrix.mtx")
    if matrix is None:
        raise ExpressionError(f"{folder} has no matrix.mtx.gz; give a whole output folder")
    with _open(matrix) as stream:
        # Features are the rows of a Matrix Market file.
        counts = sparse.csr_matrix(io.mmread(stream)).T.tocsr()
    # Cell Ranger 2 and older wrote genes.tsv, without the column that tells genes from other features.
    kinds = [row[2] if len(row) > 2 else GENE_EXPRESSION for row in features]
    names = [row[1] if len(row) > 1 else row[0] for row in features]
    if counts.shape != (len(barcodes), len(names)):
        raise ExpressionError(
            f"{folder}: matrix.mtx is {counts.shape[1]} x {counts.shape[0]}, but there are {len(names)} "
            f"features and {len(barcodes)} barcodes"
        )
    return _genes_only(folder, barcodes, names, kinds, sparse.csr_matrix(counts))


def _find_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _tsv(folder: Path, name: str) -> list[list[str]]:
    path = _find_file(folder, name)
    if path is None:
        raise ExpressionError(f"{folder} has no {name}.gz; give a whole output folder")
    with _open(path) as stream:
        return [line.split("\t") for line in stream.read().decode().splitlines()]


def _genes_only(
    file: Path, barcodes: list[str], names: list[str], kinds: list[str], counts: sparse.csr_matrix
) -> TenxMatrix:
    wanted = np.flatnonzero(np.array(kinds) == GENE_EXPRESSION)
    if len(wanted) == 0:
        raise ExpressionError(
            f"{file} holds no feature of type {GENE_EXPRESSION!r}, only {sorted(set(kinds))}"
        )
    genes = [names[i] for i in wanted]
    if len(wanted) < len(names):  # a copy of a large matrix is not made for nothing
        counts = counts[:, wanted]
    return TenxMatrix(file, barcodes, genes, counts, len(names) - len(wanted))
