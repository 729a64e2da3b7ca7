"""Other places where spots could lie on a slide, and how well each fits: tissue under them, stain beside their counts.

All eight orientations are tried at every shift, by cross-correlation (FFT), and scales about the slide's corner.

Terms
    placement        a transformation of the spots' positions: swap of axes, mirror, scale, shift
    profile          what is compared with the stain, for each spot: log library size and the first principal
                     components of log1p(CP10k)
    explained share  of the profile's variance, by a linear regression on the stain densities under the spots;
                     adjusted for the number of regressors, and times the share of spots on tissue
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Self

import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy import sparse
from scipy.spatial import cKDTree

from histosge.data.genes import library_size
from histosge.data.sections import Spots
from histosge.data.tissue_map import N_STAINS, TissueMap
from histosge.threads import one_blas_thread

N_COMPONENTS = 3
# Genes of the profile, by total counts: those of few counts add noise, and take time.
PROFILE_GENES = 300
# Library size is half of the profile. Tried on five real and 20 synthetic sections: by library size alone, chance comes
# closer to the truth (her2st C4: 0.30 against 0.33), and components alone tell least of all there.
WEIGHTS = np.array([0.5] + [0.5 / N_COMPONENTS] * N_COMPONENTS)
# With fewer spots on tissue, a regression on two stains fits by chance.
MIN_ON_TISSUE = 20
# More spots (bins, cells) than this are added up over squares: each holds few counts, and time grows with them.
MAX_PROFILES = 6000
# Side of the raster of the shifts that are tried, in cells; what fits best is refined to a quarter of a cell. 128 gave
# the same verdicts, and took 4 times as long.
RASTER = 64
# From 1/20 (coordinates of a thumbnail are 17 to 22 times too small) to 20; refined to a quarter of a step.
SCALE_STEP = 0.03
SCALES = np.exp(np.arange(-100, 101) * SCALE_STEP)
# Factors this close to 1 are not tried: a shift explains as much, and no other magnification is so near.
UNSCALED = 0.02
# Tissue under a sample of the spots tells which scales are worth a regression: those this close to the best.
SCALE_SAMPLE, NEAR_BEST = 500, 0.1
REFINED = 3
# By so much of the score a shift by a few microns may fit better, and the plain mirror, turn or swap is named all the same.
PLAIN = 0.01
PEAKS = 3
"""Shifts of each orientation, and scales, that are looked at closely."""
# Counts and stain of neighbouring spots are alike over two or three spots, so that a placement this near fits well, too.
SAME_PLACE_UM = 300.0
"""Placements nearer than this to each other (root mean square over the spots) are one, in microns."""


@dataclass(frozen=True)
class Placement:
    """A transformation of positions on a slide: scaled, then swapped, then mirrored in the slide, then shifted."""

    swap: bool = False
    mirror_x: bool = False
    mirror_y: bool = False
    scale: float = 1.0
    shift_um: tuple[float, float] = (0.0, 0.0)

    @property
    def is_plain(self) -> bool:
        """Tell whether it only mirrors, turns or swaps."""
        return self.scale == 1 and self.shift_um == (0.0, 0.0)

    def apply(self, xy_um: NDArray[np.float64], size_um: tuple[float, float]) -> NDArray[np.float64]:
        """Transform positions ``(n, 2)`` on a slide of ``(width, height)``."""
        out = (xy_um[:, ::-1] if self.swap else xy_um) * self.scale
        for axis, mirror in enumerate((self.mirror_x, self.mirror_y)):
            if mirror:
                out[:, axis] = size_um[axis] - out[:, axis]
        return np.asarray(out + np.asarray(self.shift_um))

    def describe(self, mpp: float) -> str:
        """Return in words what is done to positions; a shift is told in pixels of `mpp` microns."""
        parts = []
        if self.scale != 1:
            parts.append(f"scaling the positions by {self.scale:.3g}")
        orientation = _ORIENTATION_WORDS[self.swap, self.mirror_x, self.mirror_y]
        if orientation:
            parts.append(orientation)
        x, y = (round(shift / mpp) for shift in self.shift_um)
        if x or y:
            parts.append(f"shifting them by ({x:+d}, {y:+d}) px")
        return " and ".join(parts)

    def formula(self, mpp: float, size_px: tuple[float, float]) -> str:
        """Return the new ``(x, y)`` in pixels as text, such as ``(9270 - y, x)``."""
        return f"({', '.join(self._axis(axis, mpp, size_px) for axis in (0, 1))})"

    def _axis(self, axis: int, mpp: float, size_px: tuple[float, float]) -> str:
        name = "xy"[axis != self.swap]
        term = name if self.scale == 1 else f"{self.scale:.3g} {name}"
        constant = round(self.shift_um[axis] / mpp)
        if (self.mirror_x, self.mirror_y)[axis]:
            return f"{round(size_px[axis]) + constant} - {term}"
        return term if constant == 0 else f"{term} {'+' if constant > 0 else '-'} {abs(constant)}"


# By (swap, mirror_x, mirror_y). Turns are as seen on the slide, whose y grows downwards.
_ORIENTATION_WORDS = {
    (False, False, False): "",
    (False, True, False): "mirroring them left-right",
    (False, False, True): "mirroring them top-bottom",
    (False, True, True): "turning them by 180°",
    (True, False, False): "swapping x and y",
    (True, True, False): "turning them by 90° clockwise",
    (True, False, True): "turning them by 90° counter-clockwise",
    (True, True, True): "mirroring them at the other diagonal",
}
AS_GIVEN = Placement()
ORIENTATIONS = [Placement(swap, x, y) for swap, x, y in product((False, True), repeat=3)]


@dataclass(frozen=True)
class Profile:
    """What is compared with the stain, of single spots or of squares that hold many.

    Parameters
    ----------
    xy_um
        ``(n, 2)``.
    values
        Standardised, ``(n, 1 + N_COMPONENTS)``; columns without variance are 0.
    """

    xy_um: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def from_spots(cls, spots: Spots) -> Self:
        """Summarise the counts of spots."""
        library, xy_um = library_size(spots), spots.xy_um
        totals = np.asarray(spots.counts.sum(axis=0)).ravel()
        chosen = np.sort(np.argsort(-totals, kind="stable")[:PROFILE_GENES])
        counts = sparse.csr_matrix(spots.counts[:, chosen], dtype=np.float64)
        if len(spots) > MAX_PROFILES:
            square = _squares(xy_um)
            size = np.bincount(square)
            gather = sparse.csr_matrix((np.ones(len(spots)), (square, np.arange(len(spots)))))
            xy_um = np.stack([np.bincount(square, axis) / size for axis in xy_um.T], axis=1)
            library = np.asarray(gather @ library, dtype=np.float64)
            counts = sparse.csr_matrix(gather @ counts)
        rates = np.log1p(counts.toarray() * (1e4 / np.maximum(library, 1))[:, None])
        rates = _standardised(rates)
        with one_blas_thread():  # of a matrix this small, threads wait for each other more than they compute
            _, axes = np.linalg.eigh(rates.T @ rates)
        components = np.zeros((len(library), N_COMPONENTS))
        first = rates @ axes[:, ::-1][:, :N_COMPONENTS]
        components[:, : first.shape[1]] = first
        depth = np.log1p(library)
        # A spot with one count among spots with thousands would carry half of the variance.
        depth = np.clip(depth, *np.quantile(depth, (0.02, 0.98)))
        return cls(xy_um, _standardised(np.column_stack([depth, components])))


def _squares(xy_um: NDArray[np.float64]) -> NDArray[np.int64]:
    """Number the squares of a lattice that spots lie in, about `MAX_PROFILES` of them."""
    low, extent = xy_um.min(axis=0), np.ptp(xy_um, axis=0)
    side = max(float(np.sqrt(np.prod(extent) / MAX_PROFILES)), float(extent.max()) / MAX_PROFILES, 1e-9)
    place = np.floor((xy_um - low) / side).astype(np.int64)
    _, number = np.unique(place, axis=0, return_inverse=True)
    return np.asarray(number.ravel(), dtype=np.int64)


def _standardised(values: NDArray[np.float64]) -> NDArray[np.float64]:
    centred = values - values.mean(axis=0)
    deviation = centred.std(axis=0)
    return np.asarray(np.divide(centred, deviation, out=np.zeros_like(centred), where=deviation > 1e-9))


# Decides between scales where the stain does not: small spots fit into tissue at many places. No more than this, since
# spots may cover a part of the tissue only.
COVERAGE_WEIGHT = 0.1


@dataclass(frozen=True)
class Fit:
    """How well a placement fits.

    Parameters
    ----------
    on_tissue
        Share of the spots, 0..1.
    explained
        Share of the counts' variance that the stain under them explains, 0..1; see the module.
    covered
        Share of the tissue that they cover, roughly, 0..1.
    """

    on_tissue: float
    explained: float
    covered: float = 0.0

    @property
    def score(self) -> float:
        """Return the sum of both, and a little of the coverage, by which placements are compared."""
        # Equal weights: right and wrong placements differ by 0.1 to 0.3 in each.
        return self.on_tissue + self.explained + COVERAGE_WEIGHT * self.covered


@dataclass(frozen=True)
class PlacedSpots:
    """The spots of a section beside the map of its slide."""

    xy_um: NDArray[np.float64]
    profile: Profile
    tissue: TissueMap
    area_share: float
    """Area of all spots, each as large as the square of the distance to the next one, by that of the tissue."""

    @classmethod
    def from_spots(cls, spots: Spots, tissue: TissueMap) -> Self:
        """Prepare spots for a comparison."""
        profile = Profile.from_spots(spots)
        area = max(int(tissue.is_tissue.sum()), 1) * tissue.step_um**2
        return cls(spots.xy_um, profile, tissue, len(profile.xy_um) * _spacing(profile.xy_um) ** 2 / area)

    @property
    def is_informative(self) -> bool:
        """Tell whether stain and counts vary at all, so that one could explain the other."""
        return bool(self.tissue.stain.any() and self.profile.values.any())

    def fit(self, placement: Placement) -> Fit:
        """Measure how well one placement fits."""
        size = self.tissue.size_um
        on_tissue = float(self.tissue.on_tissue(placement.apply(self.xy_um, size)).mean())
        xy_um = placement.apply(self.profile.xy_um, size)
        on = self.tissue.on_tissue(xy_um)
        covered = min(on_tissue * self.area_share * placement.scale**2, 1.0)
        if int(on.sum()) < MIN_ON_TISSUE:
            return Fit(on_tissue, 0.0, covered)
        stain = self.tissue.stain[:, *self.tissue.nearest(xy_um[on])].T
        values = self.profile.values[on]
        stain, values = stain - stain.mean(axis=0), values - values.mean(axis=0)
        covariance = stain.T @ stain / len(stain)
        with_values = stain.T @ values / len(stain)
        explained = (with_values * np.linalg.solve(covariance + RIDGE * np.eye(N_STAINS), with_values)).sum(0)
        variance = (values**2).mean(axis=0)
        return Fit(on_tissue, float(_share(explained, variance, len(stain), on.mean())), covered)

    def displacement_um(self, a: Placement, b: Placement) -> float:
        """Return how far two placements lay the spots apart, root mean square."""
        size = self.tissue.size_um
        apart = a.apply(self.xy_um, size) - b.apply(self.xy_um, size)
        return float(np.sqrt((apart**2).sum(axis=1).mean()))

    def candidates(self) -> list[tuple[Placement, Fit]]:
        """Return the placements that fit best, the best first; of placements nearly alike only the best."""
        found = [p for p in ORIENTATIONS if p != AS_GIVEN]
        raster = _Raster.from_map(self.tissue)
        found += _best_scales(self) + _best_shifts(self, raster)
        kept = self._distinct([(p, self.fit(p)) for p in found])
        refined = [self._refined(p, fit, raster.cell_um) for p, fit in kept[:REFINED]]
        return self._distinct(refined + kept[REFINED:])

    def _distinct(self, fits: list[tuple[Placement, Fit]]) -> list[tuple[Placement, Fit]]:
        """Sort by score, and leave out placements near a better one."""
        kept: list[tuple[Placement, Fit]] = []
        for placement, fit in sorted(fits, key=lambda item: -item[1].score - PLAIN * item[0].is_plain):
            if all(self.displacement_um(placement, other) > SAME_PLACE_UM for other, _ in kept):
                kept.append((placement, fit))
        return kept

    def _refined(self, placement: Placement, fit: Fit, cell_um: float) -> tuple[Placement, Fit]:
        """Look for a better shift, or scale, within a cell of the raster, or a step of the scales."""
        best = (placement, fit)
        for part in (0.5, 0.25):
            for change in _small_changes(best[0], part * cell_um, 1 + part * SCALE_STEP):
                score = self.fit(change)
                if score.score > best[1].score:
                    best = (change, score)
        return best


def _small_changes(placement: Placement, step_um: float, factor: float) -> list[Placement]:
    """Return placements that differ a little in what was searched: the scale, the shift, or nothing."""
    if placement.scale != 1:
        return [replace(placement, scale=placement.scale * f) for f in (factor, 1 / factor)]
    if placement.shift_um == (0.0, 0.0):
        return []
    x, y = placement.shift_um
    steps = [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1) if (i, j) != (0, 0)]
    return [replace(placement, shift_um=(x + i * step_um, y + j * step_um)) for i, j in steps]


def _spacing(xy_um: NDArray[np.float64]) -> float:
    """Return the median distance of spots to the next one."""
    if len(xy_um) < 2:
        return 0.0
    distance = np.asarray(cKDTree(xy_um).query(xy_um, k=2)[0])
    return float(np.median(distance[:, 1]))


# Added to the variances of the stain densities, which are about 1: a slide of one colour has none.
RIDGE = 1e-3


def _share(
    explained: NDArray[np.float64],
    variance: NDArray[np.float64],
    n: NDArray[np.float64] | int,
    covered: NDArray[np.float64] | float,
) -> NDArray[np.float64]:
    """Return the explained share of the profile's variance, adjusted for the number of regressors.

    Parameters
    ----------
    explained, variance
        Of each column of the profile, on the first axis.
    n, covered
        Spots on tissue, and their share of all.
    """
    raw = np.clip(np.divide(explained, variance, out=np.zeros_like(explained), where=variance > 1e-6), 0, 1)
    adjusted = 1 - (1 - raw) * (n - 1) / np.maximum(n - 1 - N_STAINS, 1)
    return np.asarray(np.maximum(np.tensordot(WEIGHTS, adjusted, 1), 0) * covered)


def _best_scales(placed: PlacedSpots) -> list[Placement]:
    """Return the scales about the slide's corner that fit best, with and without a swap."""
    size = placed.tissue.size_um
    # A sample of the spots tells where tissue is; only what comes near the best is compared with the stain.
    some = placed.xy_um[:: max(len(placed.xy_um) // SCALE_SAMPLE, 1)]
    out = []
    for swap in (False, True):
        tried = [Placement(swap=swap, scale=float(s)) for s in SCALES if abs(np.log(s)) > UNSCALED]
        shares = np.array([placed.tissue.on_tissue(p.apply(some, size)).mean() for p in tried])
        near = [p for p, share in zip(tried, shares, strict=True) if share > shares.max() - NEAR_BEST]
        ranked = sorted(((placed.fit(p).score, p) for p in near), key=lambda item: -item[0])
        kept: list[Placement] = []
        for _, p in ranked:
            if all(placed.displacement_um(p, other) > SAME_PLACE_UM for other in kept):
                kept.append(p)
        out += kept[:PEAKS]
    return out


def _best_shifts(placed: PlacedSpots, raster: "_Raster") -> list[Placement]:
    return [
        Placement(o.swap, o.mirror_x, o.mirror_y, 1.0, shift)
        for o in ORIENTATIONS
        for shift in raster.best_shifts(placed.profile, o)
    ]


@dataclass(frozen=True)
class _Raster:
    """Tissue and stain of a slide on square cells, ready to be correlated with spots at every shift."""

    tissue: NDArray[np.float64]
    stain: NDArray[np.float64]
    cell_um: float
    size_um: tuple[float, float]

    @classmethod
    def from_map(cls, tissue: TissueMap) -> Self:
        width, height = tissue.size_um
        cell = max(tissue.step_um, max(width, height) / RASTER)
        x, y = ((np.arange(int(np.ceil(side / cell))) + 0.5) * cell for side in (width, height))
        rows, _ = tissue.nearest(np.column_stack([np.zeros_like(y), y]))
        _, cols = tissue.nearest(np.column_stack([x, np.zeros_like(x)]))
        place = np.ix_(rows, cols)
        on = tissue.is_tissue[place].astype(np.float64)
        return cls(on, np.stack([s[place] for s in tissue.stain]) * on, cell, tissue.size_um)

    def best_shifts(self, profile: Profile, orientation: Placement) -> list[tuple[float, float]]:
        """Return the shifts ``(x, y)`` in microns of an orientation that fit best."""
        xy_um = orientation.apply(profile.xy_um, self.size_um)
        low = xy_um.min(axis=0)
        place = np.floor((xy_um - low) / self.cell_um).astype(np.int64)[:, ::-1]
        span, n_cells = place.max(axis=0) + 1, np.array(self.tissue.shape)
        # Spots that spread far over the slide's edges fit nowhere, and would only make the transforms large.
        if (span > 1.5 * n_cells).any():
            return []
        # As long as both together: a circular correlation must not wrap spots around to the other edge.
        n_rows, n_cols = (scipy.fft.next_fast_len(int(n), real=True) for n in n_cells + span)
        share = self._scores(profile.values, place, (n_rows, n_cols))
        shifts = []
        radius = max(int(np.ceil(SAME_PLACE_UM / self.cell_um)), 1)
        for _ in range(PEAKS):
            row, col = (int(i) for i in np.unravel_index(int(share.argmax()), share.shape))
            signed = (col if col < n_cells[1] else col - n_cols, row if row < n_cells[0] else row - n_rows)
            x, y = (float((cell) * self.cell_um - corner) for cell, corner in zip(signed, low, strict=True))
            shifts.append((x, y))
            rows, cols = (
                np.arange(i - radius, i + radius + 1) % n
                for i, n in zip((row, col), share.shape, strict=True)
            )
            share[np.ix_(rows, cols)] = -1
        return shifts

    def _scores(
        self, values: NDArray[np.float64], place: NDArray[np.int64], shape: tuple[int, int]
    ) -> NDArray[np.float64]:
        """Return `Fit.score` at every circular shift of spots that lie in cells `place` ``(row, col)``."""
        flat = place[:, 0] * shape[1] + place[:, 1]

        def spots(weights: NDArray[np.float64] | None) -> NDArray[np.complex128]:
            image = np.bincount(flat, weights, minlength=shape[0] * shape[1]).reshape(shape)
            return np.conj(scipy.fft.rfft2(image))

        def cells(image: NDArray[np.float64]) -> NDArray[np.complex128]:
            return np.asarray(scipy.fft.rfft2(image, shape))

        def total(a: NDArray[np.complex128], b: NDArray[np.complex128]) -> NDArray[np.float64]:
            return np.asarray(scipy.fft.irfft2(a * b, shape))

        # All sums of a regression over the spots on tissue are correlations of an image of the spots with one of the
        # slide; so they come for every shift at once.
        tissue, stain = cells(self.tissue), [cells(s) for s in self.stain]
        one = spots(None)
        on = np.rint(total(one, tissue))
        n = np.maximum(on, 1)
        mean = [total(one, s) / n for s in stain]
        var_a, var_b = (total(one, cells(s**2)) / n - m**2 for s, m in zip(self.stain, mean, strict=True))
        cov = total(one, cells(self.stain[0] * self.stain[1])) / n - mean[0] * mean[1]
        var_a, var_b = np.maximum(var_a, 0) + RIDGE, np.maximum(var_b, 0) + RIDGE
        determinant = np.maximum(var_a * var_b - cov**2, RIDGE**2)
        explained, variance = [], []
        for column in values.T:
            image = spots(column)
            value = total(image, tissue) / n
            variance.append(np.maximum(total(spots(column**2), tissue) / n - value**2, 0))
            a, b = (total(image, s) / n - value * m for s, m in zip(stain, mean, strict=True))
            explained.append((a**2 * var_b - 2 * a * b * cov + b**2 * var_a) / determinant)
        covered = on / len(values)
        share = _share(np.stack(explained), np.stack(variance), n, covered)
        return np.where(on >= MIN_ON_TISSUE, covered + share, covered)
