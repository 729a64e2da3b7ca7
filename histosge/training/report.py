"""The page of a trained model: its training data, and which genes to trust.

Trust is measured on held-out spots of the training data. Scores by metric and split are on the page of an evaluation.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from featurestore.earlier_results import MadeWith
from featurestore.wording import counted
from histosge.calibration.conformal import TRUSTED, Intervals
from histosge.calibration.wording import (
    SCORES,
    adapted_sentence,
    half_width_text,
    interval_name,
    method_sentence,
    trust_sentence,
)
from histosge.reporting.page import Block, Picture, Table, render_report, write_page
from histosge.reporting.plots import to_svg, trust_plot
from histosge.training.model_card import ModelCard
from histosge.training.saved_model import SavedModel


def write_training_report(saved: SavedModel, path: Path, made_with: MadeWith | None = None) -> None:
    """Write the page of a trained model; a file that is there is replaced.

    Parameters
    ----------
    path
        The HTML file; it appears whole.
    made_with
        Settings and inputs of the training, recorded in the page.
    """
    card = saved.card
    subtitle = f"{card.preset}, {counted(len(card.genes), 'gene')}, encoder {card.encoder['key']}"
    blocks = [trust_block(saved.intervals, card.genes), _section_block(card)]
    record = {"made_with": made_with} if made_with else None
    page = render_report(
        "Training", blocks, subtitle=subtitle, footer=f"model {saved.fingerprint}", record=record
    )
    write_page(path, page)


def _by_depth(intervals: Intervals) -> str:
    """Describe how intervals differ by predicted library size, where they do."""
    if intervals.strata is None:
        return ""
    # The median gene: the mean would be that of the few whose counts are largest.
    typical = ", ".join(f"± {width:.2f}" for width in np.median(intervals.strata.half_width, axis=1))
    return (
        f" Intervals are wider where few counts are predicted: {typical} for the median gene, from the smallest predicted"
        " library size to the largest."
    )


def trust_block(intervals: Intervals | None, genes: Sequence[str]) -> Block:
    """Return the block that lists every gene with its trust and its interval, the most trusted first."""
    if intervals is None:
        return Block(
            "Which genes to trust",
            status="bad",
            status_text="The model has no prediction intervals, so it is not known which genes can be trusted.",
        )
    # Stable: genes of equal trust stay in the order of the model.
    order = np.argsort(-intervals.trust, kind="stable")
    widths = intervals.strata.half_width if intervals.strata is not None else intervals.half_width[None]
    rows = tuple(
        (
            genes[i],
            f"{intervals.trust[i]:.2f}",
            half_width_text(widths[:, i].tolist()),
            "yes" if intervals.trusted[i] else "no",
        )
        for i in order
    )
    picture = Picture(
        to_svg(trust_plot(intervals.trust, TRUSTED)),
        f"Histogram of trust over {counted(len(genes), 'gene')}.",
        f"{trust_sentence(intervals.n_spots, intervals.scope, by_effective_spots=bool(intervals.method))}"
        f"{_by_depth(intervals)}",
        "Trust",
    )
    good = int(intervals.trusted.sum())
    return Block(
        "Which genes to trust",
        f"{good} of {len(genes)} genes can be trusted ({intervals.scope}); do not interpret the others. {SCORES}",
        pictures=(picture,),
        tables=(
            Table(
                (
                    "gene",
                    "trust",
                    f"{interval_name(intervals.level, intervals.claim)}, log1p(CP10k)",
                    "trusted",
                ),
                rows,
                "Every gene, the most trusted first.",
                # A table of a thousand genes would push everything else off the page.
                folded=len(rows) > 20,
            ),
        ),
        points=tuple(
            filter(None, [method_sentence(intervals.method, intervals.level, intervals.donor_coverage)])
        ),
    )


def _section_block(card: ModelCard) -> Block:
    rows = tuple(
        (
            section["slide_id"],
            str(section["donor"] or ""),
            str(section["spots"]),
            str(section["few_counts"]),
            str(section["off_tissue"]),
        )
        for section in card.sections
    )
    header = ("section", "donor", "spots used", "left out: few counts", "left out: off tissue")
    caveat = (
        ()
        if len(card.donors) > 1
        else (
            "All sections are from one donor, or donors are not named: accuracy on another donor may be lower.",
        )
    )
    return Block(
        "Training data",
        f"Targets: {card.normalisation['target']}. Grid: {card.grid['patch_px']} px patches every "
        f"{card.grid['stride_px']} px at {card.grid['mpp']:g} µm per pixel"
        + (f", groups of tokens, {k} x {k} of each patch." if (k := card.grid.get("tokens")) else "."),
        tables=(Table(header, rows, "Sections and their spots."),),
        points=(*caveat, *_origin(card)),
    )


def _origin(card: ModelCard) -> tuple[str, ...]:
    if card.origin is None:
        return ()
    n_earlier = int(card.origin["sections"])
    return (
        f"Adapted to the sections after the first {n_earlier}, from the weights of model {card.origin['fingerprint'][:16]}.",
        adapted_sentence(len(card.sections) - n_earlier),
    )
