"""The dense truth of a synthetic section: what a map is compared with.

Terms
    rate      expected share of a position's transcripts, times 10,000: log1p of it is what a map of
              log1p(CP10k) should show
    lattice   8 microns a step, ``(y, x)`` row-major; centres in microns from the slide's top-left
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featurestore.whole_file import whole_file
from histosge.errors import ExpressionError
from histosge.synthetic.spec import LATTICE_UM

VERSION = 1
# What numpy and zipfile raise for files that are cut short, no archives, or archives of something else.
_UNREADABLE = (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile)


@dataclass(frozen=True)
class Truth:
    """Rates of every gene over the whole slide.

    Parameters
    ----------
    rates
        Per 10,000, float32, ``(gene, y, x)``; they sum to 10,000 over genes on tissue and are NaN elsewhere.
    y_um, x_um
        Centres of the lattice positions.
    label
        Tissue type of every position, uint8, ``(y, x)``: a place in `anatomy.TISSUES`, 0 = background.
    genes
        Names along the first axis of `rates`.
    families
        Family -> names: morphology, gradient, noise, housekeeping.
    depth
        Expected total counts of a whole spot there, float32, ``(y, x)``; NaN on background.
    """

    rates: NDArray[np.float32]
    y_um: NDArray[np.floating]
    x_um: NDArray[np.floating]
    label: NDArray[np.uint8]
    genes: tuple[str, ...]
    families: dict[str, tuple[str, ...]]
    depth: NDArray[np.float32]


def save_truth(path: Path, truth: Truth, spec_json: str) -> None:
    """Write a truth, whole or not at all; only tissue positions are stored."""
    tissue = truth.label > 0
    header = {"version": VERSION, "families": truth.families, "genes": truth.genes}
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez(
            file,
            rates=truth.rates[:, tissue],
            label=truth.label,
            depth=truth.depth[tissue],
            header=np.array(json.dumps(header)),
            spec=np.array(spec_json),
        )


def load_truth(path: str | Path) -> Truth:
    """Read a truth that `make_section` wrote.

    Raises
    ------
    ExpressionError
        If it is not there, or is no such file.
    """
    try:
        with np.load(path) as data:
            header = json.loads(str(data["header"]))
            label, tissue_rates, tissue_depth = data["label"], data["rates"], data["depth"]
    except FileNotFoundError as error:
        raise ExpressionError(
            f"there is no truth at {path}; make_section writes one beside its slide"
        ) from error
    except _UNREADABLE as error:
        raise ExpressionError(f"{path} is no truth of a synthetic section: {error}") from error
    tissue = label > 0
    rates = np.full((len(tissue_rates), *label.shape), np.nan, np.float32)
    rates[:, tissue] = tissue_rates
    depth = np.full(label.shape, np.nan, np.float32)
    depth[tissue] = tissue_depth
    # Not stored: they follow from the shape.
    y_um, x_um = ((np.arange(n) + 0.5) * LATTICE_UM for n in label.shape)
    families = {family: tuple(names) for family, names in header["families"].items()}
    return Truth(rates, y_um, x_um, label, tuple(header["genes"]), families, depth)


def read_spec(path: Path) -> str | None:
    """Return the spec that a truth was made from as text, or None where there is no readable truth."""
    try:
        with np.load(path) as data:
            return str(data["spec"])
    except _UNREADABLE:
        return None


def truth_at(truth: Truth, xy_um: NDArray[np.float64], side_um: float) -> NDArray[np.float64]:
    """Average the rates over squares.

    Parameters
    ----------
    xy_um
        Centres ``(x, y)`` in microns from the slide's top-left, ``(n, 2)``.
    side_um
        Side of the squares; positions that a square cuts count by the area inside.

    Returns
    -------
    numpy.ndarray
        Rates (not logarithms), ``(n, n_genes)``: the mean over the tissue in each square, NaN where there is none.
    """
    place = _Squares(np.asarray(xy_um, dtype=np.float64), side_um, truth.label.shape)
    area = place.sums((truth.label > 0).astype(np.float64))
    out = np.full((len(area), len(truth.genes)), np.nan)
    some = area > 1e-6
    # One gene at a time, as running sums need float64: of all genes they would take twice the truth's memory.
    for gene, values in enumerate(truth.rates):
        out[some, gene] = place.sums(np.nan_to_num(values).astype(np.float64))[some] / area[some]
    return out


class _Squares:
    """Squares on the lattice, ready to sum any field under them by one running total."""

    def __init__(self, xy_um: NDArray[np.float64], side_um: float, shape: tuple[int, ...]) -> None:
        self._corners = []
        for axis, n in ((1, shape[0]), (0, shape[1])):
            edges = (xy_um[:, axis] + np.array([[-0.5], [0.5]]) * side_um) / LATTICE_UM
            edges = np.clip(edges, 0, n)
            whole = np.minimum(np.floor(edges).astype(np.int64), n - 1)
            self._corners.append((whole, edges - whole))

    def sums(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the sum under each square, in lattice positions."""
        # A summed-area table: four look-ups give the sum over any rectangle.
        total = np.zeros((values.shape[0] + 1, values.shape[1] + 1))
        np.cumsum(np.cumsum(values, axis=0), axis=1, out=total[1:, 1:])
        (rows, down), (cols, across) = self._corners

        def upto(i: int, j: int) -> NDArray[np.float64]:
            """Interpolate the running total: exact, as values are constant within a position."""
            row, col, d, a = rows[i], cols[j], down[i], across[j]
            upper = total[row, col] * (1 - a) + total[row, col + 1] * a
            lower = total[row + 1, col] * (1 - a) + total[row + 1, col + 1] * a
            return np.asarray(upper * (1 - d) + lower * d)

        return upto(1, 1) - upto(0, 1) - upto(1, 0) + upto(0, 0)
