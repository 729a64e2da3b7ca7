"""What is read behind the page: kept as far as it should be, and the slide only if it is the one that was embedded."""

from dataclasses import replace

import numpy as np
import pytest
from viewer_world import GENES, GRID, World

from featurestore.storage.store import Store
from histosge.errors import ViewError
from histosge.prediction.expression_store import ExpressionStore
from histosge.viewer.gene_reader import GeneReader, new_gene_cache
from histosge.viewer.map_domains import table_domains
from histosge.viewer.slide_tiles import SlideTiles


def test_a_map_too_large_to_be_held_is_read_gene_by_gene_to_the_same_values(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = ExpressionStore.open(str(world.maps)).map("here", GRID.key)
    by_group = GeneReader(stored, new_gene_cache())
    monkeypatch.setattr("histosge.viewer.gene_reader.GROUPS_BYTES", 1000)
    by_gene = GeneReader(stored, new_gene_cache())
    for gene in range(len(GENES)):
        np.testing.assert_array_equal(by_gene.read(gene), by_group.read(gene))
    for gene in (-1, len(GENES)):
        with pytest.raises(LookupError):
            by_gene.read(gene)


@pytest.mark.parametrize("change", [{"fingerprint": "0-other"}, {"size_px": (3, 5)}], ids=["content", "size"])
def test_another_file_in_the_slides_place_is_not_shown(world: World, change: dict) -> None:
    record = Store.open(str(world.store)).slide("here")
    assert SlideTiles(record).describe(None)["state"] == "ready"
    found = SlideTiles(replace(record, **change)).describe(None)
    assert found["state"] == "absent"
    assert "is not the slide that was embedded" in found["reason"]


def test_a_slide_that_was_moved_is_read_where_it_lies_now(world: World) -> None:
    record = Store.open(str(world.store)).slide("here")
    moved = replace(record, source="/nowhere/here.tif")
    assert SlideTiles(moved).describe(None)["state"] == "absent"
    assert SlideTiles(moved, record.source).describe(None)["state"] == "ready"


def test_domains_of_another_grid_are_refused(world: World) -> None:
    grid = ExpressionStore.open(str(world.maps)).map("here", GRID.key).grid
    assert table_domains(world.domains, "here", grid) is not None
    assert table_domains(world.domains, "gone", grid) is None
    with pytest.raises(ViewError, match="of another grid"):
        table_domains(world.domains, "here", replace(grid, effective_mpp=2.0))
