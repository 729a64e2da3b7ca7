"""Streaming: every patch once an epoch, in an order that only the seed decides."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from _stores import SPEC, Made, add_slide, write_store

from featurestore.errors import StoreError
from featurestore.storage.store import Store
from histosge import Loader, LoadSettings, stream_batches
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.data.patch_batches import PatchBatches
from histosge.data.shuffle_buffer import Batch

MADE = Made((17, 23), 5, (7, 11), frame=3)
ONE_MB = LoadSettings(batch=97, seed=3, buffer_mb=1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    made = write_store(tmp_path_factory.mktemp("stores") / "store", 3, MADE)
    small, _ = add_slide(made, "small", Made((5, 4), 5, (7, 11)))
    (block,) = made.grid("small", SPEC.key).planned((5, 4))
    values = np.arange(100).reshape(5, 4, 5).astype(np.float16)
    values[2, 3, 1] = np.nan
    small.write(block, values)
    made.consolidate("small")
    return made.location.url


def _join(batches: list[Batch]) -> Batch:
    return Batch(*(np.concatenate(arrays) for arrays in zip(*batches, strict=True)))


def _few_slots(settings: LoadSettings, store: str) -> Loader:
    """A loader whose two buffers hold two blocks each, so that they take turns often."""
    loader = Loader(store, settings=settings)
    assert isinstance(loader._batches, PatchBatches)
    loader._batches.slots_per_buffer = 2
    return loader


def test_an_epoch_has_every_patch_that_training_sees_once_and_bit_equal(store: str) -> None:
    loader = _few_slots(ONE_MB, store)
    batches = list(loader)
    assert [len(batch.rows) for batch in batches[:-1]] == [97] * (len(batches) - 1)
    seen = _join(batches)
    opened = Store.open(store)
    assert loader.slide_ids == ("S00", "S01", "S02", "small")
    for number, slide_id in enumerate(loader.slide_ids):
        patches = load_patches(open_embedded(opened, slide_id, None, None))
        mine = seen.slide == number
        order = np.lexsort((seen.cols[mine], seen.rows[mine]))
        expected = np.lexsort((patches.cols, patches.rows))
        assert np.array_equal(seen.rows[mine][order], patches.rows[expected])
        assert np.array_equal(seen.cols[mine][order], patches.cols[expected])
        assert np.array_equal(seen.embedding[mine][order].astype(np.float32), patches.embedding[expected])


def test_background_and_patches_without_an_embedding_are_left_out_and_counted(store: str) -> None:
    loader = Loader(store, settings=ONE_MB)
    seen = _join(list(loader))
    tissue = 14 * 20
    assert len(seen.rows) == loader.reads.patches == 3 * tissue + 19
    assert loader.reads.unreadable == {"small": 1}
    assert loader.reads.background == 3 * (17 * 23 - tissue)
    assert loader.reads.blocks == 3 * 9 + 1
    assert not loader.reads.missing


def test_the_order_is_the_seeds_whatever_the_threads_and_another_in_each_epoch(store: str) -> None:
    def order(threads: int, seed: int, epoch: int) -> list[tuple[int, ...]]:
        settings = LoadSettings(batch=97, seed=seed, threads=threads, buffer_mb=1)
        seen = _join(list(_few_slots(settings, store).epoch(epoch)))
        return list(zip(seen.slide.tolist(), seen.rows.tolist(), seen.cols.tolist(), strict=True))

    first = order(1, 3, 0)
    assert order(7, 3, 0) == first
    for other in (order(1, 4, 0), order(1, 3, 1)):
        assert other != first
        assert sorted(other) == sorted(first)
    # Shuffled for real: neighbours in the order are seldom neighbours on the slide.
    near = [a[0] == b[0] and abs(a[1] - b[1]) + abs(a[2] - b[2]) == 1 for a, b in itertools.pairwise(first)]
    assert np.mean(near) < 0.1


def test_ranks_see_disjoint_parts_that_make_the_whole(store: str) -> None:
    parts = []
    for rank in range(3):
        settings = LoadSettings(batch=97, seed=3, rank=rank, world_size=3, buffer_mb=1)
        seen = _join(list(_few_slots(settings, store)))
        parts.append(set(zip(seen.slide.tolist(), seen.rows.tolist(), seen.cols.tolist(), strict=True)))
    assert sum(map(len, parts)) == len(set.union(*parts)) == 859
    assert min(map(len, parts)) > 200


def test_several_epochs_stream_on_and_a_short_last_batch_can_be_dropped(store: str) -> None:
    settings = LoadSettings(batch=97, buffer_mb=1, drop_last=True)
    batches = list(stream_batches(store, epochs=2, settings=settings))
    assert [len(batch.rows) for batch in batches] == [97] * 2 * (859 // 97)
    assert not np.array_equal(batches[0].embedding, batches[8].embedding)


@pytest.mark.parametrize("drop_last", [False, True])
def test_the_length_of_an_epoch_is_known_before_it_begins(store: str, drop_last: bool) -> None:
    for rank in range(3):
        settings = LoadSettings(97, 3, drop_last=drop_last, rank=rank, world_size=3, buffer_mb=1)
        loader = Loader(store, ["S00", "S01", "S02"], settings=settings)
        for _ in range(2):
            expected = len(loader)
            assert len(list(loader)) == expected


def test_the_length_does_not_count_patches_that_an_epoch_found_unreadable(store: str) -> None:
    loader = Loader(store, settings=LoadSettings(batch=1))
    assert len(loader) == 860
    assert len(list(loader)) == 859
    assert len(loader) == 859


def test_an_epoch_can_be_set_and_comes_again_the_same(store: str) -> None:
    loader = Loader(store, settings=ONE_MB)
    epochs = [_join(list(loader)) for _ in range(3)]
    loader.set_epoch(1)
    again = _join(list(loader)), _join(list(loader))
    for expected, seen in zip(epochs[1:], again, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(expected, seen, strict=True))
    assert not np.array_equal(epochs[0].embedding, epochs[1].embedding)


def test_without_shuffling_slides_and_blocks_come_in_order(store: str) -> None:
    seen = _join(list(Loader(store, ["S01"], settings=LoadSettings(shuffle=False))))
    assert (seen.rows[0], seen.cols[0]) == (3, 3)
    assert np.all(np.diff(seen.rows // 7) >= 0)


def test_a_block_that_is_missing_is_counted_and_a_damaged_one_stops_the_epoch(tmp_path: Path) -> None:
    made = write_store(tmp_path / "store", 1, MADE)
    array = made.embedding("S00", SPEC.key, "random")
    blocks = made.grid("S00", SPEC.key).planned(MADE.block)
    array.remove_block(blocks[4])
    loader = Loader(made.location.url, settings=ONE_MB)
    assert len(_join(list(loader)).rows) == 14 * 20 - 7 * 11
    assert loader.reads.missing == {"S00": 1}
    file = Path(made.location.path(array.object_path(blocks[5].index)))
    file.write_bytes(b"\0" * 10 + file.read_bytes()[10:])
    with pytest.raises(StoreError, match="is damaged"):
        list(loader)


def test_leaving_an_epoch_early_leaves_nothing_running(store: str) -> None:
    import threading

    before = threading.active_count()
    loader = _few_slots(LoadSettings(batch=5, buffer_mb=1), store)
    for number, _ in enumerate(loader):
        if number == 3:
            break
    assert threading.active_count() <= before + 1
    assert len(_join(list(loader)).rows) == 859


def test_what_cannot_be_is_refused_with_the_numbers(store: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"rank 2 is none of 0\.\.1"):
        LoadSettings(rank=2, world_size=2)
    with pytest.raises(StoreError, match="no slide 'S7'"):
        Loader(store, ["S7"])
    big = Store.open_or_create(str(tmp_path / "big"))
    add_slide(big, "S00", Made((400, 400), 1024, (400, 400)))
    big.consolidate("S00")
    with pytest.raises(
        StoreError, match=r"buffer of 256 MB cannot hold two blocks of 312\.5 MB; give buffer_mb=625"
    ):
        Loader(big.location.url)


def test_batches_that_are_kept_are_never_written_to_again(store: str) -> None:
    loader = _few_slots(LoadSettings(batch=10, seed=3, buffer_mb=1), store)
    kept, copies = [], []
    for _ in range(3):
        for batch in loader:
            kept.append(batch)
            copies.append([array.copy() for array in batch])
    for batch, copy in zip(kept, copies, strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(batch, copy, strict=True))


def test_a_piece_of_a_batch_that_is_kept_is_never_written_to_again(store: str) -> None:
    loader = _few_slots(LoadSettings(batch=10, seed=3, buffer_mb=1), store)
    kept = [batch.embedding[2:5, 1:][::-1] for batch in loader]
    copies = [piece.copy() for piece in kept]
    for _ in range(2):
        for _batch in loader:
            pass
    assert all(np.array_equal(piece, copy) for piece, copy in zip(kept, copies, strict=True))


def test_memory_is_used_again_when_nobody_keeps_batches(store: str) -> None:
    loader = _few_slots(LoadSettings(batch=10, buffer_mb=1), store)
    buffers = loader._batches.buffers  # type: ignore[union-attr]
    for _ in range(3):
        for _slide, _rows, _cols, _embedding in loader:
            pass
    assert buffers.n_made == 2
    kept = list(loader)
    assert buffers.n_made > 2
    del kept
    gone = buffers.n_made
    for _ in range(3):
        next(iter(loader))  # an epoch that is left early returns its buffers, too
        for _batch in loader:
            pass
    assert buffers.n_made == gone


def test_a_patch_that_turns_unreadable_between_epochs_is_left_out_and_the_order_stays(tmp_path: Path) -> None:
    made = write_store(tmp_path / "store", 1, MADE)
    array = made.embedding("S00", SPEC.key, "random", read_only=False)
    block = made.grid("S00", SPEC.key).planned(MADE.block)[4]
    loader = Loader(made.location.url, settings=LoadSettings(batch=50, shuffle=False))
    before, again = _join(list(loader)), _join(list(loader))
    assert all(np.array_equal(a, b) for a, b in zip(before, again, strict=True))
    values = array.read(block.rows, block.cols)
    values[2, 3, 1] = -np.nan
    array.write(block, values)
    after = _join(list(loader))
    lost = (before.rows == block.rows[0] + 2) & (before.cols == block.cols[0] + 3)
    assert lost.sum() == 1
    assert loader.reads.unreadable == {"S00": 1}
    assert all(np.array_equal(a[~lost], b) for a, b in zip(before, after, strict=True))
