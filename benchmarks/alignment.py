"""Spots that lie where they should, and spots that do not: how many of each the alignment check refuses or warns about.

python benchmarks/alignment.py [--quick] [--json FILE]

Right: 200 synthetic sections of four kinds (sizes, spot pitches, depths), each with its own tissue mask, with a mask that
misses the palest quarter of the tissue, and with the spots of a window only; and the sections of ``$HISTOSGE_DATA``, where
that is set. Wrong: every kind of misplacement on 48 of the synthetic sections and on all real ones. `named`: the
correction that the message gives puts the spots back, to 150 µm on average.

Sections are made once and kept under ``$HISTOSGE_BENCH_CACHE``, where that is set.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from _common import Result, options, report
from _public import public_sheet
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.store import Store
from histosge.data.alignment_check import AlignmentReport, check_alignment
from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.sections import Spots
from histosge.data.tissue_map import TissueMap
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

GENES = GeneCounts(12, 6, 6, 6)
# At 2 µm a pixel, which makes them in seconds: the check sees patches of 112 µm only.
COHORTS = {
    "a": SyntheticSpec(size_px=(2176, 2048), mpp=2.0, genes=GENES, seed=0),
    "b": SyntheticSpec(size_px=(1200, 1300), mpp=2.0, genes=GENES, seed=1000),
    "c": SyntheticSpec(
        (2048, 2176), 2.0, 2000, genes=GENES, spot_diameter_um=100, spot_pitch_um=200, median_counts=4000
    ),
    "d": SyntheticSpec(size_px=(2400, 1500), mpp=2.0, genes=GENES, seed=3000, median_counts=1500),
}
SPEC = GridSpec(mpp=2.0, patch_px=56, stride_px=28)
REAL_SPEC = GridSpec(mpp=1.4, patch_px=112, stride_px=56)
MOB_SPEC = GridSpec(mpp=4.63, patch_px=32, stride_px=16)
RIGHT, WRONG = 50, 12
"""Sections of each cohort that are checked as they are, and in every wrong way."""
QUICK_RIGHT, QUICK_WRONG = 5, 2
PUT_BACK_UM = 150.0
PALEST = 0.25


@dataclass(frozen=True)
class Case:
    """Spots, and the slide that they are compared with."""

    spots: Spots
    tissue: TissueMap
    mpp: float

    def check(self) -> AlignmentReport:
        """Return the verdict."""
        return check_alignment(self.spots, self.tissue, self.mpp)


def load(sheet: Path, store: str, n: int) -> Iterator[Case]:
    """Read the spots of the first `n` rows, and the tissue of their slides."""
    opened = Store.open(store)
    for sample in read_samples(str(sheet))[:n]:
        key, _ = opened.select(None, None, sample.slide_id)
        stored, slide = opened.grid(sample.slide_id, key), opened.slide(sample.slide_id)
        frame = SlideFrame(sample.slide_id, sample.donor, slide.mpp, slide.size_px)
        spots = find_expression(str(sample.expression), frame).spots
        size_um = (slide.size_px[0] * slide.mpp, slide.size_px[1] * slide.mpp)
        yield Case(spots, TissueMap.from_grid(stored, size_um), slide.mpp)


def synthetic(folder: Path, n: int) -> list[list[Case]]:
    """Make and embed the cohorts, `n` sections each."""
    out = []
    for name, spec in COHORTS.items():
        made, store = make_cohort(folder / f"syn_{name}", spec, n), str(folder / f"syn_{name}.zarr")
        embed(str(made.sheet), store, EmbedSettings(encoders=("colour",), spec=SPEC))
        out.append(list(load(made.sheet, store, n)))
    return out


def real(folder: Path) -> list[Case]:
    """Embed and read the public sections; none where they are absent."""
    sheet = public_sheet()
    if sheet is None:
        return []
    mob = folder / "mob.csv"
    rows = [
        f"{name},{sheet.parent}/mob/{name}.jpg,{sheet.parent}/mob/{name}.h5ad,4.63"
        for name in ("MOB1", "MOB2")
    ]
    mob.write_text("\n".join(["slide_id,slide,expression,mpp", *rows]) + "\n")
    out: list[Case] = []
    for name, samples, spec in (("her2st", sheet, REAL_SPEC), ("mob", mob, MOB_SPEC)):
        embed(str(samples), f"{folder}/{name}.zarr", EmbedSettings(encoders=("colour",), spec=spec))
        out += load(samples, f"{folder}/{name}.zarr", 10)
    return out


def poor_mask(case: Case) -> Case:
    """Take the palest quarter from the mask."""
    tissue = case.tissue
    assert tissue.rgb is not None
    darkness, sigma = 255.0 - tissue.rgb.mean(axis=-1), 200 / tissue.step_um
    weight = gaussian_filter(tissue.is_tissue.astype(float), sigma)
    smooth = gaussian_filter(darkness * tissue.is_tissue, sigma) / np.maximum(weight, 0.01)
    dark = smooth > np.quantile(smooth[tissue.is_tissue], PALEST)
    return replace(case, tissue=replace(tissue, is_tissue=tissue.is_tissue & dark))


def window(case: Case, rng: np.random.Generator) -> Case:
    """Keep the spots of a window of two thirds of the section's width and height."""
    spots = case.spots
    low, extent = spots.xy_um.min(axis=0), np.ptp(spots.xy_um, axis=0)
    keep = (np.abs(spots.xy_um - low - extent * rng.uniform(0.3, 0.7, 2)) < extent / 3).all(axis=1)
    part = replace(spots, xy_um=spots.xy_um[keep], barcodes=spots.barcodes[keep], counts=spots.counts[keep])
    return replace(case, spots=part)


