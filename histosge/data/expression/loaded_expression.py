"""What a layout's `read` returns, and the rules that hold for every layout: raw counts, unique names, positions.

Terms
    implied mpp   microns per pixel of the slide as the expression's own files have it: from the pitch of
                  the chip, or from what they state
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.documents import DocumentError, parse_json
from featurestore.errors import first_line
from featurestore.input_file import kind_of
from featurestore.wording import counted
from histosge.data.sections import Spots
from histosge.errors import ExpressionError

VISIUM_SPOT_UM = 55.0
"""Diameter of a Visium spot: assumed where a file does not give its own."""
SPOT_UM = (0.1, 1_000.0)
"""Least and most of a spot's diameter: a bin of Stereo-seq is 0.5 µm wide, a region of GeoMx up to 800 µm."""
FARTHEST_UM = 1e6
"""A position farther than 1 m from the slide's corner is none."""
MOST_JSON_BYTES = 64 << 20
"""Of an output folder's JSON: consolidated metadata of a large Zarr take a few MB."""
MOST_COUNTS = 1 << 24
"""Of one gene in one spot: float32 holds all whole numbers up to here, and no method counts as many molecules."""
_YES = ("1", "1.0", "true", "t", "yes", "y")
_NO = ("0", "0.0", "false", "f", "no", "n", "", "nan", "none", "<na>")


@dataclass(frozen=True)
class SlideFrame:
    """The slide that the spots lie on, as far as a reader needs it.

    Parameters
    ----------
    slide_id, donor
        Whose spots.
    mpp
        Microns per level-0 pixel.
    size_px
        ``(width, height)`` at level 0; None if unknown.
    section
        Which of the file's sections, as the sheet names it behind ``#``; None if it names none.
    """

    slide_id: str
    donor: str
    mpp: float
    size_px: tuple[int, int] | None = None
    section: str | None = None


@dataclass(frozen=True)
class LoadedExpression:
    """Spots, and what was learnt from their files.

    Parameters
    ----------
    layout
        In words, such as ``Visium HD, 8 µm bins``.
    implied_mpp
        See the module; None where the layout tells nothing.
    notes
        What was chosen or assumed on the way, a few words each.
    """

    spots: Spots
    layout: str
    implied_mpp: float | None = None
    notes: tuple[str, ...] = ()

    def describe(self, slide_mpp: float) -> str:
        """Return in one line what was found: layout, spots, genes, size of a spot, scale."""
        spots = self.spots
        size = "side" if spots.shape == "square" else "diameter"
        scale = f"{slide_mpp:.4g} µm/px"
        if self.implied_mpp:
            scale += f" ({self.implied_mpp:.4g} by its own files)"
        parts = [
            f"{self.layout}: {counted(len(spots), 'spot')} x {counted(len(spots.genes), 'gene')}",
            f"median {float(np.median(np.asarray(spots.counts.sum(axis=1)))):.0f} counts",
            f"{size} {spots.diameter_um:.4g} µm",
            scale,
        ]
        return ", ".join(parts) + "".join(f"; {note}" for note in self.notes)


def make_spots(
    frame: SlideFrame,
    path: Path,
    barcodes: Sequence[str] | NDArray[Any],
    xy_um: NDArray[np.float64],
    counts: Any,
    genes: Sequence[str],
    *,
    diameter_um: float,
    shape: str = "disc",
    keep: NDArray[np.bool_] | None = None,
) -> Spots:
    """Check and assemble the spots that a layout has read; those without coordinates, or not in `keep`, are left out.

    Parameters
    ----------
    frame, path
        The slide, and the file that messages name.
    barcodes
        ``(n_spots,)``.
    xy_um
        Centres, ``(n_spots, 2)``, microns from the slide's top-left; NaN where a spot has none.
    counts
        ``(n_spots, n_genes)``, dense or sparse.
    genes
        Names; those that occur twice are numbered.
    diameter_um, shape
        Of every spot; the side, where `shape` is ``square``.
    keep
        ``(n_spots,)``; all if None.

    Raises
    ------
    ExpressionError
        If the counts are not raw, the diameter is absurd, or no spot is left.
    """
    if not SPOT_UM[0] <= diameter_um <= SPOT_UM[1]:  # NaN is refused, too
        raise ExpressionError(
            f"{path}: a spot would be {diameter_um:.4g} µm wide; give a diameter of {SPOT_UM[0]:g} to {SPOT_UM[1]:g} µm"
        )
    counted = tuple(getattr(counts, "shape", ()))
    if counted != (len(barcodes), len(genes)) or len(xy_um) != len(barcodes):
        raise ExpressionError(
            f"{path}: counts are {counted}, of {len(barcodes)} barcodes, {len(genes)} genes and {len(xy_um)} positions"
        )
    wanted = is_placed(xy_um)
    if keep is not None:
        wanted &= keep
    if not wanted.any():
        raise ExpressionError(
            f"{path}: none of {len(xy_um)} spots is on tissue and has coordinates; give the section's own file, or leave "
            "its row out"
        )
    spots = Spots(
        frame.slide_id,
        frame.donor,
        np.asarray(barcodes, dtype=np.str_),
        xy_um,
        diameter_um,
        raw_counts(counts, path),
        unique_names(genes),
        shape,
    )
    if wanted.all():
        return spots
    return replace(
        spots,
        barcodes=spots.barcodes[wanted],
        xy_um=xy_um[wanted],
        counts=spots.counts[np.flatnonzero(wanted)],
    )


