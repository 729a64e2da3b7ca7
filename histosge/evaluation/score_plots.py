"""Figures of scores: spread over genes, differences with their intervals, and ablations.

They read no file and leave the global state of matplotlib alone: a report may be written inside a notebook.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from histosge.reporting.plots import DPI, MAX_MARKS, NEUTRAL, hide_spines

HELD_OUT, TRAINED_ON, NOISE = "#35608d", "#b8860b", "#8a8f98"


@dataclass(frozen=True)
class Difference:
    """One difference with its interval."""

    name: str
    value: float
    low: float
    high: float


def difference_plot(differences: Sequence[Difference], label: str) -> Figure:
    """Draw differences as points with intervals, one row each; grey where the interval holds 0."""
    figure = Figure(figsize=(9, 0.8 + 0.42 * len(differences)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    # From the top down, in the order given.
    places = np.arange(len(differences))[::-1]
    for place, gap in zip(places, differences, strict=True):
        # Grey is no verdict that both are equal: the interval is as wide as the data are few.
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
    # Names of presets and encoders are text, never formulas.
    axes.set_yticks(places, [gap.name for gap in differences], parse_math=False)
    axes.set_ylim(-0.6, len(differences) - 0.3)
    axes.set_xlabel(label, fontsize=9)
    hide_spines(axes)
    return figure


@dataclass(frozen=True)
class Defect:
    """Scores of the published code with one defect: held out and over all spots, on embeddings and on noise.

    Values may be NaN where they were not measured.
    """

    name: str
    held_out: float
    all_spots: float
    noise_held_out: float
    noise_all_spots: float


def defect_plot(defects: Sequence[Defect]) -> Figure:
    """Draw each variant's held-out score beside the one that includes training spots."""
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
    axes.set_yticks(places, [d.name for d in defects], parse_math=False)
    axes.set_ylim(-0.6, len(defects) - 0.4)
    axes.set_xlabel("Pearson, mean over genes", fontsize=9)
    axes.grid(axis="y", linewidth=0.4, alpha=0.6)
    # Below the plot: four long labels would cover points wherever they stood inside.
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18), ncols=2, fontsize=8, frameon=False)
    hide_spines(axes)
    return figure


def score_distributions(pearson: Mapping[str, NDArray[np.float64]]) -> Figure:
    """Draw how the genes' held-out Pearson spreads, one row per preset.

    Parameters
    ----------
    pearson
        Preset -> one value per gene.
    """
    figure = Figure(figsize=(9, 0.9 + 0.62 * len(pearson)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    places = np.arange(len(pearson))[::-1]
    # Fixed, since the jitter has no meaning: the same scores make the same picture.
    rng = np.random.default_rng(0)
    shades = np.linspace(0.25, 0.85, len(pearson))
    n_dots = sum(map(len, pearson.values()))
    for place, values, shade in zip(places, pearson.values(), shades, strict=True):
        # Not axes.boxplot: it reads all of rcParams, and so makes pyplot choose a backend for the whole process
        # (matplotlib 3.10).
        low, first, middle, third, high = np.percentile(values, (5, 25, 50, 75, 95))
        for ends in ((low, first), (third, high)):
            axes.plot(ends, (place, place), color="black", linewidth=0.9, zorder=2)
        axes.barh(
            place,
            third - first,
            height=0.55,
            left=first,
            color=HELD_OUT,
            edgecolor="black",
            alpha=0.15 + 0.5 * shade,
            zorder=2,
        )
        axes.plot((middle, middle), (place - 0.275, place + 0.275), color="black", linewidth=1.6, zorder=4)
        height = place + rng.uniform(-0.22, 0.22, len(values))
        axes.scatter(
            values,
            height,
            s=5,
            color=NEUTRAL,
            alpha=0.55,
            linewidths=0,
            zorder=3,
            rasterized=n_dots > MAX_MARKS,
        )
    axes.axvline(0, color="black", linewidth=0.8, linestyle="--")
    axes.set_yticks(places, list(pearson), parse_math=False)
    axes.set_xlabel("held-out Pearson of a gene (box: quartiles; whiskers: 5 % and 95 %)", fontsize=9)
    hide_spines(axes)
    return figure
