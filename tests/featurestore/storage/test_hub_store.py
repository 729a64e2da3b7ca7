"""Stores on the hub, read from a small server with its protocol: as from a local folder, and refused in one line."""

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from _stores import SPEC, Made, write_store
from hub_server import BRANCH, COMMIT, LATER, TOKEN, Hub, serving_hub

from featurestore.analysis.slide_source import EmbeddingSource
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import AccessError, SlideError, StoreError, StoreNotFoundError
from featurestore.file_systems import anonymous_access, open_file_system
from featurestore.location import Location, store_location
from featurestore.object_stores.hub_place import HubPlace
from featurestore.slides.open_slide import open_slide
from featurestore.storage.catalogue import catalogue
from featurestore.storage.removal import remove
from featurestore.storage.store import Store
from featurestore.storage.tree import open_store
from featurestore.storage.validation import validate

MADE = Made((19, 23), 11, (7, 11), frame=2)
URL = "hf://datasets/lab/cohort"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stores")
    write_store(folder / "store", 2, MADE)
    write_store(folder / "later", 2, MADE, seed=1)
    return folder


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "kept"))
    with serving_hub(monkeypatch, tmp_path / "cache") as found:
        found.add_folder("datasets/lab/cohort", folder / "store")
        found.add_folder("datasets/lab/cohort", folder / "later", commit=LATER)
        found.add_folder("datasets/lab/several", folder / "store", "breast/2026/")
        yield found


def _values(url: str | Path, slide_id: str = "S01") -> np.ndarray[Any, Any]:
    return np.asarray(open_store(str(url))[f"{slide_id}/{SPEC.key}/random"]["embedding"].values)


@pytest.mark.parametrize(
    "url",
    [
        URL,
        f"{URL}/",
        f"{URL}@v2",
        f"{URL}@{COMMIT}",
        f"{URL}@{BRANCH}",
        f"{URL}@refs%2Fpr%2F3",
        "hf://datasets/lab/several/breast/2026",
        f"hf://datasets/lab/several@{COMMIT}/breast/2026/",
    ],
)
def test_a_store_on_the_hub_is_the_one_that_was_uploaded(hub: Hub, folder: Path, url: str) -> None:
    assert np.array_equal(_values(url), _values(folder / "store"), equal_nan=True)
    assert {line.split(" ")[0] for line in hub.requests} <= {"GET", "POST"}


def test_listings_and_checks_are_those_of_the_folder(hub: Hub, folder: Path) -> None:
    hub.page = 3  # several pages of each listing
    # The hub's listings say nothing of when a file was written.
    assert catalogue(URL).drop("modified").equals(catalogue(folder / "store").drop("modified"))
    assert validate(URL) == validate(folder / "store") == []
    assert store_location(URL).sizes() == Location(folder / "store").sizes()
    found = store_location(URL)
    assert found.folders("S00") == [SPEC.key]
    assert found.files("S00") == ["zarr.json"]
    assert found.folders("none") == []
    assert found.exists("S00")
    assert found.is_file("S00/zarr.json")
    assert not found.exists("S00/none")


def test_each_block_is_one_request(hub: Hub) -> None:
    array = Store.open(URL).embedding("S00", SPEC.key, "random")
    hub.requests.clear()
    blocks = Store.open(URL).grid("S00", SPEC.key).planned(MADE.block)
    hub.requests.clear()
    for block in blocks:
        assert array.read_block(block).shape[:2] == block.shape
    assert len(hub.requests) == len(blocks)
    assert len(set(hub.requests)) == len(blocks)