Wrong = Callable[[NDArray[np.float64], float, float], NDArray[np.float64]]
"""From right positions in microns, width and height to wrong positions."""


def shift(um: float) -> Wrong:
    """Shift along the diagonal, by so much in all."""
    return lambda xy, w, h: xy + um / np.sqrt(2)


def scaled(factor: float) -> Wrong:
    """Scale about the slide's corner."""
    return lambda xy, w, h: xy * factor


def array(xy: NDArray[np.float64], width: float, height: float) -> NDArray[np.float64]:
    """Number columns and rows of 100 µm, as pixels of 0.5 µm."""
    return np.floor(xy / 100) * 0.5


KINDS: dict[str, Wrong] = {
    "x and y swapped": lambda xy, w, h: xy[:, ::-1].copy(),
    "mirrored left-right": lambda xy, w, h: np.column_stack([w - xy[:, 0], xy[:, 1]]),
    "mirrored top-bottom": lambda xy, w, h: np.column_stack([xy[:, 0], h - xy[:, 1]]),
    "turned by 90°": lambda xy, w, h: np.column_stack([h - xy[:, 1], xy[:, 0]]),
    "turned by 180°": lambda xy, w, h: np.array([w, h]) - xy,
    "turned by 270°": lambda xy, w, h: np.column_stack([xy[:, 1], w - xy[:, 0]]),
    "shifted by 150 µm": shift(150),
    "shifted by 250 µm": shift(250),
    "shifted by 350 µm": shift(350),
    "shifted by 500 µm": shift(500),
    "shifted by 1000 µm": shift(1000),
    "scaled by 0.9": scaled(0.9),
    "scaled by 0.8": scaled(0.8),
    "scaled by 0.5": scaled(0.5),
    "scaled by 1.25": scaled(1.25),
    "hires pixels (0.17)": scaled(0.17),
    "lowres pixels (0.05)": scaled(0.05),
    "microns as pixels (0.25)": scaled(0.25),
    "array rows and columns": array,
}
OTHER = "another section's spots"
VARIANTS = ("", ", mask without the palest quarter", ", spots of a window")
MEASURES = ("refused", "refused or warned", "named")


@dataclass(frozen=True)
class Tally:
    """How many of some checks were refused, warned about, and named a correction that puts the spots back."""

    refused: int
    warned: int
    named: int
    n: int

    def results(self, what: str) -> list[Result]:
        """Return the shares."""
        unit = f"of {self.n}"
        counts = (self.refused, self.refused + self.warned, self.named)
        return [Result(f"{what}: {name}", n / self.n, unit) for name, n in zip(MEASURES, counts, strict=True)]


def tally(wrong: Sequence[tuple[Case, NDArray[np.float64] | None]]) -> Tally:
    """Check spots whose right positions are known, or None where they lie on no place of the slide."""
    refused = warned = named = 0
    for case, right in wrong:
        found = case.check()
        refused += found.verdict == "refuse"
        warned += found.verdict == "warn"
        if found.better is not None and right is not None:
            corrected = found.better.apply(case.spots.xy_um, case.tissue.size_um)
            named += float(np.linalg.norm(corrected - right, axis=1).mean()) < PUT_BACK_UM
    return Tally(refused, warned, named, len(wrong))


