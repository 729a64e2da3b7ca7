"""What a layout's `read` returns, and the rules that hold for every layout: raw counts, unique names, positions.

Terms
    implied mpp   microns per pixel of the slide as the expression's own files have it: from the pitch of
                  the chip, or from what they state
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from featurestore.documents import DocumentError, parse_json
from featurestore.errors import first_line
from histosge.data.sections import Spots
from histosge.errors import ExpressionError

VISIUM_SPOT_UM = 55.0
"""Diameter of a Visium spot: assumed where a file does not give its own."""


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
    """

    slide_id: str
    donor: str
    mpp: float
    size_px: tuple[int, int] | None = None


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
            f"{self.layout}: {len(spots)} spots x {len(spots.genes)} genes",
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
        If the counts are not raw, or no spot is left.
    """
    wanted = np.isfinite(xy_um).all(axis=1)
    if keep is not None:
        wanted &= keep
    if not wanted.any():
        raise ExpressionError(f"{path}: none of {len(xy_um)} spots is on tissue and has coordinates")
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


def raw_counts(matrix: Any, path: Path) -> sparse.csr_matrix:
    """Return counts as a sparse matrix, float32.

    Raises
    ------
    ExpressionError
        If a value is negative, missing or no whole number, or all are zero.
    """
    counts = sparse.csr_matrix(matrix)
    values = counts.data
    if not np.isfinite(values).all() or (values < 0).any():
        raise ExpressionError(f"{path}: counts hold negative or missing values; give the raw counts")
    if values.dtype.kind not in "iu" and not np.array_equal(values, np.round(values)):
        raise ExpressionError(
            f"{path}: counts look normalised (e.g. {values[values != np.round(values)][0]:.3f}); "
            'put the raw counts in X or layers["counts"]'
        )
    if values.sum() == 0:
        raise ExpressionError(f"{path}: all counts are zero")
    # Exact: float32 holds whole numbers up to 16 million.
    return counts.astype(np.float32)


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object of an output folder.

    Raises
    ------
    ExpressionError
        If it is no JSON.
    """
    try:
        value = parse_json(file.read_bytes(), str(file))
    except DocumentError as error:
        raise ExpressionError(str(error)) from error
    if not isinstance(value, dict):
        raise ExpressionError(f"{file} is damaged: it is no JSON object")
    return value


def zarr_attributes(path: Path) -> dict[str, Any]:
    """Return the attributes of a Zarr group on disk, format 2 or 3; empty for anything else."""
    # By hand, not by zarr: layouts are recognised before it is known that this is a Zarr group at all.
    for name, inner in (("zarr.json", "attributes"), (".zattrs", None)):
        file = path / name
        if file.is_file():
            try:
                document = parse_json(file.read_bytes(), str(file))
            except DocumentError:
                return {}
            attributes = document.get(inner) if inner and isinstance(document, dict) else document
            return dict(attributes) if isinstance(attributes, dict) else {}
    return {}


def check_zarr_folder(path: Path) -> None:
    """Check the metadata of a Zarr folder before a library that takes its path reads it.

    Raises
    ------
    ExpressionError
        If an array may not be opened, see `featurestore.zarr_documents`.
    """
    # Here, since only readers of Zarr need zarr.
    from featurestore.checked_zarr import check_tree

    try:
        check_tree(path)
    except (DocumentError, OSError) as error:
        raise ExpressionError(f"{path} is not read: {first_line(error)}") from error


def unique_names(names: Sequence[str]) -> tuple[str, ...]:
    """Append ``-1``, ``-2`` ... to the second, third ... gene of one name, as AnnData does."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        again = seen.get(name, -1) + 1
        seen[name] = again
        out.append(f"{name}-{again}" if again else name)
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
