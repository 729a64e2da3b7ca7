"""Scores and maps of every gene for the page's search box: each preset's held-out Pearson, beside the controls'."""

import polars as pl

from featurestore.wording import counted
from histosge.evaluation.bin_scores import bin_suffix
from histosge.evaluation.results import Scores
from histosge.evaluation.section_maps import MAP_BYTES
from histosge.reporting.page import Block, Lookup
from histosge.reporting.value_maps import LEVELS, ValueMaps

MOST_GENES = 20_000
"""All genes of a genome that are counted: with ten presets the page grows by 2 MB."""
LINKS = ("scores.csv", "genes.csv", "differences.csv")


def lookup_block(scores: Scores, gene_command: str = "") -> Block:
    """Return the block with the search box and the maps that it chooses, and links to the tables beside the page.

    Parameters
    ----------
    scores
        With the maps, if there are any.
    gene_command
        That makes a report with the maps of a gene ``NAME``, for genes whose maps did not fit.
    """
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
    drawn = {shown_map.gene: number for number, shown_map in reversed(list(enumerate(scores.maps)))}
    anchors = {gene: f"map{number}" for gene, number in drawn.items()}
    maps = _maps(scores, gene_command)
    if maps is not None:
        text += _what_is_drawn(scores)
    lookup = Lookup("Find a gene", "gene", tuple(columns), rows, anchors, maps)
    return Block("Every gene", text, lookup=lookup, links=tuple((name, name) for name in tables))


def _maps(scores: Scores, gene_command: str) -> ValueMaps | None:
    if not scores.section_maps:
        return None
    missing = "NAME has no maps here: it was not chosen in every fold of any section, or the page would be too large."
    if gene_command:
        missing += f" This makes a report that has them: {gene_command}"
    # Also of the HEST protocol, whose own targets are log1p of counts: maps are of the variant with depth normalised.
    unit = "log1p(CP10k)"
    return ValueMaps(scores.section_maps, unit, "measured, held-out", "predicted", missing)


def _what_is_drawn(scores: Scores) -> str:
    """Say of how many genes and sections there are maps."""
    ids = {slide.slide_id for slide in scores.section_maps}
    genes = {name for slide in scores.section_maps for name in slide.names}
    text = (
        f" Choose a gene to see its maps on {counted(len(ids), 'section')}, by {scores.default_preset} and seed"
        f" {scores.seeds[0]}; r there is of that section alone. Measured and predicted share one colour scale. Values are"
        f" stored to 1/{2 * LEVELS} of a map's range."
    )
    n_scored = scores.rows_of(scores.genes, scores.default_preset)["gene"].n_unique()
    if len(genes) < n_scored:
        text += (
            f" {len(genes)} of {n_scored} genes have maps: more would make the page larger than"
            f" {MAP_BYTES * 4 // 3 // 1_000_000} MB, or were not chosen in every fold."
        )
    return text


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
