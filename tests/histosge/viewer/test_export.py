"""A page as files: whole, and the same answers as the live one."""

import json
from pathlib import Path

import numpy as np
import pytest
from viewer_world import GENES, Get, World

from featurestore.errors import EarlierResultError
from histosge.errors import ViewError
from histosge.viewer.collection import Collection
from histosge.viewer.static_page import export_page


def _open(world: World, finest_mpp: float = 2.0) -> Collection:
    return Collection.open(str(world.store), str(world.maps), str(world.sheet), world.domains, finest_mpp)


@pytest.fixture(scope="module")
def exported(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("page") / "out"
    done = export_page(_open(world), out, ["ZZZ5", "AAA1", "ONLY9"])
    assert done.slides == 3
    assert done.genes == 3
    assert done.n_bytes == sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    return out


def test_every_file_that_the_page_may_ask_for_is_written(exported: Path) -> None:
    for name in ("index.html", "static/main.js", "static/vendor/openseadragon.min.js", "data/index.json"):
        assert (exported / name).is_file(), name
    picture = json.loads((exported / "data/2/picture.json").read_text())
    assert (picture["width"], picture["height"], picture["mpp"]) == (700, 550, 2.0)
    for level in range(picture["min_level"], picture["max_level"] + 1):
        assert (exported / f"data/2/tiles/{level}/0_0.jpg").is_file()
    assert len(list(exported.glob(f"data/2/tiles/{picture['max_level']}/*.jpg"))) == 4
    assert json.loads((exported / "data/1/picture.json").read_text())["state"] == "absent"


def test_chosen_genes_are_renumbered_and_equal_the_live_ones(exported: Path, get: Get) -> None:
    layer = json.loads((exported / "data/2/layers/0/layer.json").read_text())
    assert layer["genes"] == ["ZZZ5", "AAA1"]
    assert layer["trust"] == [0.0, 0.9]
    for i, gene in enumerate(layer["genes"]):
        live = get(f"data/2/layers/0/genes/{GENES.index(gene)}.f16").body
        assert (exported / f"data/2/layers/0/genes/{i}.f16").read_bytes() == live
    spots = json.loads((exported / "data/2/spots.json").read_text())
    assert spots["genes"] == ["AAA1", "ONLY9"]
    values = np.fromfile(exported / "data/2/spots/1.f16", "<f2")
    assert np.isfinite(values).all()
    assert len(values) == len(spots["xy_um"])


def test_all_predicted_genes_are_written_where_none_is_named_and_a_page_may_be_written_over(
    world: World, tmp_path: Path
) -> None:
    for _ in range(2):
        assert export_page(_open(world, 4.0), tmp_path / "page").genes == len(GENES)


def test_an_older_page_stays_until_the_new_one_is_whole(world: World, tmp_path: Path) -> None:
    page = tmp_path / "page"
    export_page(_open(world, 4.0), page, ["AAA1"])
    before = {file: file.read_bytes() for file in page.rglob("*") if file.is_file()}

    def killed(message: str) -> None:
        assert {file: file.read_bytes() for file in page.rglob("*") if file.is_file()} == before
        if message.startswith("gone"):  # the second slide of the world
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_page(_open(world, 4.0), page, ["ZZZ5"], killed)
    killed("")
    assert [path.name for path in tmp_path.iterdir()] == ["page"]
    with pytest.raises(EarlierResultError, match="replace it with --overwrite"):
        export_page(_open(world, 4.0), page, ["ZZZ5"])
    killed("")
    assert export_page(_open(world, 4.0), page, ["AAA1"]).was_there
    export_page(_open(world, 4.0), page, ["ZZZ5"], overwrite=True)
    layers = [json.loads(file.read_text())["genes"] for file in page.glob("data/*/layers/0/layer.json")]
    assert ["ZZZ5"] in layers
    assert ["AAA1"] not in layers


def test_what_a_user_has_put_beside_a_page_is_not_lost(world: World, tmp_path: Path) -> None:
    export_page(_open(world, 4.0), tmp_path / "page", ["AAA1"])
    (tmp_path / "page" / "CNAME").write_text("slides.example.org")
    with pytest.raises(ViewError, match="CNAME beside a page"):
        export_page(_open(world, 4.0), tmp_path / "page", ["AAA1"])
    assert (tmp_path / "page" / "CNAME").read_text() == "slides.example.org"


def test_a_folder_that_holds_something_else_and_a_gene_that_nobody_knows_are_refused(
    world: World, tmp_path: Path
) -> None:
    (tmp_path / "cat.txt").write_text("miaow")
    with pytest.raises(ViewError, match="nothing was written"):
        export_page(_open(world), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["cat.txt"]
    with pytest.raises(ViewError, match="did you mean AAA1"):
        export_page(_open(world), tmp_path / "page", ["AAA"])
    assert not (tmp_path / "page").exists()


def test_no_path_of_this_machine_is_written(exported: Path, world: World) -> None:
    for file in exported.rglob("*.json"):
        assert str(world.store.parent) not in file.read_text(), file


def test_more_genes_than_a_page_should_hold_are_refused(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge.viewer.static_page.MAX_ALL_GENES", 4)
    with pytest.raises(ViewError, match=r"hold 5 genes; choose up to 4 with --genes"):
        export_page(_open(world), tmp_path / "page")
