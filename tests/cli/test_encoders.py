"""Encoders on the command line: the registry, several at once, vectors that are no numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import polars as pl
import pytest
import torch
from make_slides import tissue_like, write_pyramid

from featurestore.encoders.loading import ENCODERS, load_encoder
from featurestore.encoders.protocol import EncoderOptions
from featurestore.storage.catalogue import catalogue
from featurestore.storage.store import Store

Histosge = Callable[..., NamedTuple]
MPP = 0.5
GRID = ("--mpp", MPP, "--patch", 64, "--stride", 64)
SPOTTY = """
import numpy as np
from featurestore.encoders.protocol import EncoderIdentity


class Spotty:
    def __init__(self, key):
        self.identity = EncoderIdentity(key, 3, {"algorithm": "NaN for every third", "version": 1})
        self.seen = 0

    def encode(self, patches):
        vectors = np.ones((len(patches), 3), np.float32)
        numbers = self.seen + np.arange(len(patches))
        self.seen += len(patches)
        vectors[numbers % 3 == 1, 1] = np.nan
        vectors[numbers % 3 == 2, 2] = 1e6  # finite, and too large for float16
        return vectors


def load(key, options):
    return Spotty(key)
"""


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slide") / "S.tif", tissue_like(900, 700, MPP), MPP)


def test_the_list_and_one_in_full(histosge: Histosge) -> None:
    listed = histosge("encoders")
    assert listed.code == 0
    assert all(key in listed.out for key in ("morphology", "uni2-h", "virchow2@cls", "timm:<name>"))
    rows = json.loads(histosge("encoders", "--json").out)
    assert {row["key"]: row["dim"] for row in rows if "dim" in row}["virchow2"] == 2560
    shown = histosge("encoders", "gigapath").out
    assert "'resize': 256" in shown
    assert "'centre_crop': 224" in shown
    assert "eba85dd46097c3eedfcc2a3a9a930baecb6bcc19" in shown


def test_the_widths_of_the_handcrafted_are_what_they_give(histosge: Histosge) -> None:
    rows = {row["key"]: row for row in json.loads(histosge("encoders", "--json").out)}
    for key in ("morphology", "colour"):
        assert rows[key]["dim"] == load_encoder(key).identity.dim


def test_a_record_is_checked_against_the_published_network(histosge: Histosge) -> None:
    ran = histosge("encoders", "lunit-s16", "--check", "--json")
    assert ran.code == 0
    (row,) = json.loads(ran.out)
    assert (row["key"], row["compared with"], row["agrees"]) == ("lunit-s16", "plain-vit", "yes")
    assert float(row["cosine"]) >= 0.9999
    assert "1/1 lunit-s16" in ran.err
    unknown = histosge("encoders", "colour", "--check")
    assert unknown.code == 2
    assert "no record to check" in unknown.err


def _golden(histosge: Histosge, *options: object) -> dict[str, str]:
    ran = histosge("encoders", *options, "--golden")
    assert ran.code == 0
    return dict(line.split(maxsplit=1) for line in ran.out.splitlines())


def test_a_golden_digest_is_the_same_twice_and_another_for_another_encoder(histosge: Histosge) -> None:
    tiny = ("timm:test_vit", "--random-weights")
    first, again = (_golden(histosge, *tiny) for _ in range(2))
    assert first == again
    assert len(first["golden"]) == 16
    other = _golden(histosge, "timm:test_vit2", "--random-weights")
    bits = [bin(int(found["golden"], 16) ^ int(first["golden"], 16)).count("1") for found in (again, other)]
    assert bits[0] == 0
    assert bits[1] > 10


def test_several_encoders_are_fed_from_one_pass(histosge: Histosge, slide: Path, tmp_path: Path) -> None:
    both = ("--encoder", "timm:test_vit", "--random-weights", "--encoder", "morphology")
    ran = histosge("embed", slide, tmp_path / "both", *GRID, *both)
    assert ran.code == 0
    for key in ("timm:test_vit", "morphology"):
        alone = histosge("embed", slide, tmp_path / "alone", *GRID, "--encoder", key, "--random-weights")
        assert alone.code == 0
        one, other = (_embedding(tmp_path / name, key) for name in ("both", "alone"))
        assert np.array_equal(one, other, equal_nan=True)
    assert set(catalogue(str(tmp_path / "both"))["state"]) == {"done"}


def _embedding(store: Path, key: str) -> np.ndarray:
    (row,) = catalogue(str(store)).filter(pl.col("encoder") == key).to_dicts()
    opened = Store.open(str(store))
    rows, cols = opened.grid("S", row["grid"]).grid.shape
    return opened.embedding("S", row["grid"], key).read((0, rows), (0, cols))


def test_vectors_that_are_no_numbers_are_counted_and_marked(
    histosge: Histosge, slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "spotty_encoder.py").write_text(SPOTTY)
    info = tmp_path / "spotty_encoder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spotty-encoder\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[histosge.encoders]\nspotty = spotty_encoder:load\n")
    monkeypatch.syspath_prepend(tmp_path)
    ENCODERS.refresh()
    store = tmp_path / "store"
    ran = histosge("embed", slide, store, *GRID, "--encoder", "spotty", "--encoder", "colour")
    assert ran.code == 0
    rows = {row["encoder"]: row for row in catalogue(str(store)).to_dicts()}
    patches = rows["spotty"]["patches"]
    assert patches > 10
    assert rows["spotty"]["unreadable"] == pytest.approx(2 * patches / 3, abs=1)
    assert rows["colour"]["unreadable"] == 0
    assert f"{rows['spotty']['unreadable']} patches" in ran.out
    vectors = _embedding(store, "spotty").reshape(-1, 3)
    holes = np.isnan(vectors)
    assert (holes.all(1) == holes.any(1)).all()
    assert not np.isinf(vectors).any()
    assert np.isfinite(vectors).all(1).sum() == patches - rows["spotty"]["unreadable"]
    assert "no finite vector" in histosge("ls", store).out


def test_weights_go_to_the_encoder_that_is_named(histosge: Histosge, slide: Path, tmp_path: Path) -> None:
    from featurestore.encoders.timm_import import import_timm

    file = tmp_path / "w.pth"
    torch.save(import_timm().create_model("test_vit", num_classes=0).state_dict(), file)
    keys = ("--encoder", "timm:test_vit", "--encoder", "colour")
    store = tmp_path / "store"
    assert histosge("embed", slide, store, *GRID, *keys, "--weights", file).code == 0
    again = histosge("embed", slide, store, *GRID, *keys, "--weights", f"timm:test_vit={file}")
    assert again.code == 0
    assert "nothing to do" in again.out
    given = load_encoder("timm:test_vit", EncoderOptions(weights=str(file), device="cpu")).identity
    shown = json.loads(histosge("encoders", "timm:test_vit", "--weights", file, "--json").out)
    assert shown["fingerprint"] == given.fingerprint
    two = ("--encoder", "timm:test_vit", "--encoder", "timm:test_vit2")
    refused = histosge("embed", slide, store, *GRID, *two, "--weights", file)
    assert refused.code == 2
    assert f"write --weights timm:test_vit={file}" in refused.err
    stray = histosge("embed", slide, store, *GRID, "--encoder", "colour", "--weights", f"uni={file}")
    assert stray.code == 2


def test_another_magnification_than_the_authors_advise_is_remarked(
    histosge: Histosge, slide: Path, tmp_path: Path
) -> None:
    ran = histosge("embed", slide, tmp_path / "s", "--mpp", 1.0, "--patch", 224, "--encoder", "uni")
    assert "made for 0.5 microns per pixel and would see 1 here" in ran.err.replace("\n", " ")


def test_the_doctor_says_which_encoders_work_and_why_others_do_not(
    histosge: Histosge, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    ran = histosge("doctor")
    assert ran.code == 0
    assert "morphology: ready" in ran.out
    assert "uni" in ran.out
    assert "cannot be reached" in ran.out
    assert "GB free" in ran.out
    assert "fp32" in ran.out
