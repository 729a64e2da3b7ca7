"""What goes wrong in one slide, in its file or in its part of the store, costs that slide and no other."""

import gc
import os
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from distributed import Client
from make_slides import tissue_like, write_pyramid

from featurestore import EmbedSettings, GridSpec, catalogue, embed, validate
from featurestore.analysis.patch_stream import open_stream
from featurestore.embedding import slide_watch
from featurestore.embedding.dask_clients import local_client
from featurestore.embedding.dask_cluster import embed_on_cluster
from featurestore.embedding.slide_result import SlideResult
from featurestore.embedding.slide_watch import SlideWatch
from featurestore.embedding.worker import EncoderPool, SharedEncoder
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import IdentityMismatchError, SlideError
from featurestore.events import Progress, ignore_progress
from featurestore.location import Location
from featurestore.slides.fingerprint import slide_fingerprint
from featurestore.slides.sample_sheet import read_samples
from featurestore.storage.removal import remove
from featurestore.storage.zarr_metadata import consolidate, write_group

SETTINGS = EmbedSettings(("colour",), GridSpec(1.0, 32, 32), block_shape=(5, 7))
IDS = ("a", "b", "c")

Run = Callable[..., list[SlideResult]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    for seed, name in enumerate((*IDS, "other")):
        write_pyramid(folder / f"{name}.tif", tissue_like(400, 360, 1.0, seed), 1.0)
    return folder


@pytest.fixture
def slides(made: Path, tmp_path: Path) -> Path:
    """Three slides that a test may replace."""
    (tmp_path / "slides").mkdir()
    for name in IDS:
        shutil.copy(made / f"{name}.tif", tmp_path / "slides")
    return tmp_path / "slides"


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with local_client(1) as connected:
        yield connected


@pytest.fixture(params=["here", "worker"])
def run(request: pytest.FixtureRequest) -> Run:
    """Embed in this process, and by a worker."""
    if request.param == "here":
        return embed
    connected = request.getfixturevalue("client")

    def on_worker(
        samples: Path,
        store: Path,
        settings: EmbedSettings,
        on_progress: Callable[[Progress], None] = ignore_progress,
    ) -> list[SlideResult]:
        return embed_on_cluster(connected, read_samples(str(samples)), str(store), settings, on_progress)

    return on_worker


def _states(results: list[SlideResult]) -> dict[str, str]:
    return {result.slide_id: result.state for result in results}


def _objects(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("embedding/c/*/*/0")}


def _replace(target: Path, source: Path) -> None:
    shutil.copy(source, target.with_suffix(".new"))
    target.with_suffix(".new").replace(target)


def test_a_slide_that_the_store_holds_from_another_file_fails_and_the_others_are_embedded(
    slides: Path, made: Path, tmp_path: Path, run: Run
) -> None:
    store = tmp_path / "store"
    embed(slides / "b.tif", store, SETTINGS)
    before = _objects(store)
    _replace(slides / "b.tif", made / "other.tif")
    results = run(slides, store, SETTINGS)
    assert _states(results) == {"a": "done", "b": "failed", "c": "done"}
    assert "is stored with fingerprint" in results[1].reason
    reasons = {row["slide"]: row["reason"] for row in catalogue(store).to_dicts() if row["state"] == "failed"}
    assert reasons == {"b": results[1].reason}
    assert {name: data for name, data in _objects(store).items() if name.startswith("b/")} == before
    # All of a run's slides: that is a mistaken command, and the store does not call what it holds failed.
    with pytest.raises(
        IdentityMismatchError, match=r"tissue by 'texture', now it is 'none'.*and 1 slide more"
    ):
        run(_sheet(slides, "a", "c"), store, replace(SETTINGS, tissue="none"))
    assert catalogue(store).filter(slide="a")["state"].to_list() == ["done"]
    _replace(slides / "b.tif", made / "b.tif")
    assert _states(run(slides, store, SETTINGS)) == dict.fromkeys(IDS, "done")
    assert "failed" not in catalogue(store)["state"].to_list()


def _sheet(slides: Path, *names: str) -> Path:
    sheet = slides / "sheet.csv"
    sheet.write_text("\n".join(["slide", *(f"{name}.tif" for name in names)]))
    return sheet


def test_a_damaged_document_costs_the_slide_that_it_belongs_to(
    slides: Path, tmp_path: Path, run: Run
) -> None:
    store = tmp_path / "store"
    embed(_sheet(slides, "b"), store, SETTINGS)
    (store / "b" / SETTINGS.spec.key / "zarr.json").write_text('{"zarr_format": 3, "attri')
    results = run(_sheet(slides, *IDS), store, SETTINGS)
    assert _states(results) == {"a": "done", "b": "failed", "c": "done"}
    assert "is damaged" in results[1].reason


def test_a_slide_that_needs_more_memory_than_there_is_costs_itself(slides: Path, tmp_path: Path) -> None:
    def fail(progress: Progress) -> None:
        if progress.label == "b":
            raise MemoryError("Unable to allocate 8 EiB")

    results = embed(slides, tmp_path / "store", SETTINGS, on_progress=fail)
    assert _states(results) == {"a": "done", "b": "failed", "c": "done"}
    assert "too little memory for it (Unable to allocate 8 EiB)" in results[1].reason


def test_a_file_that_is_replaced_while_it_is_embedded_is_noticed_and_never_mixed(
    slides: Path, made: Path, tmp_path: Path, run: Run
) -> None:
    embed(slides, tmp_path / "whole", SETTINGS)

    def swap(progress: Progress) -> None:
        if progress.label == "b" and progress.done == 1:
            _replace(slides / "b.tif", made / "other.tif")

    store = tmp_path / "store"
    # Blocks of one row of patches: more of them than are computed before the first result comes back.
    settings = replace(SETTINGS, block_shape=(1, 2))
    embed(slides, tmp_path / "whole", settings)
    results = run(_sheet(slides, "b"), store, settings, on_progress=swap)
    assert _states(results) == {"b": "failed"}
    assert "b.tif was changed while it was embedded: its fingerprint was" in results[0].reason
    _replace(slides / "b.tif", made / "b.tif")
    embed(slides / "b.tif", tmp_path / "undisturbed", settings)
    undisturbed, stored = _objects(tmp_path / "undisturbed"), _objects(store)
    assert 0 < len(stored) < len(undisturbed)
    assert stored.items() <= undisturbed.items()


def test_a_slide_that_is_removed_while_it_is_embedded_fails_and_is_whole_after_the_next_run(
    slides: Path, tmp_path: Path, run: Run
) -> None:
    store, taken = tmp_path / "store", []

    def take(progress: Progress) -> None:
        if progress.label == "b" and not taken:
            taken.append(remove(store, "b", None, None))

    results = run(_sheet(slides, *IDS), store, SETTINGS, on_progress=take)
    assert _states(results) == {"a": "done", "b": "failed", "c": "done"}
    assert f"b/{SETTINGS.spec.key}/colour was removed while it was embedded (" in results[1].reason
    assert results[1].reason.endswith("run the same command again")
    assert _states(run(_sheet(slides, *IDS), store, SETTINGS)) == dict.fromkeys(IDS, "done")
    assert validate(store, deep=True) == []
    embed(_sheet(slides, *IDS), tmp_path / "undisturbed", SETTINGS)
    assert _objects(store) == _objects(tmp_path / "undisturbed")


def test_blocks_that_were_written_after_their_array_was_removed_do_not_count_as_done(
    slides: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    (first,) = embed(_sheet(slides, "a"), store, SETTINGS)
    expected = _objects(store)
    for name in expected:  # as a run writes them that was begun with another encoder
        (store / name).write_bytes(b"\0" * len(expected[name]))
    (store / "a" / SETTINGS.spec.key / "colour" / "embedding" / "zarr.json").unlink()
    (second,) = embed(_sheet(slides, "a"), store, SETTINGS)
    assert second.computed == first.planned
    assert _objects(store) == expected


def test_a_change_is_noticed_however_a_slide_is_replaced(
    slides: Path, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = slides / "a.tif"
    watch, fingerprint = SlideWatch(str(path)), slide_fingerprint(str(path))
    watch.check_since_opened()
    watch.check(fingerprint)
    os.utime(path, (1, 1))  # its date says nothing of its content
    watch.check(fingerprint)
    path.write_bytes((made / "other.tif").read_bytes())
    with pytest.raises(SlideError, match="was changed while it was embedded"):
        watch.check(fingerprint)
    with pytest.raises(SlideError, match="was changed while it was opened"):
        watch.check_since_opened()
    path.unlink()
    with pytest.raises(SlideError, match="there is no slide"):
        watch.check(fingerprint)
    # A folder has no date of its own content: it is looked at again after a time.
    folder = slides / "f.zarr"
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "c").write_bytes(b"1234")
    watch, fingerprint = SlideWatch(str(folder)), slide_fingerprint(str(folder))
    watch.check(fingerprint)
    (folder / "0" / "c").write_bytes(b"12345")
    watch.check(fingerprint)
    monkeypatch.setattr(slide_watch, "RECHECK_S", 0.0)
    with pytest.raises(SlideError, match="was changed while it was embedded"):
        watch.check(fingerprint)


def test_encoders_of_earlier_runs_do_not_stay_in_a_workers_memory(
    slides: Path, tmp_path: Path, client: Client
) -> None:
    def count() -> int:
        gc.collect()
        return sum(isinstance(held, SharedEncoder) for held in gc.get_objects())

    samples = read_samples(str(_sheet(slides, "a")))
    for number in range(3):
        settings = replace(SETTINGS, encoders=("colour", "morphology") if number == 1 else ("colour",))
        embed_on_cluster(client, samples, str(tmp_path / f"{number}"), settings, ignore_progress)
    assert list(client.run(count).values()) == [1]


def test_encoders_are_released_before_those_of_the_next_run_are_loaded_and_not_while_they_are_used() -> None:
    class Encoder:
        identity = EncoderIdentity("none", 1, {})

        def encode(self, patches: np.ndarray) -> np.ndarray:
            return np.zeros((len(patches), 1), np.float32)

    pool, held = EncoderPool(), weakref.WeakSet()

    def load() -> dict[str, Encoder]:
        at_once.append(len(held))
        encoder = Encoder()
        held.add(encoder)
        return {"none": encoder}

    at_once: list[int] = []
    for run in ("first", "second", "third"):
        for _ in range(2):
            with pool.acquire(run, load) as encoders:
                assert encoders["none"].encode(np.zeros((3, 2, 2, 3), np.uint8)).shape == (3, 1)
            del encoders
    assert at_once == [0, 0, 0], "each is gone before the next is loaded, and each is loaded once"
    # Two runs that take turns keep theirs: the one that comes back does not push the other out.
    with pool.acquire("third", load), pool.acquire("fourth", load):
        assert len(held) == 2
    for run in ("third", "fourth", "third", "fourth"):
        with pool.acquire(run, load):
            pass
    assert at_once == [0, 0, 0, 1]


def test_two_runs_at_once_add_their_encoders_to_one_store(slides: Path, tmp_path: Path) -> None:
    store, begun = tmp_path / "store", threading.Barrier(2)

    def add(encoder: str) -> list[SlideResult]:
        begun.wait(60)
        return embed(slides, store, replace(SETTINGS, encoders=(encoder,)))

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(add, ("colour", "morphology")))
    assert [_states(of_run) for of_run in results] == [dict.fromkeys(IDS, "done")] * 2
    assert validate(store, deep=True) == []
    embed(slides, tmp_path / "undisturbed", replace(SETTINGS, encoders=("colour", "morphology")))
    assert _objects(store) == _objects(tmp_path / "undisturbed")
    # What a slide's own document lists is what training finds.
    for encoder in ("colour", "morphology"):
        assert open_stream(store, encoder=encoder).skipped == ()


def test_metadata_that_another_run_adds_at_the_same_moment_is_not_lost(tmp_path: Path) -> None:
    class Racing(Location):
        def write_json(self, relative: str, value: dict[str, object]) -> None:
            super().write_json(relative, value)
            if not self.exists("S/grid/second/zarr.json"):  # between our listing and its end
                write_group(Location(self.url), "S/grid/second", {})

    location = Racing(str(tmp_path / "store"))
    for path in ("S", "S/grid", "S/grid/first"):
        write_group(Location(location.url), path, {})
    consolidate(location, "S")
    document = location.read_json("S/zarr.json")
    assert document is not None
    assert list(document["consolidated_metadata"]["metadata"]) == ["grid", "grid/first", "grid/second"]