@pytest.mark.parametrize(
    ("start", "end"),
    [(None, None), (3, 11), (7, None), (None, 5), (-13, None), (0, 1), (5, 10**6), (10**6, None)],
)
@pytest.mark.parametrize("answers", ["part", "whole file", "redirect"])
def test_a_part_of_a_file_is_that_part(hub: Hub, start: int | None, end: int | None, answers: str) -> None:
    hub.has_ranges, hub.redirects = answers != "whole file", answers == "redirect"
    data = bytes(range(101))
    hub.add("datasets/lab/cohort", "a file", data)
    fs, path = open_file_system(URL, schemes=["hf"])
    assert fs.cat_file(f"{path}/a file", start=start, end=end) == data[start:end]
    assert len(hub.seen("/resolve/")) == 1


@pytest.mark.parametrize(
    ("url", "status", "code", "message"),
    [
        ("hf://datasets/lab/gone", 200, "", r"404 RepoNotFound .*check the name, and run hf auth login"),
        (f"hf://datasets/lab/gone@{COMMIT}", 200, "", "404 RepoNotFound"),
        (f"{URL}@v9", 200, "", r"404 RevisionNotFound .*name a branch, a tag or a commit"),
        (f"{URL}@{'1' * 40}", 200, "", "404 RevisionNotFound"),
        (URL, 401, "RepoNotFound", "401 RepoNotFound.*hf auth login"),
        (URL, 401, "", "answers 401.*HF_TOKEN"),
        (URL, 403, "GatedRepo", "403 GatedRepo.*accept its terms"),
        (URL, 404, "", "answers 404"),
        (URL, 503, "", "answers 503.*run the same command again"),
        (URL, 429, "", "answers 429.*run the same command again"),
    ],
)
def test_what_the_hub_refuses_is_one_line_without_the_token(
    hub: Hub, url: str, status: int, code: str, message: str
) -> None:
    hub.status, hub.code, hub.message = status, code, f"Not for {TOKEN}   at all"
    if status == 200:
        hub.message = ""
    for opened in (Store.open, open_store, validate, catalogue):
        with pytest.raises(AccessError, match=message) as refused:
            opened(url)
        assert "\n" not in str(refused.value)
        assert TOKEN not in str(refused.value)


@pytest.mark.parametrize("url", [f"{URL}/none", "hf://datasets/lab/several"])
def test_a_folder_without_a_store_is_none(hub: Hub, url: str) -> None:
    with pytest.raises(
        (StoreNotFoundError, StoreError), match=r"no store at|not a feature store|is no feature store"
    ):
        Store.open(url)


@pytest.mark.parametrize(
    "url",
    [
        "hf://lab/cohort",
        "hf://datasets/lab",
        f"{URL}/../x",
        "hf://spaces/lab/x",
        f"{URL}?a=b",
        "hf://buckets/lab/x",
    ],
)
def test_other_addresses_are_refused_with_the_form(hub: Hub, url: str) -> None:
    with pytest.raises(StoreError, match="a store on the hub is hf://datasets/OWNER/NAME") as refused:
        Store.open(url)
    assert "\n" not in str(refused.value)
    assert hub.requests == []


def test_a_block_that_the_server_refuses_is_no_missing_block(hub: Hub) -> None:
    store = Store.open(URL)
    array = store.embedding("S00", SPEC.key, "random")
    block = store.grid("S00", SPEC.key).planned(MADE.block)[0]
    hub.status = 404  # without a code: not that there is no such file
    with pytest.raises(AccessError, match="answers 404"):
        array.read_block(block)


def test_busy_servers_are_asked_again(hub: Hub, folder: Path) -> None:
    hub.failures = [503, 429, 500]
    assert np.array_equal(_values(URL), _values(folder / "store"), equal_nan=True)
    assert hub.failures == []


def test_a_run_reads_one_commit_while_the_branch_moves(hub: Hub, folder: Path) -> None:
    store, source = Store.open(URL), EmbeddingSource(URL)
    hub.revisions["main"] = LATER
    assert COMMIT in store.location.url
    before = _values(folder / "store")
    assert not np.array_equal(before, _values(folder / "later"), equal_nan=True)
    # Opened before or after the move, here or where another process unpickles it: the same commit.
    assert np.array_equal(_values(URL), before, equal_nan=True)
    assert f"@{COMMIT}".encode() in pickle.dumps(source)
    assert not hub.seen(LATER)
    assert len(hub.seen("/revision/main")) == 1
    assert np.array_equal(_values(f"{URL}@{LATER}"), _values(folder / "later"), equal_nan=True)


