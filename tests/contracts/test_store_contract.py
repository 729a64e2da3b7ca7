"""What every place that holds a store must obey: one class, run on each kind of location."""

import os
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from featurestore.blocks import Block, plan_blocks
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import IdentityMismatchError, StoreError, StoreNotFoundError
from featurestore.grid import GridSpec, PatchGrid
from featurestore.location import Location
from featurestore.storage.block_array import check_whole
from featurestore.storage.layout import failure_path
from featurestore.storage.store import SlideRecord, Store
from featurestore.storage.validation import validate
from featurestore.tissue.survey import Survey

DIM = 5
BLOCK = (3, 4)
SLIDE = SlideRecord("S-1", "s.tif", (211, 117), 0.5, "7-abc")
GRID = PatchGrid.for_slide((211, 117), 0.5, (0.5,), GridSpec(0.5, 16, 16))  # 7 x 13 patches
IDENTITY = EncoderIdentity("toy:one", DIM, {"version": 1})


def _survey() -> Survey:
    rng = np.random.default_rng(3)
    tissue = np.zeros(GRID.shape, np.uint8)
    tissue[1:6, 2:7] = rng.integers(26, 255, (5, 5))
    tissue[6, 12] = 25  # just short of tissue
    return Survey(tissue, rng.integers(0, 255, (*GRID.shape, 3), np.uint8), {"name": "toy"})


def _values(block: Block, tissue: np.ndarray) -> np.ndarray:
    values = np.random.default_rng(block.index).normal(size=(*block.shape, DIM)).astype(np.float32)
    values[~tissue[block.slices]] = np.nan
    return values


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield str(tmp_path / "store")
        return
    where = f"memory://{uuid.uuid4().hex}"
    yield where
    Location(where).remove("")


@pytest.fixture
def store(url: str) -> Store:
    store = Store.open_or_create(url)
    store.add_slide(SLIDE)
    store.add_grid(SLIDE.slide_id, GRID, _survey(), {"histosge": "0"})
    store.add_embedding(SLIDE.slide_id, GRID, IDENTITY, BLOCK)
    store.consolidate(SLIDE.slide_id)
    return store


def _fill(store: Store, skip: int = 0) -> list[Block]:
    array = store.embedding(SLIDE.slide_id, GRID.spec.key, IDENTITY.key, read_only=False)
    stored = store.grid(SLIDE.slide_id, GRID.spec.key)
    planned = stored.planned(array.block_shape)
    for block in planned[skip:]:
        array.write(block, _values(block, stored.is_tissue))
    return planned


