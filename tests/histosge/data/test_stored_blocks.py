"""Blocks from a store are those of the same sections in memory, in any order, in bounded memory."""

from pathlib import Path

import numpy as np
import pytest
from _stores import SPEC, Made, add_slide
from scipy import sparse

from featurestore.errors import StoreError
from featurestore.storage.store import Store
from histosge import Loader, LoadSettings, SpotTargets
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.data.sections import TrainingSection
from histosge.data.spot_blocks import SectionBlocks
from histosge.data.spot_overlap import disc_overlap
from histosge.data.spot_targets import SectionTargets

BLOCK, SHAPE, DIM, GENES, HALO_UM = (7, 11), (23, 31), 5, 3, 150.0


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, SpotTargets, list[TrainingSection]]:
    """Two slides, one of whose patches is unreadable, with spots whose discs cross the edges of blocks."""
    store = Store.open_or_create(str(tmp_path_factory.mktemp("stores") / "store"))
    targets, sections = [], []
    for number in range(2):
        name, rng = f"S{number}", np.random.default_rng(number)
        array, is_tissue = add_slide(store, name, Made(SHAPE, DIM, BLOCK, frame=4))
        for block in store.grid(name, SPEC.key).planned(BLOCK):
            values = rng.standard_normal((*block.shape, DIM)).astype(np.float16)
            values[~is_tissue[block.slices]] = np.nan
            if block.index == (1, 1):
                values[2, 3, 1] = np.nan
            array.write(block, values)
        store.consolidate(name)
        patches = load_patches(open_embedded(store, name, None, None))
        xy = rng.uniform(250, 1200, (60, 2))
        overlap = disc_overlap(xy, 130.0, patches)
        counts = sparse.csr_matrix(rng.poisson(3, (60, GENES)))
        library = np.full(60, 700, np.float32)
        under = np.unique(overlap.indices)
        targets.append(
            SectionTargets(
                name,
                np.arange(60).astype(str),
                counts,
                library,
                sparse.csr_matrix(overlap[:, under]),
                patches.rows[under],
                patches.cols[under],
            )
        )
        logs = np.log1p(counts.toarray() / 700 * 1e4).astype(np.float32)
        sections.append(TrainingSection(patches, overlap, xy, logs))
    return store.location.url, SpotTargets(("a", "b", "c"), SPEC.key, None, tuple(targets)), sections


def test_blocks_of_a_store_are_those_of_sections_in_memory(
    cohort: tuple[str, SpotTargets, list[TrainingSection]],
) -> None:
    store, targets, sections = cohort
    loader = Loader(store, targets=targets, settings=LoadSettings(buffer_mb=1))
    stored, held = loader.spot_blocks(HALO_UM), SectionBlocks(sections, HALO_UM, BLOCK)
    assert stored.section_of.tolist() == held.section_of.tolist()
    assert stored.n_spots.tolist() == held.n_spots.tolist()
    order = np.random.default_rng(3).permutation(len(stored.n_spots)).tolist()
    for ours, theirs in zip(stored.read(order), held.read(order), strict=True):
        assert ours.section == theirs.section
        np.testing.assert_array_equal(ours.spots, theirs.spots)
        np.testing.assert_allclose(ours.target, theirs.target, rtol=1e-6)
        # The order of patches may differ: by their places they are the same.
        np.testing.assert_array_equal(ours.patches.xy_um[ours.under], theirs.patches.xy_um[theirs.under])
        mine, other = (np.lexsort((b.patches.cols, b.patches.rows)) for b in (ours, theirs))
        np.testing.assert_array_equal(ours.patches.rows[mine], theirs.patches.rows[other])
        np.testing.assert_array_equal(ours.patches.cols[mine], theirs.patches.cols[other])
        np.testing.assert_array_equal(ours.patches.embedding[mine], theirs.patches.embedding[other])
        np.testing.assert_allclose(ours.overlap.toarray(), theirs.overlap.toarray())


def test_an_object_that_is_still_in_memory_is_not_read_again(
    cohort: tuple[str, SpotTargets, list[TrainingSection]],
) -> None:
    store, targets, _ = cohort
    blocks = Loader(store, targets=targets).spot_blocks(HALO_UM)
    n_objects = []
    for _ in range(2):
        list(blocks.read(range(len(blocks.n_spots))))
        n_objects.append(blocks.n_objects)
    assert n_objects[0] == n_objects[1] <= 2 * 12


def test_blocks_without_targets_and_blocks_that_are_gone_are_refused(
    cohort: tuple[str, SpotTargets, list[TrainingSection]], tmp_path: Path
) -> None:
    store, targets, _ = cohort
    with pytest.raises(StoreError, match="need targets"):
        Loader(store).spot_blocks(HALO_UM)
    empty = Store.open_or_create(str(tmp_path / "store"))
    for name in ("S0", "S1"):
        add_slide(empty, name, Made(SHAPE, DIM, BLOCK, frame=4))
        empty.consolidate(name)
    blocks = Loader(empty.location.url, targets=targets).spot_blocks(HALO_UM)
    with pytest.raises(StoreError, match="run histosge embed again"):
        list(blocks.read([0]))