def test_a_listing_that_goes_on_elsewhere_is_refused(hub: Hub) -> None:
    place = store_location(URL)
    hub.page, hub.url = 2, "http://elsewhere.invalid"
    with pytest.raises(AccessError, match="goes on at another server"):
        place.sizes()


def test_the_token_is_sent_where_access_is_not_anonymous(hub: Hub) -> None:
    Store.open(URL)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    hub.tokens.clear()
    with anonymous_access():
        Store.open(URL)
    assert hub.tokens == {None}


def test_the_token_is_not_sent_on_to_another_host(hub: Hub, folder: Path) -> None:
    hub.redirects = True
    assert np.array_equal(_values(URL), _values(folder / "store"), equal_nan=True)
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert hub.tokens_elsewhere == {None}


def test_nothing_is_written_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    sheet = tmp_path / "none.csv"  # not there: the place is refused before it is read
    for write in (
        lambda: Store.open_or_create(URL),
        lambda: embed(sheet, URL, EmbedSettings()),
        lambda: remove(URL, "S00", None, None),
    ):
        with pytest.raises(StoreError, match="is read-only: nothing is written to the hub") as refused:
            write()
        assert "\n" not in str(refused.value)
    assert hub.requests == []
    place = store_location(URL)
    for change in (lambda: place.write_json("a.json", {}), lambda: place.remove("S00")):
        with pytest.raises(AccessError, match="only read"):
            change()
    assert remove(URL, "S00", None, None, dry_run=True) == ["S00"]
    assert {line.split(" ")[0] for line in hub.requests} <= {"GET", "POST"}


def test_what_a_store_names_is_not_opened_on_the_hub(hub: Hub) -> None:
    for slide in (f"{URL}/a.tif", f"{URL}/a.ome.zarr"):
        with pytest.raises(SlideError, match="is not opened: a URL begins with one of"):
            open_slide(slide)
    for refused in (
        lambda: Location(URL).read_bytes("a"),
        lambda: Location(URL).zarr(),
        lambda: open_file_system(URL),
    ):
        with pytest.raises(StoreError, match="is not opened: a URL begins with one of"):
            refused()
    assert hub.requests == []


def test_the_place_reads_back() -> None:
    for url in (URL, f"{URL}@v2/a/b", f"{URL}@{COMMIT}"):
        assert HubPlace.parse(url).url == url
    assert HubPlace.parse(f"{URL}@feature%2Fx/a") == HubPlace("lab/cohort", "feature/x", "a")
    assert HubPlace.parse(f"{URL}@{BRANCH}/a").revision == BRANCH
    assert HubPlace.parse(URL).at(COMMIT).is_fixed


def test_the_command_line_lists_and_checks(
    hub: Hub, histosge: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    code, out, _ = histosge("ls", URL)
    assert (code, "S00" in out, "S01" in out) == (0, True, True)
    assert histosge("validate", URL)[0] == 0
    hub.requests.clear()
    for arguments in (
        ("rm", URL, "--slide", "S00"),
        ("embed", tmp_path, URL),
        ("predict", URL, tmp_path / "model", f"{URL}/maps"),
        ("train", tmp_path / "sheet.csv", URL, "hf://lab/model"),
        ("export", URL, "hf://lab/out", "--to", "h5ad"),
    ):
        code, out, err = histosge(*arguments)
        assert (code, "read-only: nothing is written to the hub" in err) == (2, True), (arguments, err)
        assert len(err.strip().splitlines()) == 1
    assert hub.requests == []
