"""A server that refuses, cuts or redirects in the middle of a run: one line, nothing lost, and the next run goes on."""

import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import s3fs
import zarr
from _s3 import KEY, SECRET, Proxy, Reply, environment, serving
from make_slides import tissue_like, write_pyramid
from running import contents

from featurestore import file_systems
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import AccessError, FeatureStoreError, StoreError
from featurestore.grid import GridSpec
from featurestore.location import Location
from featurestore.storage.catalogue import catalogue
from featurestore.storage.store import Store
from featurestore.storage.tree import open_store
from featurestore.storage.validation import validate

pytestmark = [
    pytest.mark.s3,
    # zarr (3.1) starts several writes and awaits none of the others once one was refused.
    pytest.mark.filterwarnings("ignore:.*coroutine:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]
MPP = 2.0
URL = "s3://test/store"
SETTINGS = EmbedSettings(("colour",), GridSpec(MPP, 32, 32), block_shape=(7, 5))
REFUSALS = (
    Reply(403, "ExpiredToken"),
    Reply(400, "ExpiredToken"),
    Reply(403, "AccessDenied"),
    Reply(403, "RequestTimeTooSkewed"),
    Reply(403, "SignatureDoesNotMatch"),
    Reply(403, "InvalidAccessKeyId"),
    Reply(401, "Unauthorized"),
    Reply(301, "PermanentRedirect"),
    Reply(307, "TemporaryRedirect"),
    Reply(400, "AuthorizationHeaderMalformed"),
    Reply(404, "NoSuchBucket"),
    Reply(405, "MethodNotAllowed"),
    Reply(409, "OperationAborted"),
    Reply(412, "PreconditionFailed"),
    Reply(416, "InvalidRange"),
    Reply(500, "InternalError"),
    Reply(501, "NotImplemented"),
    Reply(507, "InsufficientStorage"),
    Reply(400, "KeyTooLongError"),
    Reply(200, body=b"<html><body>Please log in</body></html>"),
    "half",
    "empty",
)
"""22 kinds of replies."""
AFTER = (0, 5, 12, 22)
"""Requests that are answered as they should be before all others are refused."""


class Place:
    """A bucket behind a proxy that refuses."""

    def __init__(self, folder: Path, proxy: Proxy, slide: Path) -> None:
        self.folder, self.proxy, self.slide = folder, proxy, slide

    def refuse(self, reply: Any, after: int, only: str = "") -> None:
        self.proxy.reset()
        self.proxy.fault = lambda number, _, path: reply if number > after and only in path else None

    def answer(self) -> None:
        self.proxy.fault = None


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("refused")
    with serving(folder / "objects") as server, pytest.MonkeyPatch.context() as patch:
        proxy = Proxy(server.port)
        for name, value in environment(proxy.port).items():
            patch.setenv(name, value)
        patch.setenv("HISTOSGE_BLOCK_CACHE_GB", "0")
        # The client's own repeats would take seconds for each of some hundred refusals.
        patch.setattr(file_systems, "S3_TRIES", 1)
        s3fs.S3FileSystem.clear_instance_cache()
        slide = write_pyramid(folder / "S1.tif", tissue_like(700, 600, MPP), MPP)
        made = Place(folder / "objects" / "test" / "store", proxy, slide)
        assert embed(str(slide), URL, SETTINGS)[0].state == "done"
        yield made
        proxy.close()
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(autouse=True)
def answering(place: Place) -> Iterator[None]:
    yield
    place.answer()


def _assert_one_line(error: FeatureStoreError) -> None:
    text = str(error)
    assert "\n" not in text
    assert "s3://test/" in text or "embed" in text
    assert SECRET not in text
    assert KEY not in text


def _read_blocks() -> list[Any]:
    from histosge.data.loader import Loader, LoadSettings

    return [batch.embedding for batch in Loader(URL, settings=LoadSettings(batch=50, seed=1)).epoch(0)]


def _read_tree() -> list[Any]:
    tree = open_store(URL)
    return [np.asarray(node.tissue) for node in tree.subtree if "tissue" in node]


def _export(folder: Path) -> list[Any]:
    import polars as pl

    from histosge.exporting.export import export
    from histosge.exporting.open_tables import ExportSelection

    out = folder / "out.parquet"
    out.unlink(missing_ok=True)
    try:
        export(URL, out, "parquet", ExportSelection(()))
    except FeatureStoreError:
        assert not out.exists()
        raise
    return [pl.read_parquet(out).to_numpy()]


READS: dict[str, Callable[[Path], list[Any]]] = {
    "ls": lambda _: [catalogue(URL).drop("modified").to_dicts()],
    "validate": lambda _: [validate(URL, deep=True)],
    "open_store": lambda _: _read_tree(),
    "loader": lambda _: _read_blocks(),
    "export": _export,
}


@pytest.mark.parametrize(
    ("name", "replies"),
    [
        *(pytest.param(name, REFUSALS[::3], id=name) for name in ("ls", "export")),
        *(pytest.param(name, REFUSALS, marks=pytest.mark.slow, id=f"{name}-all") for name in READS),
    ],
)
def test_reading_is_refused_in_one_line_or_right(
    name: str, replies: tuple[Any, ...], place: Place, tmp_path: Path
) -> None:
    read = READS[name]
    expected = read(tmp_path)
    refused = 0
    for reply in replies:
        for after in AFTER:
            place.refuse(reply, after)
            try:
                found = read(tmp_path)
            except FeatureStoreError as error:
                _assert_one_line(error)
                refused += 1
            else:
                if name == "validate" and isinstance(reply, (str, Reply)) and found != expected:
                    assert "damaged" in str(found)  # what came was damaged: it says where
                    continue
                assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True)), reply
    assert refused > len(replies)
    place.answer()
    assert all(np.array_equal(a, b) for a, b in zip(read(tmp_path), expected, strict=True))