class TestStoreContract:
    def test_what_was_written_is_read_back(self, store: Store) -> None:
        planned = _fill(store)
        array = store.embedding(SLIDE.slide_id, GRID.spec.key, IDENTITY.key)
        tissue = store.grid(SLIDE.slide_id, GRID.spec.key).is_tissue
        for block in planned:
            expected = _values(block, tissue).astype(np.float16)
            np.testing.assert_array_equal(array.read(block.rows, block.cols), expected)

    def test_only_blocks_with_tissue_are_planned(self, store: Store) -> None:
        stored = store.grid(SLIDE.slide_id, GRID.spec.key)
        planned = {block.index for block in stored.planned(BLOCK)}
        with_tissue = {b.index for b in plan_blocks(GRID.shape, BLOCK) if stored.is_tissue[b.slices].any()}
        assert planned == with_tissue == {(0, 0), (0, 1), (1, 0), (1, 1)}

    def test_done_is_what_exists(self, store: Store) -> None:
        planned = _fill(store, skip=3)
        array = store.embedding(SLIDE.slide_id, GRID.spec.key, IDENTITY.key)
        assert array.missing(planned) == planned[:3]
        assert array.done() == {planned[3].index}

    def test_an_unfinished_array_is_refused_with_the_command_that_finishes_it(self, store: Store) -> None:
        planned = _fill(store, skip=1)
        array = store.embedding(SLIDE.slide_id, GRID.spec.key, IDENTITY.key)
        check_whole(array, planned[1:], "S-1")
        with pytest.raises(
            StoreError, match=r"'S-1' has 3 of 4 blocks.* run the same histosge predict again"
        ):
            check_whole(array, planned, "S-1", "predict")

    def test_a_block_whose_patches_all_failed_is_done(self, store: Store) -> None:
        array = store.embedding(SLIDE.slide_id, GRID.spec.key, IDENTITY.key, read_only=False)
        block = store.grid(SLIDE.slide_id, GRID.spec.key).planned(BLOCK)[0]
        array.write(block, np.full((*block.shape, DIM), np.nan, np.float32))
        assert array.done() == {block.index}

    def test_a_block_that_straddles_two_objects_is_refused(self, store: Store) -> None:
        array = store.embedding(SLIDE.slide_id, GRID.spec.key, IDENTITY.key, read_only=False)
        crooked = Block((0, 0), (1, 4), (0, 4))
        with pytest.raises(StoreError, match="plan_blocks"):
            array.write(crooked, np.zeros((3, 4, DIM), np.float32))

    def test_a_whole_store_has_no_problems(self, store: Store, url: str) -> None:
        _fill(store)
        assert validate(url, deep=True) == []

    def test_missing_blocks_are_named(self, store: Store, url: str) -> None:
        planned = _fill(store, skip=1)
        problems = validate(url)
        assert [p.path.split("/c/")[1] for p in problems] == [f"{planned[0].index[0]}/{planned[0].index[1]}"]

    def test_a_flipped_byte_is_found_by_a_deep_look(self, store: Store, url: str) -> None:
        planned = _fill(store)
        path = f"S-1/{GRID.spec.key}/toy-one/embedding/c/{planned[1].index[0]}/{planned[1].index[1]}/0"
        fs, root = store.location._fs_root
        data = bytearray(fs.cat_file(f"{root}/{path}"))
        data[7] ^= 1
        fs.pipe_file(f"{root}/{path}", bytes(data))
        assert validate(url) == []
        (problem,) = validate(url, deep=True)
        assert "damaged" in problem.what

    def test_another_slide_under_the_same_id_is_refused(self, store: Store) -> None:
        with pytest.raises(IdentityMismatchError, match=r"7-abc.*8-def.*histosge rm"):
            store.add_slide(SlideRecord("S-1", "s.tif", (211, 117), 0.5, "8-def"))

    def test_another_scale_under_the_same_id_is_refused(self, store: Store) -> None:
        with pytest.raises(IdentityMismatchError, match=r"mpp 0\.5, now it is 0\.25; .*histosge rm"):
            store.add_slide(SlideRecord("S-1", "s.tif", (211, 117), 0.25, "7-abc"))
        assert store.slide("S-1") == SLIDE

    def test_another_encoder_under_the_same_slug_is_refused(self, store: Store) -> None:
        with pytest.raises(IdentityMismatchError, match="histosge rm"):
            store.add_embedding(SLIDE.slide_id, GRID, EncoderIdentity("toy:one", DIM, {"version": 2}), BLOCK)
        with pytest.raises(IdentityMismatchError, match="toy/one"):
            store.add_embedding(SLIDE.slide_id, GRID, EncoderIdentity("toy/one", DIM, {"version": 1}), BLOCK)

    def test_failures_are_diagnosis_only(self, store: Store, url: str) -> None:
        _fill(store)
        path = failure_path("S-1", GRID.spec.key, IDENTITY.key, (0, 1))
        store.record_failure(path, {"block": [0, 1], "patches": [[1, 5]], "reason": "cut off"})
        assert [name for name, _ in store.block_failures("S-1")] == [f"{GRID.spec.key}/toy-one/0.1"]
        assert validate(url, deep=True) == []
        store.location.remove("_failures")
        assert validate(url, deep=True) == []

    def test_removing_an_encoder_leaves_the_grid(self, store: Store, url: str) -> None:
        _fill(store)
        store.remove("S-1", GRID.spec.key, IDENTITY.key)
        assert store.encoder_slugs("S-1", GRID.spec.key) == []
        assert store.grid_keys("S-1") == [GRID.spec.key]
        assert validate(url, deep=True) == []

    def test_writing_a_block_reads_nothing(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        block = store.grid(SLIDE.slide_id, GRID.spec.key).planned(BLOCK)[-1]
        array = store.embedding(SLIDE.slide_id, GRID.spec.key, IDENTITY.key, read_only=False)
        zarr_store = type(array._array.store)
        requested: list[str] = []
        real = zarr_store.get

        async def get(self, key, *args, **kwargs):  # type: ignore[no-untyped-def]  # the store's own signature
            requested.append(key)
            return await real(self, key, *args, **kwargs)

        monkeypatch.setattr(zarr_store, "get", get)
        array.write(block, np.ones((*block.shape, DIM), np.float32))
        assert requested == []
        array.read(block.rows, block.cols)
        assert len(requested) == 1  # the spy does see reads


def test_a_place_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match="nothing was written"):
        Store.open_or_create(str(tmp_path))
    with pytest.raises(StoreError, match="is a file"):
        Store.open_or_create(str(tmp_path / "thesis.txt"))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_runs_that_begin_at_once_agree_on_one_store(tmp_path: Path) -> None:
    at_once = 8
    together = threading.Barrier(at_once)

    def begin(folder: Path) -> None:
        together.wait()
        Store.open_or_create(str(folder)).add_slide(SLIDE)

    with ThreadPoolExecutor(at_once) as pool:
        for number in range(40):
            list(pool.map(begin, [tmp_path / str(number)] * at_once))
            assert Store.open(str(tmp_path / str(number))).slide_ids() == [SLIDE.slide_id]


