"""Exact principal components of a whole cohort in one pass, from the streamed mean and covariance.

Memory holds one ``(dim, dim)`` matrix, however many patches there are. Each block is centred on its own mean before
its products are added, so a large common mean costs no precision.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np
import polars as pl
import xarray as xr
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.linalg.blas import dsyr, dsyrk

from featurestore.analysis.patch_stream import PatchBlock, PatchStream
from featurestore.analysis.patch_tables import check_folder, write_patches
from featurestore.errors import IdentityMismatchError, StoreError

MAX_DIM = 8192
"""Two float64 matrices of this side are 1 GB: the covariance, and its decomposition."""
DEFAULT_COMPONENTS = 50
"""As in scanpy."""


@dataclass(frozen=True)
class Pca:
    """Principal components of embeddings, largest variance first.

    Parameters
    ----------
    mean
        Of each feature, ``(dim,)``.
    components
        Orthonormal rows, ``(k, dim)``; the entry of largest size in each is positive.
    explained_variance, explained_variance_ratio
        With n - 1, ``(k,)``; and as a share of the variance of all features.
    n_patches
        Number of patches that it was fitted on.
    encoder
        Fingerprint of the encoder of these embeddings.
    columns
        Names of the features, where they have names.
    """

    mean: NDArray[np.float64]
    components: NDArray[np.float64]
    explained_variance: NDArray[np.float64]
    explained_variance_ratio: NDArray[np.float64]
    n_patches: int
    encoder: str
    columns: tuple[str, ...] | None = None

    def project(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the scores of patches, ``(n, dim) -> (n, k)``."""
        return ((values - self.mean) @ self.components.T).astype(np.float32)

    def transform(self, stream: PatchStream) -> Iterator[tuple[str, xr.DataArray]]:
        """Compute the scores of every slide in one pass, one slide at a time; nothing is written.

        Yields
        ------
        (str, xarray.DataArray)
            Slide id, and scores ``(y, x, component)`` float32 with coordinates in microns; NaN where a patch is
            background or has no embedding.
        """
        self.check_fits(stream)
        for slide, placed in stream.fold_slides(partial(_PatchScores, self)):
            scores = np.full((*slide.grid.shape, len(self.components)), np.nan, np.float32)
            for rows, cols, projected in placed.parts:
                scores[rows, cols] = projected
            coords = {"y": slide.grid.y_um, "x": slide.grid.x_um}
            yield (
                slide.slide_id,
                xr.DataArray(scores, coords, ("y", "x", "component"), name=slide.slide_id),
            )

    def check_fits(self, stream: PatchStream) -> None:
        """Refuse embeddings of another encoder.

        Raises
        ------
        IdentityMismatchError
            With both fingerprints.
        """
        if stream.encoder != self.encoder:
            raise IdentityMismatchError(
                f"these components were fitted on embeddings of encoder {self.encoder[:16]}, not {stream.encoder[:16]}; "
                "fit them on this embedding"
            )

    def to_frame(self) -> pl.DataFrame:
        """Return one row per component: `component` (from 1), `variance`, `ratio`, and its loadings.

        They are one column `loadings` of vectors, or a column for each feature where these have names.
        """
        frame = pl.DataFrame(
            {
                "component": np.arange(1, len(self.components) + 1),
                "variance": self.explained_variance,
                "ratio": self.explained_variance_ratio,
            }
        )
        if self.columns is None:
            vectors = pl.Array(pl.Float64, len(self.mean))
            return frame.with_columns(pl.Series("loadings", self.components.tolist(), dtype=vectors))
        return frame.with_columns(
            pl.Series(name, loadings) for name, loadings in zip(self.columns, self.components.T, strict=True)
        )


