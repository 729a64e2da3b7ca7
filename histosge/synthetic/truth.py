"""The known expression of a synthetic section: keep it, load it, average it.

Terms
    rate   expected counts per 10,000 (CP10k) of one gene at one lattice position
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from histosge.errors import ExpressionError
from histosge.synthetic.fields import LATTICE_UM, centres_um


@dataclass(frozen=True)
class Truth:
    """Expression rates everywhere on a section.

    Parameters
    ----------
    rates
        CP10k, ``(n_genes, n_y, n_x)``, float32; they sum to 10,000 over genes, NaN on background.
    y_um, x_um
        Lattice centres in microns from the slide's top-left, ``(n_y,)`` and ``(n_x,)``.
    label
        Tissue type: 0 = background, else 1 + place in ``TISSUE_TYPES``; ``(n_y, n_x)``, uint8.
    library
        Expected depth relative to the section's median, ``(n_y, n_x)``, float32, NaN on background.
    genes
        In the order of `rates`.
    families
        Family -> its genes: ``morphology``, ``gradient``, ``noise``, ``housekeeping``.
    """

    rates: NDArray[np.float32]
    y_um: NDArray[np.float64]
    x_um: NDArray[np.float64]
    label: NDArray[np.uint8]
    library: NDArray[np.float32]
    genes: tuple[str, ...]
    families: dict[str, tuple[str, ...]]


def save_truth(path: Path, truth: Truth) -> None:
    """Write a truth as ``.npz``; only tissue positions are stored."""
    tissue = truth.label > 0
    family_of = {gene: name for name, genes in truth.families.items() for gene in genes}
    with path.open("wb") as file:
        np.savez(
            file,
            rates=truth.rates[:, tissue],
            label=truth.label,
            library=truth.library[tissue],
            genes=np.array(truth.genes),
            family=np.array([family_of[gene] for gene in truth.genes]),
        )


def load_truth(path: str | Path) -> Truth:
    """Read what `make_section` wrote.

    Raises
    ------
    ExpressionError
        If there is no truth at `path`.
    """
    try:
        with np.load(path) as held:
            stored = {name: held[name] for name in ("rates", "label", "library", "genes", "family")}
    except (OSError, KeyError, ValueError) as error:
        raise ExpressionError(
            f"{path} holds no synthetic truth ({error}); make one with make_section()"
        ) from error
    label = stored["label"]
    rates = np.full((len(stored["genes"]), *label.shape), np.nan, np.float32)
    rates[:, label > 0] = stored["rates"]
    library = np.full(label.shape, np.nan, np.float32)
    library[label > 0] = stored["library"]
    families: dict[str, tuple[str, ...]] = {}
    for gene, name in zip(stored["genes"].tolist(), stored["family"].tolist(), strict=True):
        families[name] = (*families.get(name, ()), gene)
    y_um, x_um = (centres_um(n) for n in label.shape)
    return Truth(rates, y_um, x_um, label, library, tuple(stored["genes"].tolist()), families)


def truth_at(truth: Truth, xy_um: NDArray[np.float64], side_um: float) -> NDArray[np.float64]:
    """Average the rates over squares, exactly, borders that cut lattice positions included.

    Parameters
    ----------
    xy_um
        Centres ``(x, y)`` in microns from the slide's top-left, ``(n, 2)``.
    side_um
        Side of a square.

    Returns
    -------
    numpy.ndarray
        CP10k, ``(n, n_genes)``: the mean over the tissue in the square; NaN where there is none.
    """
    tissue = truth.label > 0
    corners = _corners(np.asarray(xy_um, dtype=np.float64), side_um, tissue.shape)
    area = _square_sums(tissue.astype(np.float64), corners)
    # Less than a thousandth of a lattice position is rounding, not tissue.
    known = area > 1e-3
    out = np.full((len(area), len(truth.genes)), np.nan)
    for gene, plane in enumerate(truth.rates):
        sums = _square_sums(np.where(tissue, plane, 0).astype(np.float64), corners)
        out[known, gene] = sums[known] / area[known]
    return out


@dataclass(frozen=True)
class _Corners:
    """Where squares begin and end, per axis: whole positions and the rest, each ``(2, n)``."""

    y: NDArray[np.int64]
    y_part: NDArray[np.float64]
    x: NDArray[np.int64]
    x_part: NDArray[np.float64]


def _corners(xy_um: NDArray[np.float64], side_um: float, shape: tuple[int, ...]) -> _Corners:
    ends = np.stack([xy_um - side_um / 2, xy_um + side_um / 2]) / LATTICE_UM
    x = np.clip(ends[..., 0], 0, shape[1])
    y = np.clip(ends[..., 1], 0, shape[0])
    whole_x, whole_y = (np.minimum(np.floor(v).astype(int), n - 1) for v, n in ((x, shape[1]), (y, shape[0])))
    return _Corners(whole_y, y - whole_y, whole_x, x - whole_x)


def _square_sums(plane: NDArray[np.float64], corners: _Corners) -> NDArray[np.float64]:
    # A running sum is linear within a lattice position, so interpolating it is exact.
    total = np.zeros((plane.shape[0] + 1, plane.shape[1] + 1))
    total[1:, 1:] = plane.cumsum(axis=0).cumsum(axis=1)

    def up_to(row: int, col: int) -> NDArray[np.float64]:
        y, x = corners.y[row], corners.x[col]
        a, b = corners.y_part[row], corners.x_part[col]
        near = (1 - b) * total[y, x] + b * total[y, x + 1]
        far = (1 - b) * total[y + 1, x] + b * total[y + 1, x + 1]
        return (1 - a) * near + a * far

    return np.asarray(up_to(1, 1) - up_to(0, 1) - up_to(1, 0) + up_to(0, 0))