def test_a_run_killed_while_it_made_the_store_does_not_lock_the_place(tmp_path: Path) -> None:
    (tmp_path / "zarr.json.4711.partial").write_text("{")
    Store.open_or_create(str(tmp_path))
    assert Store.open(str(tmp_path)).slide_ids() == []


def test_old_leftovers_are_swept_below_a_folder_and_above_it(tmp_path: Path) -> None:
    location, array = Location(str(tmp_path)), tmp_path / "slide" / "grid" / "array"
    (array / "c").mkdir(parents=True)
    folders = [tmp_path, array.parent.parent, array.parent, array, array / "c"]
    for folder in folders:
        for name in ("old.partial", "young.partial", "old.json"):
            (folder / name).write_bytes(b"half")
            if name.startswith("old"):
                os.utime(folder / name, (time.time() - 86400,) * 2)
    assert location.sweep_partials("slide/grid/array") == 4
    assert location.sweep_partials("slide/grid/array") == 0
    assert location.sweep_partials("slide/grid/none yet") == 0
    assert (tmp_path / "old.partial").exists()
    for folder in folders:
        assert {"young.partial", "old.json"} <= {path.name for path in folder.iterdir()}


def test_a_place_that_holds_nothing_is_not_a_store(tmp_path: Path) -> None:
    with pytest.raises(StoreNotFoundError, match="histosge embed"):
        Store.open(str(tmp_path / "missing"))


def test_a_store_of_a_newer_version_is_refused(tmp_path: Path) -> None:
    store = Store.open_or_create(str(tmp_path / "s"))
    document = store.location.read_json("zarr.json")
    assert document is not None
    document["attributes"]["version"] = 99
    store.location.write_json("zarr.json", document)
    with pytest.raises(StoreError, match="99"):
        Store.open(str(tmp_path / "s"))


@pytest.mark.parametrize(
    ("url", "safe"),
    [
        ("s3://key:secret@bucket/a", "s3://bucket/a"),
        ("https://host/a?X-Signature=abc", "https://host/a"),
        ("folder/a?b", "folder/a?b"),
    ],
)
def test_credentials_are_never_shown(url: str, safe: str) -> None:
    assert Location(url).label == safe


def test_a_url_that_was_made_a_path_is_refused_before_anything_is_written() -> None:
    with pytest.raises(StoreError, match=r"s3:/bucket/store .* give it as a string"):
        Store.open_or_create(Path("s3://bucket/store"))
