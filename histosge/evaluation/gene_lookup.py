"""Scores of every gene for the page's search box: each preset's held-out Pearson, beside the controls'."""

import polars as pl

from featurestore.wording import counted
from histosge.evaluation.bin_scores import bin_suffix
from histosge.evaluation.results import Scores
from histosge.reporting.page import Block, Lookup

MOST_GENES = 20_000
"""All genes of a genome that are counted: with ten presets the page grows by 2 MB."""
LINKS = ("scores.csv", "genes.csv", "differences.csv")


def lookup_block(scores: Scores) -> Block:
    """Return the block with the search box, and links to the tables beside the page."""
    tables = (*LINKS, *(["domains.csv"] if scores.domains is not None else []))
    names = [*scores.presets, *scores.controls]
    columns = {preset: _means(scores, preset, "pearson") for preset in names}
    shown = scores.default_preset
    for column, heading in _further(scores).items():
        columns[f"{shown}, {heading}"] = _means(scores, shown, column)
    first = columns[shown]
    # Best first, so that the box shows something of use before anything is typed.
    ranked = sorted(first, key=lambda gene: (-first[gene], gene))
    kept = ranked[:MOST_GENES]
    rows = tuple((gene, *(values.get(gene) for values in columns.values())) for gene in kept)
    text = (
        f"Held-out Pearson of each gene, mean over folds and seeds; of controls over draws."
        f" {counted(len(rows), 'gene')}, those that {shown} was scored on."
    )
    if len(ranked) > len(kept):
        text += f" {len(ranked) - len(kept)} genes that score less are in genes.csv alone."
    maps = {shown_map.gene: number for number, shown_map in reversed(list(enumerate(scores.maps)))}
    anchors = {gene: f"map{number}" for gene, number in maps.items()}
    lookup = Lookup("Find a gene", "gene", tuple(columns), rows, anchors)
    return Block("Every gene", text, lookup=lookup, links=tuple((name, name) for name in tables))


def _means(scores: Scores, preset: str, column: str) -> dict[str, float]:
    if column not in scores.genes.columns:
        return {}
    means = scores.rows_of(scores.genes, preset).group_by("gene").agg(pl.col(column).mean())
    return {gene: round(value, 3) for gene, value in means.iter_rows() if value is not None}


def _further(scores: Scores) -> dict[str, str]:
    """Return further columns of genes.csv, of the default preset alone: heading by column."""
    found = {"pearson_depth_adjusted": "depth-adjusted"}
    if scores.bins is not None:
        at = bin_suffix(scores.bins.side_um)
        found |= {
            f"pearson_{at}": f"at {scores.bins.side_um:g} µm",
            f"pearson_within_spots_{at}": f"within spots at {scores.bins.side_um:g} µm",
        }
    return {name: heading for name, heading in found.items() if name in scores.genes.columns}
