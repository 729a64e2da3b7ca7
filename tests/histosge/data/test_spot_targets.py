"""Spots in batches: the embedding under each and its counts, streamed, equal to what training loads whole."""

import shutil
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from _stores import SPEC, Made, write_store
from scipy import sparse

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import StoreError
from featurestore.grid import GridSpec
from featurestore.storage.store import Store
from histosge import Loader, LoadSettings, SpotTargets
from histosge.data.gene_choice import GeneChoice
from histosge.data.section_loading import LoadedSection, Selection, load_sections
from histosge.data.sections import Patches, Spots
from histosge.data.spot_loading import cover
from histosge.data.spot_targets import SectionTargets, SpotBatch, section_targets
from histosge.errors import ExpressionError
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort

GRID = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
COHORT = SyntheticSpec(
    size_px=(1208, 1128), mpp=0.5, genes=GeneCounts(6, 5, 3, 3), spot_diameter_um=61.0, spot_pitch_um=67.0
)
BATCH = LoadSettings(batch=19, seed=5)


class Cohort:
    """Three sections on blocks of 5 x 7 patches, so that many spots lie over two or four of them."""

    def __init__(self, folder: Path) -> None:
        self.sheet, self.store = folder / "cohort.csv", folder / "store"
        if not self.sheet.exists():
            make_cohort(folder, COHORT, 3)
            settings = EmbedSettings(encoders=("colour",), spec=GRID, block_shape=(5, 7))
            embed(str(self.sheet), str(self.store), settings)

    def targets(self, genes: int = 7) -> SpotTargets:
        return SpotTargets.from_samples(self.sheet, self.store, genes)

    def sections(self) -> list[LoadedSection]:
        return load_sections(str(self.sheet), str(self.store), Selection())


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    return Cohort(tmp_path_factory.mktemp("cohort"))


@pytest.fixture(scope="module")
def targets(cohort: Cohort) -> SpotTargets:
    return cohort.targets()


def _joined(batches: list[SpotBatch]) -> SpotBatch:
    return SpotBatch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def _keys(batch: SpotBatch) -> list[tuple[int, int]]:
    return list(zip(batch.section.tolist(), batch.spot.tolist(), strict=True))


def test_every_spot_comes_once_with_the_embedding_and_the_counts_that_training_sees(
    cohort: Cohort, targets: SpotTargets
) -> None:
    loaded = cohort.sections()
    assert targets.genes == GeneChoice.parse(7).choose([item.section.spots for item in loaded])
    loader = Loader(cohort.store, targets=targets, settings=BATCH)
    batches = list(loader)
    assert [len(batch.spot) for batch in batches[:-1]] == [19] * (len(batches) - 1)
    seen = _joined(batches)
    assert sorted(_keys(seen)) == [
        (i, s) for i, item in enumerate(loaded) for s in range(len(item.section.spots))
    ]
    for number, item in enumerate(loaded):
        section, here = item.section, seen.section == number
        spot = seen.spot[here]
        np.testing.assert_allclose(
            seen.embedding[here], section.overlap[spot] @ section.patches.embedding, rtol=1e-5, atol=1e-6
        )
        columns = [section.spots.genes.index(gene) for gene in targets.genes]
        np.testing.assert_array_equal(seen.counts[here], section.spots.counts[spot][:, columns].toarray())
        np.testing.assert_array_equal(seen.library[here], section.spots.counts[spot].sum(axis=1).A1)
        assert targets.sections[number].barcodes.tolist() == section.spots.barcodes.tolist()
    assert {array.dtype for array in seen[:3]} == {np.dtype(np.float32)}
    assert loader.reads.spots == len(targets) == len(seen.spot)


def test_the_order_is_the_seeds_whatever_the_threads_and_mixes_sections(
    cohort: Cohort, targets: SpotTargets
) -> None:
    def order(threads: int, seed: int, epoch: int) -> list[tuple[int, int]]:
        settings = LoadSettings(batch=19, seed=seed, threads=threads)
        return _keys(_joined(list(Loader(cohort.store, targets=targets, settings=settings).epoch(epoch))))

    first = order(1, 5, 0)
    assert order(4, 5, 0) == first
    for other in (order(1, 6, 0), order(1, 5, 1)):
        assert other != first
        assert sorted(other) == sorted(first)
    assert {section for section, _ in first[:19]} == {0, 1, 2}


