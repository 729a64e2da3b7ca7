"""The 10x files that Space Ranger and Xenium share: the count matrix, as HDF5 or as a Matrix Market folder."""

import gzip
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import h5py
import numpy as np
from scipy import io, sparse

from histosge.data.expression.foreign_files import MOST_COMPRESSED, check_hdf5, reading
from histosge.data.expression.loaded_expression import SlideFrame, check_matrix
from histosge.data.expression.section_choice import choose_section
from histosge.errors import ExpressionError

GENE_EXPRESSION = "Gene Expression"
MOST_TEXT_BYTES = 1 << 30
"""Of a table of barcodes or features. A Visium HD run has 11 million bins of 2 µm, whose names take 300 MB."""
_KIND = "a 10x matrix"


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


def find_matrices(folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """Return the matrices of a folder by their prefix: ``<prefix>_<name>.h5`` or ``<prefix>_<name>/``.

    Parameters
    ----------
    names
        Only those of the first name that occurs are returned.

    Returns
    -------
    dict
        The prefix is empty for a matrix without one. Files from the download page carry the sample's name there.
    """
    for name in names:
        found: dict[str, Path] = {}
        # HDF5 first: the Matrix Market folder beside it holds the same.
        for end, is_there in ((f"{name}.h5", Path.is_file), (name, Path.is_dir)):
            for place in (folder / end, *sorted(folder.glob(f"*_{end}"))):
                if is_there(place):
                    found.setdefault(place.name.removesuffix(end).removesuffix("_"), place)
        if found:
            return found
    return {}


def choose_matrix(folder: Path, names: tuple[str, ...], frame: SlideFrame) -> Path | None:
    """Return the matrix of a folder, of several the one with the row's name in front; None if there is none.

    Raises
    ------
    ExpressionError
        If there are several, and none is named like the row.
    """
    found = find_matrices(folder, names)
    if len(found) < 2:
        return next(iter(found.values()), None)
    # The one without a prefix cannot be named: each of the others might be meant with it.
    prefixes = [prefix for prefix in found if prefix] + [
        place.name for prefix, place in found.items() if not prefix
    ]
    return found[choose_section(prefixes, frame, folder, "matrices of several samples")]


def read_matrix(place: Path) -> TenxMatrix:
    """Read a matrix that `find_matrices` found.

    Raises
    ------
    ExpressionError
        If it is none, or is damaged.
    """
    matrix = _read_folder(place) if place.is_dir() else _read_h5(place)
    if len(set(matrix.barcodes)) != len(matrix.barcodes):
        raise ExpressionError(
            f"{place} names a barcode twice: it is damaged, or was joined from several runs"
        )
    return matrix


def _read_h5(file: Path) -> TenxMatrix:
    check_hdf5(file)
    with reading(file, _KIND), h5py.File(file) as h5:
        matrix = h5["matrix"]
        barcodes = [b.decode() for b in matrix["barcodes"][:]]
        features = matrix["features"]
        names = [g.decode() for g in features["name"][:]]
        kinds = [k.decode() for k in features["feature_type"][:]]
        arrays = (matrix["data"][:], matrix["indices"][:], matrix["indptr"][:])
        # Stored as columns of barcodes: the same arrays are rows of barcodes.
        counts = sparse.csr_matrix(arrays, shape=(len(barcodes), len(names)))
    check_matrix(counts, file)
    return _genes_only(file, barcodes, names, kinds, counts)


def _read_folder(folder: Path) -> TenxMatrix:
    barcodes = [row[0] for row in _tsv(folder, "barcodes.tsv")]
    name = "features.tsv" if _find_file(folder, "features.tsv") else "genes.tsv"
    features = _tsv(folder, name)
    matrix = _find_file(folder, "matrix.mtx")
    if matrix is None:
        raise ExpressionError(f"{folder} has no matrix.mtx.gz; give a whole output folder")
    # Cell Ranger 2 and older wrote genes.tsv, without the column that tells genes from other features.
    kinds = [row[2] if len(row) > 2 else GENE_EXPRESSION for row in features]
    names = [row[1] if len(row) > 1 else row[0] for row in features]
    # Before the numbers: scipy takes the memory that the header claims.
    with reading(matrix, _KIND), _open(matrix) as stream:
        n_rows, n_cols, n_entries, *_ = io.mminfo(stream)
    if (n_rows, n_cols) != (len(names), len(barcodes)):
        raise ExpressionError(
            f"{folder}: matrix.mtx is {n_rows} x {n_cols}, but there are {len(names)} features and {len(barcodes)} barcodes"
        )
    # An entry takes six bytes of text at least, such as "1 1 1" and the end of its line.
    if n_entries > matrix.stat().st_size * (MOST_COMPRESSED if matrix.suffix == ".gz" else 1) / 6 + 1:
        raise ExpressionError(f"{matrix} claims {n_entries} entries, more than it can hold: it is damaged")
    with reading(matrix, _KIND), _open(matrix) as stream:
        # Features are the rows of a Matrix Market file.
        counts = sparse.csr_matrix(io.mmread(stream)).T.tocsr()
    return _genes_only(folder, barcodes, names, kinds, sparse.csr_matrix(counts))


def _find_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _tsv(folder: Path, name: str) -> list[list[str]]:
    path = _find_file(folder, name)
    if path is None:
        raise ExpressionError(f"{folder} has no {name}.gz; give a whole output folder")
    with reading(path, "a table"), _open(path) as stream:
        data = stream.read(MOST_TEXT_BYTES + 1)
        if len(data) > MOST_TEXT_BYTES:
            raise ExpressionError(f"{path} holds over {MOST_TEXT_BYTES >> 30} GB of names: it is damaged")
        return [line.split("\t") for line in data.decode("utf-8-sig").splitlines()]


def _genes_only(
    file: Path, barcodes: list[str], names: list[str], kinds: list[str], counts: sparse.csr_matrix
) -> TenxMatrix:
    if len(kinds) != len(names):
        raise ExpressionError(
            f"{file} has {len(names)} features and {len(kinds)} feature types: it is damaged"
        )
    wanted = np.flatnonzero(np.array(kinds) == GENE_EXPRESSION)
    if len(wanted) == 0:
        raise ExpressionError(
            f"{file} holds no feature of type {GENE_EXPRESSION!r}, only {sorted(set(kinds))}"
        )
    genes = [names[i] for i in wanted]
    if len(wanted) < len(names):  # a copy of a large matrix is not made for nothing
        counts = counts[:, wanted]
    return TenxMatrix(file, barcodes, genes, counts, len(names) - len(wanted))
