"""GMT files, slides that are named, agreement with own spots, pictures of embeddings, pages of one file."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import pearsonr
from sklearn.decomposition import PCA
from viewer_world import GENES, GRID, Get, World

from featurestore.errors import EarlierResultError
from featurestore.storage.store import Store
from histosge.errors import ViewError
from histosge.viewer.assets import SCRIPTS, assets
from histosge.viewer.collection import Collection
from histosge.viewer.embedding_pictures import EmbeddingPictures
from histosge.viewer.gene_sets import read_gene_sets
from histosge.viewer.one_file import joined_scripts
from histosge.viewer.static_page import export_one_file

HERE = 2


def test_a_gmt_file_gives_names_and_genes(tmp_path: Path) -> None:
    file = tmp_path / "sets.gmt"
    file.write_bytes(b"\xef\xbb\xbfONE\tdescription\tA\tB\tA\r\n\r\nTWO\t\tC\t\r\n")
    assert read_gene_sets(file) == {"ONE": ["A", "B"], "TWO": ["C"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no gene set"),
        (b"ONE\tdescription\n", "line 1"),
        (b"\t\tA\n", "line 1"),
        (b"\xff\xfe\x00", "cannot be read as text"),
    ],
)
def test_what_is_no_gmt_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "sets.gmt").write_bytes(content)
    with pytest.raises(ViewError, match=message):
        read_gene_sets(tmp_path / "sets.gmt")
    with pytest.raises(ViewError, match="there is no file"):
        read_gene_sets(tmp_path / "none.gmt")


def test_only_the_named_slides_are_shown(world: World) -> None:
    opened = Collection.open(str(world.store), slides=["here", "bare"])
    assert [slide.slide_id for slide in opened.slides] == ["bare", "here"]
    with pytest.raises(ViewError, match="holds no slide 'there'"):
        Collection.open(str(world.store), slides=["there"])


def test_agreement_is_pearson_over_spots_of_what_lies_under_them(get: Get, world: World) -> None:
    found = json.loads(get(f"data/{HERE}/layers/0/agreement/0.json").body)
    spots = json.loads(get(f"data/{HERE}/spots.json").body)
    measured = np.frombuffer(get(f"data/{HERE}/spots/0.f16").body, "<f2").astype(float)
    layer = json.loads(get(f"data/{HERE}/layers/0/layer.json").body)
    values = np.frombuffer(get(f"data/{HERE}/layers/0/genes/0.f16").body, "<f2").reshape(layer["shape"])
    # By brute force: the mean rate over a fine lattice of points in each spot's disc.
    offsets = np.stack(np.meshgrid(*[np.linspace(-1, 1, 41)] * 2), axis=-1).reshape(-1, 2)
    offsets = offsets[(offsets**2).sum(axis=1) <= 1] * spots["diameter_um"] / 2
    under = []
    for place in np.array(spots["xy_um"]):
        cols, rows = np.floor((place + offsets - layer["origin_um"]) / layer["step_um"]).astype(int).T
        under.append(np.log1p(np.nanmean(np.expm1(values[rows, cols].astype(float)))))
    assert found["n"] == len(measured)
    assert found["r"] == pytest.approx(pearsonr(under, measured)[0], abs=0.005)
    assert json.loads(get(f"data/{HERE}/layers/0/agreement/4.json").body)["r"] is None, (
        "ZZZ5 was not measured"
    )
    assert get(f"data/{HERE}/layers/0/agreement/5.json").status == 404
    assert get("data/1/layers/0/agreement/0.json").status == 404


def test_abstained_genes_and_training_are_in_the_description(get: Get) -> None:
    layer = json.loads(get(f"data/{HERE}/layers/0/layer.json").body)
    assert layer["abstained"] == [False, False, True, False, True]
    assert layer["training"] == "trained on"
    assert json.loads(get("data/1/layers/0/layer.json").body)["training"] == "held out"


def test_components_are_principal_components_and_clusters_cover_what_is_embedded(world: World) -> None:
    store = Store.open(str(world.store))
    found = EmbeddingPictures(store).pictures("here", GRID.key)
    stored = store.grid("here", GRID.key)
    array = store.embedding("here", GRID.key, store.encoder_slugs("here", GRID.key)[0])
    values = array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols)).astype(np.float64)
    known = stored.is_tissue & np.isfinite(values[..., 0])
    np.testing.assert_array_equal(found.rgba[..., 3] > 0, known)
    np.testing.assert_array_equal(found.clusters >= 0, known)
    parts = []
    for name in store.slide_ids():
        grid = store.grid(name, GRID.key)
        other = store.embedding(name, GRID.key, store.encoder_slugs(name, GRID.key)[0])
        whole = other.read((0, grid.grid.n_rows), (0, grid.grid.n_cols)).astype(np.float64)
        parts.append(whole[grid.is_tissue & np.isfinite(whole[..., 0])])
    # The store is smaller than the sample: all of it was used.
    scores = PCA(3).fit(np.concatenate(parts)).transform(values[known])
    for channel in range(3):
        shown = found.rgba[known][:, channel].astype(float)
        inner = (shown > 0) & (shown < 255)
        assert abs(pearsonr(shown[inner], scores[inner, channel])[0]) > 0.999
    again = EmbeddingPictures(store).pictures("here", GRID.key)
    np.testing.assert_array_equal(found.rgba, again.rgba)
    np.testing.assert_array_equal(found.clusters, again.clusters)


def test_a_page_of_one_file_is_whole_and_replaced_only_when_told(world: World, tmp_path: Path) -> None:
    hostile = "</script><script>document.title=1</script>"
    sets = tmp_path / "sets.gmt"
    sets.write_text(f"{hostile}\t\tAAA1\n")

    def opened() -> Collection:
        return Collection.open(
            str(world.store), str(world.maps), str(world.sheet), world.domains, 4.0, sets, ["here"]
        )

    out = tmp_path / "page.html"
    done = export_one_file(opened(), out, ["AAA1"])
    text = out.read_text()
    assert (done.slides, done.genes, done.n_bytes) == (1, 1, len(text.encode()))
    assert text.count("</script>") == 3, "markup in a name ends no element"
    assert str(world.store.parent) not in text
    assert re.search(r"(src|href)=\"(static|http)", text) is None
    embedded = json.loads(re.search(r'id="embedded">(.*?)</script>', text, re.DOTALL)[1])  # type: ignore[index]
    assert embedded["data/gene-sets.json"]["sets"][0]["name"] == hostile
    assert embedded["data/0/layers/0/layer.json"]["genes"] == ["AAA1"]
    assert export_one_file(opened(), out, ["AAA1"]).was_there
    with pytest.raises(EarlierResultError, match="--overwrite"):
        export_one_file(opened(), out, ["BBB2"])
    assert out.read_text() == text
    export_one_file(opened(), out, ["BBB2"], overwrite=True)
    assert out.read_text() != text


def test_a_file_that_would_be_too_large_is_refused_with_what_takes_the_room(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("histosge.viewer.static_page.MAX_BYTES", 20_000)
    opened = Collection.open(str(world.store), str(world.maps), str(world.sheet), world.domains, 4.0)
    with pytest.raises(ViewError, match=r"of tiles, .* of 5 genes, .* 3 slides.*--genes A,B and --slide ID"):
        export_one_file(opened, tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_each_module_comes_after_those_that_it_imports() -> None:
    seen: set[str] = set()
    for name in SCRIPTS:
        text = assets()[f"static/{name}"].content.decode()
        assert set(re.findall(r'from "\./([^"]+)"', text)) <= seen, name
        seen.add(name)
    script = joined_scripts()
    assert re.search(r"^(import|export) ", script, re.MULTILINE) is None
    assert GENES[0] not in script
