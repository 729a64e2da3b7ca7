"""What a cohort costs: hours and storage for 1,000 slides, by grid and encoder. Arithmetic, nothing is measured.

python benchmarks/costs.py [--json FILE]

Prints the two tables of docs/choosing.md. The speeds are those of docs/results.md; the ones for a GPU are other
people's, or bounds.
"""

import math
from dataclasses import dataclass

import numpy as np
from _common import Result, options, report

from featurestore.blocks import DEFAULT_BLOCK
from featurestore.grid import GridSpec

SLIDES = 1000
TISSUE_MM2 = 100.0
"""Tissue of a slide, assumed: one round piece 11.3 mm across. Costs are proportional to it."""
NUMBER_BYTES = 2
"""A float16."""
GRIDS = (GridSpec(1.0, 224, 224), GridSpec(0.5, 224, 224), GridSpec(0.5, 224, 112), GridSpec(0.25, 224, 224))
DIMS = {"colour": 6, "morphology": 164, "kaiko-s16": 384, "uni": 1024, "uni2-h": 1536, "virchow2": 2560}
"""Encoder -> length of its vector."""
CPU_RATES = {"colour": 479.0, "morphology": 273.0, "ViT-S/16": 17.4}
"""Patches a second of the whole of `embed` on 2 cores, 224 px, as docs/results.md has them (ViT-S/16 in fp32)."""
GPU_PUBLISHED = 125.0
"""Patches a second that were published for TRIDENT. Nobody publishes the whole of a cohort's run."""
GPU_BOUND = 6400.0
"""ViT-L/16: about 0.12 TFLOP a patch, on a GPU whose matrix products reach 780 TFLOP/s in bf16."""
OFFSETS = 8
"""Where the tissue lies relative to the blocks is averaged over so many places in each direction."""


@dataclass(frozen=True)
class Cost:
    """What one slide costs on one grid, whatever the encoder.

    Parameters
    ----------
    patches
        Tissue patches: those that are encoded.
    blocks
        Blocks with tissue: the objects that are stored. A block holds its background as well.
    """

    patches: float
    blocks: float

    def gigabytes(self, dim: int) -> float:
        """Return what `SLIDES` slides take in a store, in GB."""
        return SLIDES * self.blocks * math.prod(DEFAULT_BLOCK) * dim * NUMBER_BYTES / 1e9

    def hours(self, patches_per_second: float) -> float:
        """Return how long `SLIDES` slides take."""
        return SLIDES * self.patches / patches_per_second / 3600


def cost(spec: GridSpec) -> Cost:
    """Count patches and blocks of one slide."""
    stride_mm = spec.mpp * spec.stride_px / 1000
    return Cost(TISSUE_MM2 / stride_mm**2, _blocks(stride_mm))


def _blocks(stride_mm: float) -> float:
    """Count the blocks that hold a patch whose centre is on a disc of tissue: the mean over its places."""
    radius = math.sqrt(TISSUE_MM2 / math.pi) / stride_mm
    counts = []
    for down in np.arange(OFFSETS) / OFFSETS:
        for right in np.arange(OFFSETS) / OFFSETS:
            centre = radius + np.array([down * DEFAULT_BLOCK[0], right * DEFAULT_BLOCK[1]])
            rows, cols = (np.arange(c + radius + 1) for c in centre)
            on = (rows - centre[0])[:, None] ** 2 + (cols - centre[1]) ** 2 <= radius**2
            for axis, block in enumerate(DEFAULT_BLOCK):
                on = np.logical_or.reduceat(on, np.arange(0, on.shape[axis], block), axis=axis)
            counts.append(int(on.sum()))
    return float(np.mean(counts))


def time_table() -> str:
    """Return hours by grid, as Markdown."""
    speeds = [f"`{name}`, 2 CPU cores" if name in DIMS else f"{name}, 2 CPU cores" for name in CPU_RATES]
    head = ["mpp", "patch", "stride", "patches per mm²", "patches per slide", "million patches", "objects"]
    head += [*speeds, f"GPU at {GPU_PUBLISHED:.0f} patches/s", f"GPU at {GPU_BOUND:,.0f} patches/s"]
    rows = []
    for spec in GRIDS:
        one = cost(spec)
        hours = [one.hours(rate) for rate in (*CPU_RATES.values(), GPU_PUBLISHED, GPU_BOUND)]
        cells = [f"{spec.mpp:g}", str(spec.patch_px), str(spec.stride_px)]
        cells += [
            f"{one.patches / TISSUE_MM2:.0f}",
            f"{one.patches:,.0f}",
            f"{SLIDES * one.patches / 1e6:.1f}",
        ]
        rows.append([*cells, f"{SLIDES * one.blocks:,.0f}", *(_short(value, "h") for value in hours)])
    return _markdown(head, rows)


def size_table() -> str:
    """Return gigabytes by grid and encoder, as Markdown."""
    head = ["mpp", "patch", "stride", *(f"`{key}` ({dim:,})" for key, dim in DIMS.items())]
    rows = []
    for spec in GRIDS:
        sizes = (_short(cost(spec).gigabytes(dim), "GB") for dim in DIMS.values())
        rows.append([f"{spec.mpp:g}", str(spec.patch_px), str(spec.stride_px), *sizes])
    return _markdown(head, rows)


def _short(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 10 else f"{value:.1f} {unit}"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main() -> None:
    """Print both tables."""
    asked = options(__doc__)
    print(f"{time_table()}\n\n{size_table()}")
    results = []
    for spec in GRIDS:
        one = cost(spec)
        results.append(Result(f"{spec.key}: patches", SLIDES * one.patches))
        results.append(Result(f"{spec.key}: objects", SLIDES * one.blocks))
        results += [Result(f"{spec.key}: {key}", one.gigabytes(dim), "GB") for key, dim in DIMS.items()]
    report("costs", results, asked)


if __name__ == "__main__":
    main()