def fit_pca(stream: PatchStream, components: int | None = None) -> Pca:
    """Fit principal components in one pass; the same store gives the same signs.

    Parameters
    ----------
    components
        Number of components; None means 50, or as many as there are.

    Raises
    ------
    StoreError
        If there are too few patches, or too many features for a matrix in memory.
    """
    dim = stream.dim
    if dim > MAX_DIM:
        raise StoreError(
            f"embeddings of {dim} features need {2 * 8 * dim**2 / 2**30:.1f} GiB for their covariance; "
            f"exact PCA is for {MAX_DIM} features at most"
        )
    summed = stream.fold(partial(Scatter, dim))
    n, mean, scatter = summed.n, summed.mean, summed.triangle
    most = min(dim, n - 1)
    k = min(DEFAULT_COMPONENTS, most) if components is None else components
    if most < 1 or not 1 <= k <= most:
        raise StoreError(
            f"{n} patches of {dim} features have {max(most, 0)} components, not {k}; give 1 to {max(most, 1)}"
        )
    total = float(np.trace(scatter))
    sizes, axes = eigh(scatter, lower=False, subset_by_index=(dim - k, dim - 1), overwrite_a=True)
    sizes, rows = np.maximum(sizes[::-1], 0), axes.T[::-1]
    # An eigenvector's sign is arbitrary: the entry of largest size is made positive, so that runs agree.
    largest = np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1)
    ratio = sizes / total if total > 0 else np.zeros(k)
    principal_axes = rows * np.where(largest < 0, -1.0, 1.0)
    return Pca(mean, principal_axes, sizes / (n - 1), ratio, n, stream.encoder, stream.columns)


class Scatter:
    """Count, mean, and sum of squared deviations, an upper triangle ``(dim, dim)``, of all patches added so far."""

    def __init__(self, dim: int) -> None:
        self.n = 0
        self.mean = np.zeros(dim)
        self.triangle = np.zeros((dim, dim), order="F")  # in this order BLAS adds in place

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block."""
        m = len(patches.values)
        if not m:
            return
        # One more row than patches: the difference of the means, weighted as in Chan, Golub & LeVeque (1979). So one
        # product adds both terms.
        rows = np.empty((m + 1, len(self.mean)))
        rows[:m] = patches.values
        step = rows[:m].mean(axis=0)
        rows[:m] -= step
        step -= self.mean
        rows[m] = step * np.sqrt(self.n * m / (self.n + m))
        # One triangle: half the work of a product of matrices.
        self.triangle = dsyrk(1.0, rows.T, beta=1.0, c=self.triangle, overwrite_c=True)
        self.mean += step * (m / (self.n + m))
        self.n += m

    def merge(self, other: Self) -> None:
        """Add the patches that another has added up."""
        if not other.n:
            return
        step = other.mean - self.mean
        self.triangle += other.triangle
        weight = self.n * other.n / (self.n + other.n)
        self.triangle = dsyr(weight, step, a=self.triangle, overwrite_a=True)
        self.mean += step * (other.n / (self.n + other.n))
        self.n += other.n


class _PatchScores:
    """Scores of patches, with their positions."""

    def __init__(self, pca: Pca) -> None:
        self.parts: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]] = []
        self._pca: Pca | None = pca

    def __getstate__(self) -> dict[str, object]:
        # Scores travel to the process that writes them, without the components that they were computed with.
        return {**self.__dict__, "_pca": None}

    def add(self, patches: PatchBlock) -> None:
        """Add the patches of one block."""
        assert self._pca is not None
        self.parts.append((patches.rows, patches.cols, self._pca.project(patches.values)))

    def merge(self, other: Self) -> None:
        """Add the scores of other blocks."""
        self.parts += other.parts


def write_scores(pca: Pca, stream: PatchStream, folder: Path) -> None:
    """Write one table per slide, in one pass: `slide`, `row`, `col`, `x_um`, `y_um`, `pc1`, `pc2` ..."""
    check_folder(folder)
    for slide_id, scores in pca.transform(stream):
        values = scores.to_numpy()
        rows, cols = np.nonzero(np.isfinite(values[..., 0]))
        columns = {f"pc{i + 1}": values[rows, cols, i] for i in range(values.shape[2])}
        write_patches(folder, stream.slide(slide_id), rows, cols, columns)
