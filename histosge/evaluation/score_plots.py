"""Pictures of scores, as PNG bytes: differences with their intervals, and what the published code's defects do.

It reads no file and touches no global state of matplotlib.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

DPI = 110
HELD_OUT, TRAINED_ON, NOISE = "#35608d", "#b8860b", "#8a8f98"


@dataclass(frozen=True)
class Gap:
    """One difference with its interval."""

    name: str
    value: float
    low: float
    high: float


def difference_plot(gaps: Sequence[Gap], label: str) -> bytes:
    """Draw differences as points with intervals, one row each; grey where the interval holds 0.

    Returns
    -------
    bytes
        A PNG.
    """
    figure = Figure(figsize=(9, 0.8 + 0.42 * len(gaps)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(gaps))[::-1]
    for place, gap in zip(places, gaps, strict=True):
        colour = NOISE if gap.low <= 0 <= gap.high else HELD_OUT
        axes.plot([gap.low, gap.high], [place, place], color=colour, linewidth=3, solid_capstyle="round")
        axes.plot([gap.value], [place], "o", color=colour, markersize=7)
        axes.annotate(
            f"{gap.value:+.3f}",
            (gap.value, place),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=8,
        )
    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [gap.name for gap in gaps])
    axes.set_ylim(-0.6, len(gaps) - 0.3)
    axes.set_xlabel(label, fontsize=9)
    _bare(axes)
    return _png(figure)


@dataclass(frozen=True)
class Defect:
    """What the published code scores with some defect: held out and over all spots, on embeddings and on noise.

    Values may be NaN where they were not measured.
    """

    name: str
    held_out: float
    all_spots: float
    noise_held_out: float
    noise_all_spots: float


def defect_plot(defects: Sequence[Defect]) -> bytes:
    """Draw each variant's honest figure beside the one that counts training spots.

    Returns
    -------
    bytes
        A PNG.
    """
    figure = Figure(figsize=(9, 1.0 + 0.45 * len(defects)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(defects))[::-1]
    series = (
        ("held-out spots", "o", HELD_OUT, [d.held_out for d in defects], True),
        ("paper_all_spots: half were trained on", "s", TRAINED_ON, [d.all_spots for d in defects], True),
        ("held-out spots, random embeddings", "o", HELD_OUT, [d.noise_held_out for d in defects], False),
        ("paper_all_spots, random embeddings", "s", TRAINED_ON, [d.noise_all_spots for d in defects], False),
    )
    for label, marker, colour, values, filled in series:
        face = colour if filled else "none"
        axes.plot(values, places, marker, color=colour, markerfacecolor=face, markersize=7, label=label)
    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, [d.name for d in defects])
    axes.set_ylim(-0.6, len(defects) - 0.4)
    axes.set_xlabel("Pearson, mean over genes", fontsize=9)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=2, fontsize=8, frameon=False)
    _bare(axes)
    return _png(figure)


def _bare(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()
