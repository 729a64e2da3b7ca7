"""`histosge embed` and its options, as a user types them."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid

from featurestore.storage.store import Store
from featurestore.storage.validation import validate

Histosge = Callable[..., NamedTuple]
MPP = 0.5
NETWORK = ("--encoder", "timm:test_vit", "--random-weights", "--device", "cpu", "--patch", 160)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")

FLAKY = """
from pathlib import Path
import numpy as np
from featurestore.encoders.protocol import EncoderIdentity

STATE = Path(__file__).with_name("fails")


class Flaky:
    def __init__(self, key):
        self.identity = EncoderIdentity(key, 2, {"algorithm": "no vector for the first patch, if told to fail"})
        self.seen = 0

    def encode(self, patches):
        vectors = patches.reshape(len(patches), -1)[:, :2].astype(np.float32)
        if STATE.exists() and not self.seen and len(patches):
            vectors[0] = np.nan
        self.seen += len(patches)
        return vectors


def load(key, options):
    return Flaky(key)
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slide") / "S.tif", tissue_like(900, 700, MPP), MPP)


@pytest.fixture
def fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An encoder of another package, ``flaky``, that fails as long as this file is there."""
    package = tmp_path / "package"
    info = package / "flaky_encoder-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "flaky_encoder.py").write_text(FLAKY)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: flaky-encoder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[histosge.encoders]\nflaky = flaky_encoder:load\n")
    monkeypatch.syspath_prepend(package)
    monkeypatch.delitem(sys.modules, "flaky_encoder", raising=False)  # another test's, with a file of its own
    file = package / "fails"
    file.write_text("")
    return file


def _row(histosge: Histosge, store: Path) -> dict[str, object]:
    (row,) = json.loads(histosge("ls", store, "--json").out)
    return row


def test_retry_failed_computes_the_blocks_with_failures_again_and_clears_their_records(
    histosge: Histosge, slide: Path, tmp_path: Path, fails: Path
) -> None:
    store = tmp_path / "store"
    command = ("embed", slide, store, "--patch", 64, "--stride", 16, "--encoder", "flaky")
    first = histosge(*command)
    assert first.code == 0
    assert "1 patch could not be read" in first.out
    row = _row(histosge, store)
    assert (row["unreadable"], row["reason"]) == (1, "the encoder gave no finite vector")
    assert row["done"] == row["planned"]
    before = {file: file.stat().st_mtime_ns for file in store.rglob("embedding/c/*/*/*")}
    assert len(before) == row["planned"] > 2

    fails.unlink()
    assert "nothing to do" in histosge(*command).out, "what failed once is left alone unless it is asked for"
    assert _row(histosge, store)["unreadable"] == 1

    again = histosge(*command, "--retry-failed")
    assert again.code == 0
    assert f"S: 1 of {row['planned']} blocks computed" in again.out
    assert "could not be read" not in again.out
    row = _row(histosge, store)
    assert (row["unreadable"], row["reason"], row["done"]) == (0, None, row["planned"])
    assert not list((store / "_failures").rglob("*.json"))
    changed = [file for file, when in before.items() if file.stat().st_mtime_ns != when]
    assert len(changed) == 1
    assert validate(store, deep=True) == []
    assert "nothing to do" in histosge(*command, "--retry-failed").out


@pytest.mark.parametrize("workers", [(), ("--workers", 1)])
def test_what_is_retried_is_what_the_blocks_hold_and_not_what_is_recorded(
    histosge: Histosge, slide: Path, tmp_path: Path, fails: Path, workers: tuple[object, ...]
) -> None:
    store = tmp_path / "store"
    command = ("embed", slide, store, "--patch", 64, "--stride", 16, "--encoder", "flaky")
    assert "1 patch could not be read" in histosge(*command).out
    fails.unlink()
    (record,) = (store / "_failures").rglob("*.json")
    blocks = sorted(store.rglob("embedding/c/*/*/*"))
    damaged = blocks[-1]
    whole = damaged.read_bytes()
    damaged.write_bytes(whole[:100] + bytes([whole[100] ^ 4]) + whole[101:])
    # The failure's record is lost, and another one speaks of a block that is whole.
    record.rename(record.with_name("1.0.json"))
    lying = json.loads(record.with_name("1.0.json").read_text())
    record.with_name("1.0.json").write_text(json.dumps({**lying, "block": [1, 0]}))
    before = {file: file.stat().st_mtime_ns for file in blocks}
    again = histosge(*command, "--retry-failed", *workers)
    assert again.code == 0, again.err
    assert f"S: 2 of {len(blocks)} blocks computed" in again.out
    changed = {file for file, when in before.items() if file.stat().st_mtime_ns != when}
    assert changed == {blocks[0], damaged}
    assert damaged.read_bytes() == whole
    assert not list((store / "_failures").rglob("*.json"))
    assert validate(store, deep=True) == []


def test_compile_without_a_compiler_is_one_line_and_leaves_nothing(
    histosge: Histosge, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    ran = histosge("embed", slide, tmp_path / "store", *NETWORK, "--compile")
    assert (ran.code, ran.out) == (2, "")
    assert "--compile needs a C++ compiler" in ran.err
    assert ran.err.count("\n") == 1
    assert not (tmp_path / "store").exists()


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in parts of torch that torch itself compiles with
def test_a_compiled_network_goes_on_with_a_store_of_an_uncompiled_one(
    histosge: Histosge, slide: Path, tmp_path: Path
) -> None:
    vectors = []
    for name, options in (("plain", ()), ("compiled", ("--compile",))):
        assert histosge("embed", slide, tmp_path / name, *NETWORK, *options).code == 0
        store = Store.open(tmp_path / name)
        (grid,) = store.grid_keys("S")
        array = store.embedding("S", grid, "timm:test_vit")
        vectors.append(array.read((0, array.shape[0]), (0, array.shape[1])).astype(np.float32))
    assert np.isfinite(vectors[0]).any()
    np.testing.assert_allclose(vectors[1], vectors[0], rtol=0, atol=0.01)
    again = histosge("embed", slide, tmp_path / "plain", *NETWORK, "--compile")
    assert "nothing to do" in again.out


def test_the_help_groups_the_options_and_shows_every_default(histosge: Histosge) -> None:
    lines = histosge("embed", "--help").out.splitlines()
    groups = [line.strip("╭─╮ ") for line in lines if line.startswith("╭")]
    assert groups == ["Arguments", "Options", "Grid", "Tissue", "Encoder", "Where to compute", "Output"]
    text = " ".join(line.strip("│ ") for line in lines)
    assert "(default: --patch, no overlap)" in " ".join(text.split())  # brackets would be taken for markup