def misplaced(case: Case, kind: str) -> tuple[Case, NDArray[np.float64]]:
    """Return the case with wrong positions, and the right ones."""
    xy_um = case.spots.xy_um
    return replace(case, spots=replace(case.spots, xy_um=KINDS[kind](xy_um, *case.tissue.size_um))), xy_um


def right_results(name: str, cases: Sequence[Case]) -> list[Result]:
    """Check spots that lie where they should."""
    rng = np.random.default_rng(0)
    variants = (list(cases), [poor_mask(case) for case in cases], [window(case, rng) for case in cases])
    out = []
    for variant, some in zip(VARIANTS, variants, strict=True):
        found = tally([(case, None) for case in some])
        out += [
            Result(f"right, {name}{variant}: refused", found.refused / found.n, f"of {found.n}", "= 0"),
            Result(f"right, {name}{variant}: warned", found.warned / found.n, f"of {found.n}"),
        ]
    return out


def wrong_results(name: str, groups: Sequence[Sequence[Case]]) -> list[Result]:
    """Check every kind of misplacement; another section's spots come from the next section of the group."""
    cases = [case for group in groups for case in group]
    out = []
    for kind in KINDS:
        out += tally([misplaced(case, kind) for case in cases]).results(f"{name}, {kind}")
    others = [
        (replace(case, spots=other.spots), None)
        for group in groups
        for case, other in zip(group, [*group[1:], group[0]], strict=True)
    ]
    # No correction can be named: the spots have no place on this slide.
    return out + tally(others).results(f"{name}, {OTHER}")[:2]


def seconds(case: Case) -> Result:
    """Time a check of 5,000 spots on 15,000 patches."""
    n, tissue = 5000, case.tissue
    rows, cols = (
        np.linspace(0, side - 1, n_new).astype(int)
        for side, n_new in zip(tissue.is_tissue.shape, (125, 120), strict=True)
    )
    assert tissue.rgb is not None
    width, height = tissue.size_um
    grown = TissueMap(
        tissue.is_tissue[np.ix_(rows, cols)],
        (np.arange(125) + 0.5) * height / 125,
        (np.arange(120) + 0.5) * width / 120,
        tissue.size_um,
        tissue.rgb[np.ix_(rows, cols)],
    )
    rng = np.random.default_rng(0)
    take = rng.integers(0, len(case.spots), n)
    xy_um = case.spots.xy_um[take] + rng.normal(0, 20, (n, 2))
    many = replace(
        case.spots, xy_um=xy_um, counts=case.spots.counts[take], barcodes=case.spots.barcodes[take]
    )
    begun = time.process_time()
    check_alignment(many, grown, case.mpp)
    return Result("a check of 5,000 spots and 15,000 patches", time.process_time() - begun, "CPU seconds")


def markdown(results: Sequence[Result]) -> str:
    """Return the tables of docs/alignment.md."""
    share = {
        result.what: (f"{result.value:.0%}".replace("%", " %"), result.unit.split()[-1]) for result in results
    }
    names = [
        name for name in ("synthetic", "real") if any(what.startswith(f"right, {name}") for what in share)
    ]
    lines = ["| right positions | refused | warned | sections |", "|---|---|---|---|"]
    for name in names:
        for variant in VARIANTS:
            (refused, n), (warned, _) = (
                share[f"right, {name}{variant}: {what}"] for what in ("refused", "warned")
            )
            lines.append(f"| {name}{variant} | {refused} | {warned} | {n} |")
    header = [f"{name}: {what}" for name in names for what in MEASURES]
    lines += ["", f"| wrong positions | {' | '.join(header)} |", f"|---|{'---|' * len(header)}"]
    for kind in (*KINDS, OTHER):
        cells = [share.get(f"{name}, {kind}: {what}", ("", ""))[0] for name in names for what in MEASURES]
        lines.append(f"| {kind} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run all."""
    args = options(__doc__)
    n_right, n_wrong = (QUICK_RIGHT, QUICK_WRONG) if args.quick else (RIGHT, WRONG)
    with tempfile.TemporaryDirectory() as name:
        cache = Path(os.environ.get("HISTOSGE_BENCH_CACHE", name))
        cohorts, public = synthetic(cache, n_right), real(Path(name))
        results = right_results("synthetic", [case for group in cohorts for case in group])
        if public:
            results += right_results("real", public)
        results += wrong_results("synthetic", [group[:n_wrong] for group in cohorts])
        if public:
            results += wrong_results("real", [public[:3], public[3:]])
        results.append(seconds(cohorts[0][0]))
    report("alignment", results, args)
    print(f"\n{markdown(results)}")


if __name__ == "__main__":
    main()