@pytest.mark.parametrize(
    ("after", "replies"),
    [
        (12, REFUSALS[::5]),
        *(pytest.param(after, REFUSALS, marks=pytest.mark.slow, id=f"{after}-all") for after in AFTER[1:]),
    ],
)
def test_writing_is_refused_in_one_line_and_the_same_command_goes_on(
    place: Place, after: int, replies: tuple[Any, ...]
) -> None:
    expected = contents(place.folder)
    for number, reply in enumerate(replies):
        url, folder = f"s3://test/s{after}-{number}", place.folder.parent / f"s{after}-{number}"
        place.refuse(reply, after)
        try:
            results = embed(str(place.slide), url, SETTINGS)
        except FeatureStoreError as error:
            _assert_one_line(error)
        else:
            assert results[0].state in ("done", "failed")
        place.answer()
        before = {name: data for name, data in contents(folder).items() if "/embedding/c/" in name}
        assert embed(str(place.slide), url, SETTINGS)[0].state == "done"
        now = contents(folder)
        assert {name: now[name] for name in before} == before
        assert {name: data for name, data in now.items() if "_failures" not in name} == expected
        shutil.rmtree(folder)


def test_a_block_that_came_cut_once_is_requested_again(place: Place) -> None:
    expected = _read_blocks()
    for kind in ("half", "empty"):
        seen: set[str] = set()

        def cut_first(
            number: int, method: str, path: str, kind: str = kind, seen: set[str] = seen
        ) -> str | None:
            is_new = method == "GET" and "/embedding/c/" in path and path not in seen
            seen.add(path)
            return kind if is_new else None

        place.proxy.reset()
        place.proxy.fault = cut_first
        assert all(np.array_equal(a, b) for a, b in zip(_read_blocks(), expected, strict=True))
        assert place.proxy.faults


def test_a_bucket_that_is_gone_is_no_missing_block(place: Place) -> None:
    array = Store.open(URL).embedding("S1", SETTINGS.spec.key, "colour")
    block = Store.open(URL).grid("S1", SETTINGS.spec.key).planned(array.block_shape)[0]
    place.refuse(Reply(404, "NoSuchBucket"), 0, only="/embedding/c/")
    for read in (lambda: array.read_block(block), lambda: array.read(block.rows, block.cols)):
        with pytest.raises(
            AccessError, match=r"404 NoSuchBucket .* check the bucket's name and AWS_ENDPOINT_URL"
        ):
            read()
    place.refuse(Reply(404, "NoSuchKey"), 0, only="/embedding/c/")
    assert np.isnan(array.read_block(block)).all()


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        (Reply(403, "ExpiredToken"), "renew the credentials"),
        (Reply(403, "AccessDenied"), "AWS_ACCESS_KEY_ID .* AWS_PROFILE; AWS_ENDPOINT_URL .* --anonymous"),
        (Reply(403, "SignatureDoesNotMatch"), "check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"),
        (Reply(403, "RequestTimeTooSkewed"), "clock"),
        (Reply(301, "PermanentRedirect"), "AWS_DEFAULT_REGION"),
        (Reply(507, "InsufficientStorage"), "make room there"),
        (Reply(500, "InternalError"), "run the same command again"),
    ],
)
def test_each_refusal_names_what_to_set(place: Place, reply: Reply, said: str) -> None:
    place.refuse(reply, 0)
    with pytest.raises(AccessError) as refused:
        Location(URL).read_json("zarr.json")
    assert re.search(said, str(refused.value)), refused.value
    assert refused.value.is_transient == (reply.status == 500)
    with pytest.raises(AccessError):
        Location(URL).write_json("x.json", {})
    with pytest.raises(StoreError):
        Store.open(URL)


def test_a_slide_whose_server_refuses_midway_fails_whole_and_is_read_by_the_next_run(
    place: Place, tmp_path: Path
) -> None:
    key = "test/slides/S1.tif"
    fsspec.filesystem("s3").put_file(str(place.slide), key)
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"slide_id,slide\nS1,s3://{key}\n")
    refused = 0
    for after in range(0, 14, 2):
        place.refuse(Reply(403, "ExpiredToken"), after, only="slides/S1")
        (result,) = embed(str(sheet), str(tmp_path / str(after)), SETTINGS)
        # A patch that could not be fetched may be whole: none is recorded as unreadable.
        assert (result.state, result.unreadable) in (("failed", 0), ("done", 0))
        refused += result.state == "failed"
        place.answer()
        (result,) = embed(str(sheet), str(tmp_path / str(after)), SETTINGS)
        assert result.state == "done", result.reason
        made = contents(tmp_path / str(after))
        undisturbed = contents(place.folder)
        blocks = {name for name in undisturbed if "/embedding/c/" in name}
        assert {name: made[name] for name in blocks} == {name: undisturbed[name] for name in blocks}
    assert refused >= 2


def test_creating_an_array_never_writes_the_documents_of_groups_above_it(place: Place) -> None:
    # zarr looks first and writes then, also after its call was refused: another run's document would be replaced.
    written: list[str] = []
    place.proxy.reset()
    place.proxy.fault = lambda _, method, path: written.append(path) if method == "PUT" else None
    zarr.create_array(Location("s3://test/parents").zarr(), name="S1/grid/y", data=np.ones(3))
    names = [path.partition("?")[0].removeprefix("/test/parents/") for path in written]
    assert sorted(names) == ["S1/grid/y/c/0", "S1/grid/y/zarr.json"]
