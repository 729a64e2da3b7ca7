"""Presets on several encoders: the same held-out spots for all, one table, paired differences between encoders.

Each encoder is evaluated by itself (`runner`). Here sections are cut to the spots that all encoders cover, and the
scores of all are put together.

Terms
    entry   a preset on one encoder, such as ``dense on uni``: a row of the report where there are several encoders
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import polars as pl

from histosge.data.section_loading import MIN_SPOTS, LoadedSection
from histosge.errors import HistosgeError
from histosge.evaluation.paired_bootstrap import PairedBootstrap, ordered_pairs
from histosge.evaluation.results import Entry, Scores
from histosge.heldout.leakage import select_spots


def keep_common_spots(loaded: Mapping[str, Sequence[LoadedSection]]) -> dict[str, list[LoadedSection]]:
    """Cut the sections of every encoder to the spots that all encoders cover, so that differences are paired.

    Parameters
    ----------
    loaded
        Encoder -> its sections.

    Raises
    ------
    HistosgeError
        If no section has enough spots in common.
    """
    by_id = {
        encoder: {item.section.slide_id: item for item in sections} for encoder, sections in loaded.items()
    }
    first = next(iter(by_id.values()))
    found: dict[str, list[LoadedSection]] = {encoder: [] for encoder in loaded}
    for slide_id in first:
        if not all(slide_id in sections for sections in by_id.values()):
            continue
        parts = [sections[slide_id].section.spots.barcodes for sections in by_id.values()]
        common = parts[0]
        for barcodes in parts[1:]:
            common = common[np.isin(common, barcodes)]
        if len(common) < MIN_SPOTS:
            continue
        for encoder, sections in by_id.items():
            item = sections[slide_id]
            # All encoders read the same file, so the spots that are kept come in the same order.
            keep = np.isin(item.section.spots.barcodes, common)
            found[encoder].append(replace(item, section=select_spots(item.section, keep)))
    if not any(found.values()):
        raise HistosgeError(
            f"no section has {MIN_SPOTS} usable spots that all of {', '.join(loaded)} cover; evaluate them one by one"
        )
    return found


def with_encoder(scores: Scores, encoder: str) -> Scores:
    """Return scores that name the encoder of every row; presets keep their names."""
    differences = scores.differences
    if differences is not None:
        differences = differences.with_columns(
            pl.lit(encoder).alias("encoder_a"), pl.lit(encoder).alias("encoder_b")
        )
    return replace(
        scores,
        scores=scores.scores.with_columns(pl.lit(encoder).alias("encoder")),
        genes=scores.genes.with_columns(pl.lit(encoder).alias("encoder")),
        differences=differences,
        domains=None
        if scores.domains is None
        else scores.domains.with_columns(pl.lit(encoder).alias("encoder")),
        encoders=(encoder,),
    )


def merge_encoders(found: Mapping[str, Scores]) -> Scores:
    """Put the scores of several encoders together: an entry for each preset on each encoder.

    Maps and folds are those of the encoder that is named first.

    Parameters
    ----------
    found
        Encoder -> scores of the same presets on the same spots.
    """
    (first_encoder, first), *_ = found.items()
    if len(found) == 1:
        return with_encoder(first, first_encoder)
    entries = {
        f"{preset} on {encoder}": Entry(preset, encoder)
        for encoder, scores in found.items()
        for preset in scores.presets
    }
    labels = {entry: label for label, entry in entries.items()}
    shown = labels[Entry(first.default_preset, first_encoder)]
    named = [with_encoder(scores, encoder) for encoder, scores in found.items()]
    return replace(
        first,
        scores=pl.concat(scores.scores for scores in named),
        # Variants of the published code may score other genes, but the columns are the metrics', the same for all.
        genes=pl.concat(scores.genes for scores in named),
        domains=None
        if first.domains is None
        else pl.concat(scores.domains for scores in named if scores.domains is not None),
        presets=tuple(entries),
        default_preset=shown,
        notes=tuple(dict.fromkeys(note for scores in named for note in scores.notes)),
        left_out=tuple(dict.fromkeys(note for scores in named for note in scores.left_out)),
        differences=_differences(found, entries, labels, shown, first.split),
        kinds={
            label: found[entry.encoder].kinds[entry.preset]
            for label, entry in entries.items()
            if entry.preset in found[entry.encoder].kinds
        },
        encoders=tuple(found),
        entries=entries,
    )


def _differences(
    found: Mapping[str, Scores],
    entries: Mapping[str, Entry],
    labels: Mapping[Entry, str],
    shown: str,
    split: str,
) -> pl.DataFrame | None:
    """Compare every two entries on the same draws of genes and spots: the draws depend on names and counts alone."""
    merged = PairedBootstrap({})
    for encoder, scores in found.items():
        if scores.bootstrap is None:
            return None
        merged.take(
            scores.bootstrap,
            {entry.preset: label for entry, label in labels.items() if entry.encoder == encoder},
        )
    table = merged.table(ordered_pairs(list(entries), shown), split)
    plain = {label: entry.preset for label, entry in entries.items()}
    encoder_of = {label: entry.encoder for label, entry in entries.items()}
    return table.with_columns(
        *(pl.col(f"preset_{side}").replace_strict(encoder_of).alias(f"encoder_{side}") for side in "ab"),
        *(pl.col(f"preset_{side}").replace_strict(plain) for side in "ab"),
    )