def test_in_order_spots_come_section_by_section(cohort: Cohort, targets: SpotTargets) -> None:
    loader = Loader(cohort.store, targets=targets, settings=LoadSettings(batch=7, shuffle=False))
    sections = _joined(list(loader)).section
    assert (np.diff(sections) >= 0).all()
    assert set(sections.tolist()) == {0, 1, 2}


def test_a_buffer_that_is_too_small_for_the_epoch_still_gives_every_spot_once(
    cohort: Cohort, targets: SpotTargets, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = Loader(cohort.store, targets=targets, settings=BATCH)
    monkeypatch.setattr(loader._batches, "_buffer_spots", lambda: 23)
    whole = sorted(_keys(_joined(list(Loader(cohort.store, targets=targets, settings=BATCH)))))
    assert sorted(_keys(_joined(list(loader)))) == whole


def test_ranks_share_the_sections_and_more_ranks_than_sections_are_refused(
    cohort: Cohort, targets: SpotTargets
) -> None:
    parts = []
    for rank in range(2):
        settings = LoadSettings(batch=19, rank=rank, world_size=2)
        loader = Loader(cohort.store, targets=targets, settings=settings)
        expected = len(loader)
        batches = list(loader)
        assert len(batches) == expected
        parts.append(set(_keys(_joined(batches))))
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == len(targets)
    with pytest.raises(StoreError, match="3 sections cannot be shared by 4 processes") as caught:
        Loader(cohort.store, targets=targets, settings=LoadSettings(rank=3, world_size=4))
    assert "\n" not in str(caught.value)
    with pytest.raises(StoreError, match="3 sections cannot be shared by 4 processes"):
        Loader(cohort.store, targets=targets).as_torch(num_workers=4)


def test_one_fold_of_the_sections_can_be_streamed_alone(cohort: Cohort, targets: SpotTargets) -> None:
    loader = Loader(cohort.store, ["S3", "S1"], targets=targets, settings=BATCH)
    assert loader.targets is not None
    assert loader.targets.slide_ids == ("S1", "S3")
    seen = _joined(list(loader))
    assert len(seen.spot) == len(targets.sections[0]) + len(targets.sections[2])
    with pytest.raises(StoreError, match="no targets for slide 'S9'; there are for S1, S2, S3"):
        Loader(cohort.store, ["S9"], targets=targets)


def test_spots_over_unreadable_patches_take_the_rest_and_spots_without_any_are_left_out_and_counted(
    cohort: Cohort, targets: SpotTargets, tmp_path: Path
) -> None:
    shutil.copytree(cohort.store, tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    array = store.embedding("S2", GRID.key, "colour", read_only=False)
    section = targets.sections[1]
    # The first spot loses one of its patches, the last one all of them.
    under = [section.overlap[i].indices for i in (0, len(section) - 1)]
    lost = {int(under[0][0]), *under[1].tolist()}
    for block in store.grid("S2", GRID.key).planned((5, 7)):
        values = array.read(block.rows, block.cols)
        for i in lost:
            row, col = section.rows[i] - block.rows[0], section.cols[i] - block.cols[0]
            if 0 <= row < block.shape[0] and 0 <= col < block.shape[1]:
                values[row, col] = np.nan
        array.write(block, values)
    loader = Loader(tmp_path / "store", targets=targets, settings=LoadSettings(batch=1))
    assert len(loader) == len(targets)  # nobody knows yet
    seen = _joined(list(loader))
    gone = set(range(len(section))) - set(seen.spot[seen.section == 1].tolist())
    assert len(section) - 1 in gone
    assert loader.reads.uncovered == {"S2": len(gone)}
    assert loader.reads.unreadable == {"S2": len(lost)}
    assert len(loader) == len(targets) - len(gone) == len(list(loader))
    left = load_sections(str(cohort.sheet), str(tmp_path / "store"), Selection())[1].section
    place = left.spots.barcodes.tolist().index(str(section.barcodes[0]))
    at = (seen.section == 1) & (seen.spot == 0)
    expected = left.overlap[place] @ left.patches.embedding
    np.testing.assert_allclose(seen.embedding[at], expected, rtol=1e-5, atol=1e-6)


def test_a_block_that_is_not_stored_is_counted(cohort: Cohort, targets: SpotTargets, tmp_path: Path) -> None:
    shutil.copytree(cohort.store, tmp_path / "store")
    store = Store.open(str(tmp_path / "store"))
    array = store.embedding("S1", GRID.key, "colour", read_only=False)
    section = targets.sections[0]
    place = (int(section.rows[0]) // 5, int(section.cols[0]) // 7)
    array.remove_block(next(b for b in store.grid("S1", GRID.key).planned((5, 7)) if b.index == place))
    loader = Loader(tmp_path / "store", targets=targets, settings=BATCH)
    list(loader)
    assert loader.reads.missing == {"S1": 1}


def test_genes_are_a_number_names_or_both(cohort: Cohort, targets: SpotTargets) -> None:
    messages: list[str] = []
    named = SpotTargets.from_samples(
        cohort.sheet, cohort.store, ["MORPH02", "HOUSE01"], on_message=messages.append
    )
    assert named.genes == ("MORPH02", "HOUSE01")
    assert messages[0].startswith("S1: AnnData: ")
    assert "usable spots (0 under 200 counts and 0 off tissue left out)" in messages[1]
    with pytest.raises(ExpressionError, match="'S1' did not measure 1 of 1 genes, such as 'EPCAM'"):
        SpotTargets.from_samples(cohort.sheet, cohort.store, ["EPCAM"])
    both = SpotTargets.from_samples(cohort.sheet, cohort.store, "7+HOUSE01")
    assert both.genes == tuple(dict.fromkeys((*targets.genes, "HOUSE01")))
    with pytest.raises(ExpressionError, match="names gene 'HOUSE': did you mean HOUSE"):
        SpotTargets.from_samples(cohort.sheet, cohort.store, "7+HOUSE")


def test_sections_with_few_usable_spots_are_left_out_and_said(cohort: Cohort, targets: SpotTargets) -> None:
    messages: list[str] = []
    highest = int(min(section.library.max() for section in targets.sections))
    with pytest.raises(ExpressionError, match=r"no section of .* has the 20 usable spots"):
        SpotTargets.from_samples(
            cohort.sheet, cohort.store, 3, min_counts=highest, on_message=messages.append
        )
    assert sum("are too few (20 are needed)" in line for line in messages) == 3


# ---------------------------------------------------------------- memory

MADE = Made((48, 48), 96, (8, 8))


def _made_targets(store: Store) -> SpotTargets:
    """A spot for every patch and a disc of three patches across, on every slide of a made store."""
    sections: list[SectionTargets] = []
    for slide_id in store.slide_ids():
        stored = store.grid(slide_id, SPEC.key)
        rows, cols = np.nonzero(stored.is_tissue)
        nothing = np.empty((len(rows), 0), np.float32)
        patches = Patches(slide_id, rows, cols, nothing, stored.grid.stride_um, stored.grid.patch_um)
        counts = sparse.csr_matrix(np.ones((len(rows), 1), np.float32))
        barcodes = np.array([str(i) for i in range(len(rows))])
        spots = Spots(slide_id, "D", barcodes, patches.xy_um, 3 * stored.grid.stride_um, counts, ("G",))
        sections.append(section_targets(cover(spots, patches, 0), ("G",)))
    return SpotTargets(("G",), SPEC.key, None, tuple(sections))


def _peak(batches: Iterator[SpotBatch]) -> int:
    tracemalloc.start()
    try:
        for _ in batches:
            pass
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_grow_with_sections(tmp_path: Path) -> None:
    made = write_store(tmp_path / "store", 8, MADE)
    targets = _made_targets(made)
    settings = LoadSettings(batch=64, buffer_mb=1, threads=1)
    few = Loader(made.location.url, made.slide_ids()[:2], targets=targets, settings=settings)
    many = Loader(made.location.url, targets=targets, settings=settings)
    peaks = [_peak(loader.epoch(0)) for loader in (few, few, many)]
    assert many.reads.spots == 8 * 48 * 48
    assert peaks[2] < 1.2 * peaks[1]
    # All spots at once would take 8 * 48 * 48 * 96 * 4 bytes, 7 MB.
    assert peaks[2] < 5e6