def is_placed(xy_um: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which spots, ``(n_spots, 2)``, have a position that can be one."""
    # NaN compares as false, so a spot without coordinates is not placed either.
    return np.asarray((np.abs(xy_um) <= FARTHEST_UM).all(axis=1))


def left_out(xy_um: NDArray[np.float64], keep: NDArray[np.bool_] | None = None) -> tuple[str, ...]:
    """Return notes on the spots that `make_spots` leaves out, counted by reason."""
    on_tissue = np.ones(len(xy_um), bool) if keep is None else keep
    n_off, n_unplaced = int((~on_tissue).sum()), int((on_tissue & ~is_placed(xy_um)).sum())
    return (
        *([f"{counted(n_off, 'spot')} marked as off tissue left out"] if n_off else []),
        *([f"{counted(n_unplaced, 'spot')} without a position left out"] if n_unplaced else []),
    )


def parse_flags(values: Any, path: Path) -> NDArray[np.bool_]:
    """Return a column such as `in_tissue` as yes or no: numbers, truth values or words; what is missing is no.

    Raises
    ------
    ExpressionError
        Naming a value that is neither.
    """
    array = np.asarray(values)
    if array.dtype.kind in "biuf":
        return np.asarray(array > 0)
    # Words come from tables that pandas, R or a spreadsheet wrote again.
    words = np.array([_word(value) for value in array.ravel().tolist()], dtype=np.str_)
    unknown = ~np.isin(words, (*_YES, *_NO))
    if unknown.any():
        raise ExpressionError(
            f"{path}: in_tissue is {str(words[unknown][0])[:40]!r} for {int(unknown.sum())} spots; write 1 or 0"
        )
    return np.isin(words, _YES)


def _word(value: Any) -> str:
    # HDF5 holds text as bytes where the writer did not say that it is text.
    text = value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
    return text.strip().lower()


def parse_number(value: Any, name: str, path: Path) -> float | None:
    """Return a stated length or scale; None if it is missing or 0, which tools write where they do not know it.

    Raises
    ------
    ExpressionError
        If it is anything but one positive number.
    """
    array = np.asarray(value)
    if value is None or (array.dtype.kind in "biuf" and array.size == 1 and float(array.ravel()[0]) == 0):
        return None
    if array.dtype.kind not in "iuf" or array.size != 1 or not 0 < float(array.ravel()[0]) < np.inf:
        raise ExpressionError(f"{path}: {name} is {str(value)[:40]!r}; it should be a positive number")
    return float(array.ravel()[0])


def check_matrix(matrix: Any, path: Path | str) -> None:
    """Check a matrix of a file before anything is computed with it.

    Raises
    ------
    ExpressionError
        If it is no matrix of numbers, or a sparse one whose indices point outside.
    """
    dtype = getattr(matrix, "dtype", None)
    if getattr(matrix, "ndim", None) != 2 or dtype is None or dtype.kind not in "biuf":
        raise ExpressionError(
            f"{path}: counts are {type(matrix).__name__} of {dtype}; give a matrix of numbers"
        )
    if sparse.issparse(matrix) and hasattr(matrix, "check_format"):
        try:
            # scipy trusts indices: one outside is read from, and written to, memory of something else.
            matrix.check_format(full_check=True)
        except ValueError as error:
            raise ExpressionError(f"{path}: the sparse counts are damaged: {error}") from error


def raw_counts(matrix: Any, path: Path) -> sparse.csr_matrix:
    """Return counts as a sparse matrix, float32.

    Raises
    ------
    ExpressionError
        If a value is negative, missing, no whole number or over `MOST_COUNTS`, or all are zero.
    """
    check_matrix(matrix, path)
    counts = sparse.csr_matrix(matrix)
    if counts.dtype.kind == "b":
        counts = counts.astype(np.uint8)
    values = counts.data
    if not np.isfinite(values).all() or (values < 0).any():
        raise ExpressionError(f"{path}: counts hold negative or missing values; give the raw counts")
    if values.dtype.kind not in "iu" and not np.array_equal(values, np.round(values)):
        raise ExpressionError(
            f"{path}: counts look normalised (e.g. {values[values != np.round(values)][0]:.3f}); "
            'put the raw counts in X or layers["counts"]'
        )
    if not values.any():
        raise ExpressionError(f"{path}: all counts are zero")
    if values.max() > MOST_COUNTS:
        raise ExpressionError(
            f"{path}: counts reach {float(values.max()):.3g}, over {MOST_COUNTS}, which no spot has; give the raw counts"
        )
    return counts.astype(np.float32)


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of an output folder.

    Raises
    ------
    ExpressionError
        If it is no JSON object.
    """
    try:
        if file.stat().st_size > MOST_JSON_BYTES:
            raise ExpressionError(f"{file} has more than {MOST_JSON_BYTES >> 20} MB: it is damaged")
        # With a byte order mark, as some editors on Windows write it.
        value = parse_json(file.read_text(encoding="utf-8-sig"), str(file))
    except DocumentError as error:
        raise ExpressionError(str(error)) from error
    except (OSError, ValueError) as error:
        raise ExpressionError(f"{file} is damaged: {first_line(error)}") from error
    if not isinstance(value, dict):
        raise ExpressionError(f"{file} is damaged: it holds {type(value).__name__}, not an object")
    return value


def zarr_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a Zarr group on disk, format 2 or 3; empty for anything else."""
    # By hand, not by zarr: layouts are recognised before it is known that this is a Zarr group at all.
    for name, inner in (("zarr.json", "attributes"), (".zattrs", None)):
        file = path / name
        if file.is_file():
            try:
                document = read_json(file)
            except ExpressionError:
                return {}
            attributes = document.get(inner) if inner else document
            return attributes if isinstance(attributes, dict) else {}
    return {}


def check_zarr_folder(path: Path) -> None:
    """Check a Zarr folder before a library that takes its path reads it.

    Raises
    ------
    ExpressionError
        If an array may not be opened, see `featurestore.zarr_documents`, or something in it is no regular file.
    """
    for folder, _, names in os.walk(path):
        for name in names:
            # A library that opens a pipe waits for whoever writes into it.
            if kind_of(os.path.join(folder, name)) == "other":  # noqa: PTH118  # a hundred thousand chunks
                raise ExpressionError(f"{path} is not read: {name} in it is a pipe or a device")
    # Here, since only readers of Zarr need zarr.
    from featurestore.checked_zarr import check_tree

    try:
        check_tree(path)
    except (DocumentError, OSError) as error:
        raise ExpressionError(f"{path} is not read: {first_line(error)}") from error


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Append ``-1``, ``-2`` ... to the second, third ... gene of one name, as AnnData does.

    A number that makes another gene's name is passed over.
    """
    taken = set(names)
    used: set[str] = set()
    last: dict[str, int] = {}
    out = []
    for name in names:
        unique = name
        while unique in used or (unique != name and unique in taken):
            last[name] = last.get(name, 0) + 1
            unique = f"{name}-{last[name]}"
        used.add(unique)
        out.append(unique)
    return tuple(out)


def implied_mpp(array_um: NDArray[np.float64], xy_px: NDArray[np.float64]) -> float | None:
    """Return microns per pixel from where spots lie on the chip and on the slide, ``(n, 2)`` each.

    The chip may be turned, shifted or mirrored on the slide. None if the spots do not span an area.
    """
    known = np.isfinite(array_um).all(axis=1) & np.isfinite(xy_px).all(axis=1)
    # Three spots determine an affine exactly; only from the fourth on is the fit evidence of anything.
    if known.sum() < 4:
        return None
    chip, pixels = (a[known] - a[known].mean(axis=0) for a in (array_um, xy_px))
    matrix, _, rank, _ = np.linalg.lstsq(chip, pixels, rcond=1e-6)
    # Pixels per square micron: the determinant, whose sign alone tells whether the chip lies mirrored.
    area = abs(float(np.linalg.det(matrix)))
    return 1 / float(np.sqrt(area)) if rank == 2 and area > 0 else None
