"""The chain as users run it: slide -> store -> model -> map, on one small section with the `colour` encoder."""

import json
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import zarr

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.errors import (
    AmbiguousSelectionError,
    EarlierResultError,
    IdentityMismatchError,
    StoreError,
)
from featurestore.events import Progress
from featurestore.grid import GridSpec
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store
from histosge.data.embedded_slide import load_patches, open_embedded
from histosge.data.genes import choose_genes
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import Patches
from histosge.data.spot_overlap import spots_from_patches
from histosge.errors import ExpressionError, ModelError
from histosge.exporting.domain_labels import domain_labels
from histosge.exporting.formats.anndata_files import annotated, write_h5ad
from histosge.exporting.open_tables import table_of_map
from histosge.models.registry import load_preset
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import predict
from histosge.prediction.stored_map import StoredMap
from histosge.synthetic import GeneCounts, SyntheticSpec, make_cohort
from histosge.training.saved_model import load_model
from histosge.training.train import TrainSettings, train

SLIDE_MPP = 0.5
GRID = GridSpec(mpp=1.0, patch_px=48, stride_px=24)
"""Coarser than the slide: a mix-up of the grid's pixels and the slide's is a factor of two."""
BLOCK = (7, 11)
N_GENES = 13
SPEC = SyntheticSpec(
    size_px=(1608, 1528),
    mpp=SLIDE_MPP,
    genes=GeneCounts(6, 5, 3, 3),
    spot_diameter_um=41.0,
    spot_pitch_um=59.0,
)
PRESETS = ("dense", "ridge", "knn", "paper")
EMBEDDED = EmbedSettings(encoders=("colour",), spec=GRID, block_shape=BLOCK)


@dataclass(frozen=True)
class Chain:
    """Where everything lies: the sheet, the feature store, and per preset a model and its map."""

    folder: Path
    sheet: str
    slide: str
    store: str

    def model(self, preset: str) -> Path:
        return self.folder / f"model_{preset}"

    def out(self, preset: str) -> str:
        return str(self.folder / f"map_{preset}")


def _settings(preset: str, seed: int = 0) -> TrainSettings:
    return TrainSettings(preset=preset, genes=N_GENES, epochs=2, seed=seed)


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    folder = tmp_path_factory.mktemp("chain")
    cohort = make_cohort(folder / "data", SPEC, 1)
    made = Chain(folder, str(cohort.sheet), str(cohort.sections[0].slide), str(folder / "store"))
    embed(made.sheet, made.store, EMBEDDED)
    for preset in PRESETS:
        train(made.sheet, made.store, made.model(preset), _settings(preset))
        predict(made.store, made.model(preset), made.out(preset))
    return made


@pytest.fixture(scope="module")
def patches(chain: Chain) -> Patches:
    return load_patches(open_embedded(Store.open(chain.store), "S1", None, None))


def _map(out: str) -> StoredMap:
    return ExpressionStore.open(out).map("S1", GRID.key)


def _values(out: str) -> np.ndarray:
    stored = _map(out)
    return stored.array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols))


def _contents(folder: str | Path) -> dict[str, tuple[int, bytes]]:
    """Every file below a folder: path -> time of writing and bytes."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _refusal(chain: Chain, model: Path, out: Path, store: str | None = None) -> str:
    with pytest.raises((ModelError, StoreError)) as refused:
        predict(store or chain.store, model, str(out))
    assert "\n" not in str(refused.value)
    assert not out.exists()
    return str(refused.value)


# ---------------------------------------------------------------- what is predicted


@pytest.mark.parametrize("preset", PRESETS)
def test_block_by_block_equals_the_whole_slide_at_once(chain: Chain, patches: Patches, preset: str) -> None:
    stored = _map(chain.out(preset))
    assert len(stored.planned()) >= 12
    assert (stored.array.block_shape, stored.array.shape[2]) == (BLOCK, N_GENES)
    whole = load_model(chain.model(preset)).model.predict(patches)
    assert (whole.std(axis=0) > 0.01).sum() >= 6
    # Stored as float16: half a step there, and float32's own noise.
    np.testing.assert_allclose(_values(chain.out(preset))[patches.rows, patches.cols], whole, atol=5e-3)


@pytest.mark.parametrize("preset", ["nearest", "linear", "cubic"])
def test_a_saved_interpolation_predicts_the_slides_of_its_training_and_no_other(
    chain: Chain, patches: Patches, tmp_path: Path, preset: str
) -> None:
    train(chain.sheet, chain.store, tmp_path / "model", _settings(preset))
    predict(chain.store, tmp_path / "model", str(tmp_path / "map"))
    model = load_model(tmp_path / "model").model
    whole = model.predict(patches)
    np.testing.assert_allclose(_values(str(tmp_path / "map"))[patches.rows, patches.cols], whole, atol=5e-3)
    with pytest.raises(
        ModelError, match=r"has none of slide 'T9': predict a slide that it was trained on \(S1\)"
    ):
        model.predict(replace(patches, slide_id="T9"))


def test_a_map_holds_every_tissue_patch_and_nothing_else(chain: Chain, patches: Patches) -> None:
    tissue = Store.open(chain.store).grid("S1", GRID.key).is_tissue
    assert 0.2 < tissue.mean() < 0.95
    for preset in PRESETS:
        assert np.array_equal(np.isfinite(_values(chain.out(preset))).all(axis=2), tissue)
        assert np.array_equal(np.isnan(_values(chain.out(preset))).all(axis=2), ~tissue)
    assert len(patches) == tissue.sum()


def test_chosen_genes_come_out_as_they_do_among_all(chain: Chain, tmp_path: Path) -> None:
    genes = load_model(chain.model("dense")).card.genes
    chosen = (genes[11], genes[2], genes[5])
    predict(chain.store, chain.model("dense"), str(tmp_path / "some"), genes=chosen)
    assert _map(str(tmp_path / "some")).genes == chosen
    wanted = _values(chain.out("dense"))[..., [11, 2, 5]]
    np.testing.assert_array_equal(_values(str(tmp_path / "some")), wanted)


def test_a_gene_that_the_model_does_not_know_is_refused_with_the_nearest(
    chain: Chain, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match="does not predict gene 'MORP01': did you mean MORPH01"):
        predict(chain.store, chain.model("dense"), str(tmp_path / "out"), genes=("MORP01",))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- what is saved


@pytest.mark.parametrize("preset", PRESETS)
def test_a_saved_model_predicts_bit_equal_to_the_one_that_was_trained(
    chain: Chain, patches: Patches, preset: str
) -> None:
    sections = [loaded.section for loaded in load_sections(chain.sheet, chain.store, Selection())]
    genes = choose_genes([s.spots for s in sections], N_GENES)
    targets = [training_section(section, genes) for section in sections]
    fitted = load_preset(preset).fit(targets, seed=0, epochs=2)
    reloaded = load_model(chain.model(preset))
    assert reloaded.card.genes == genes
    assert np.array_equal(reloaded.model.predict(patches), fitted.predict(patches))


def _files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("preset", PRESETS)
def test_the_same_seed_trains_the_same_model_bit_for_bit(chain: Chain, tmp_path: Path, preset: str) -> None:
    again = train(chain.sheet, chain.store, tmp_path / "again", _settings(preset))
    assert again.fingerprint == load_model(chain.model(preset)).fingerprint
    files = _files(chain.model(preset))
    assert files == _files(tmp_path / "again")
    for name in files:
        assert (tmp_path / "again" / name).read_bytes() == (chain.model(preset) / name).read_bytes()


def test_another_seed_trains_another_network(chain: Chain, patches: Patches, tmp_path: Path) -> None:
    other = train(chain.sheet, chain.store, tmp_path / "other", _settings("paper", seed=1))
    first = load_model(chain.model("paper"))
    assert other.fingerprint != first.fingerprint
    assert not np.array_equal(other.model.predict(patches), first.model.predict(patches))


def test_the_card_says_what_the_model_was_trained_on(chain: Chain) -> None:
    card = load_model(chain.model("ridge")).card
    assert card.encoder["key"] == "colour"
    assert card.grid == {"mpp": 1.0, "patch_px": 48, "stride_px": 24}
    (section,) = card.sections
    assert (section["slide_id"], section["donor"]) == ("S1", "D1")
    n_spots = anndata.read_h5ad(Path(chain.sheet).parent / "S1.h5ad").n_obs
    assert section["spots"] + section["few_counts"] + section["off_tissue"] == n_spots


def test_a_model_of_a_version_without_records_is_replaced_only_if_that_is_wanted(
    chain: Chain, tmp_path: Path
) -> None:
    place = tmp_path / "model"
    shutil.copytree(chain.model("paper"), place)
    document = json.loads((place / "config.json").read_text())
    del document["made_with"]
    (place / "config.json").write_text(json.dumps(document))
    with pytest.raises(EarlierResultError, match="does not record what it was made with"):
        train(chain.sheet, chain.store, place, _settings("ridge"))
    assert load_model(place).card.preset == "paper"
    train(chain.sheet, chain.store, place, _settings("ridge"), overwrite=True)
    assert load_model(place).card.preset == "ridge"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_overwritten_by_a_model(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("miaow")
    with pytest.raises(ModelError, match="no histosge model"):
        train(chain.sheet, chain.store, tmp_path / "photos", _settings("ridge"))
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "cat.txt"]


# ---------------------------------------------------------------- what is refused


def test_a_model_of_another_encoder_is_refused_and_nothing_is_written(chain: Chain, tmp_path: Path) -> None:
    other = str(tmp_path / "store")
    embed(chain.slide, other, EmbedSettings(encoders=("morphology",), spec=GRID, block_shape=BLOCK))
    message = _refusal(chain, chain.model("ridge"), tmp_path / "out", other)
    assert "trained on encoder 'colour'" in message
    assert "the store holds 'morphology'" in message
    assert "embed with --encoder colour or train again" in message


def test_a_model_of_another_grid_is_refused_and_nothing_is_written(chain: Chain, tmp_path: Path) -> None:
    other = str(tmp_path / "store")
    embed(chain.slide, other, EmbedSettings(encoders=("colour",), spec=GridSpec(1.0, 48, 29)))
    message = _refusal(chain, chain.model("ridge"), tmp_path / "out", other)
    assert "'stride_px': 24" in message
    assert "'stride_px': 29" in message
    assert "embed with --mpp 1.0 --patch 48 --stride 24 or train again" in message


def test_of_several_grids_training_needs_one_named_and_predicting_takes_the_models_own(
    chain: Chain, tmp_path: Path
) -> None:
    both = tmp_path / "store"
    shutil.copytree(chain.store, both)
    other = GridSpec(1.0, 48, 29)
    embed(chain.sheet, str(both), EmbedSettings(encoders=("colour",), spec=other))
    with pytest.raises(AmbiguousSelectionError) as refused:
        train(chain.sheet, str(both), tmp_path / "model", _settings("ridge"))
    assert f"--grid {GRID.key} --encoder colour" in str(refused.value)
    assert f"--grid {other.key} --encoder colour" in str(refused.value)
    assert not (tmp_path / "model").exists()
    predict(str(both), chain.model("ridge"), str(tmp_path / "out"))
    np.testing.assert_array_equal(_values(str(tmp_path / "out")), _values(chain.out("ridge")))


def test_a_slide_that_is_half_embedded_is_refused_and_nothing_is_written(
    chain: Chain, tmp_path: Path
) -> None:
    half = tmp_path / "store"
    shutil.copytree(chain.store, half)
    next(half.rglob("embedding/c/*/*/0")).unlink()
    message = _refusal(chain, chain.model("ridge"), tmp_path / "out", str(half))
    assert "run the same histosge embed again" in message
    with pytest.raises(ValueError, match="run the same histosge embed again"):
        train(chain.sheet, str(half), tmp_path / "model", _settings("ridge"))
    assert not (tmp_path / "model").exists()


Damage = Callable[[Path], object]


def _without(name: str) -> Damage:
    return lambda folder: (folder / name).unlink()


def _cut(name: str) -> Damage:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-101])


def _edited(change: Callable[[dict[str, Any]], object]) -> Damage:
    def damage(folder: Path) -> None:
        document = json.loads((folder / "config.json").read_text())
        change(document)
        (folder / "config.json").write_text(json.dumps(document))

    return damage


def _flipped_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 64
    path.write_bytes(bytes(whole))


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        pytest.param(_without("config.json"), "is no saved model", id="no config"),
        pytest.param(_without("model.safetensors"), "cannot be read", id="no weights"),
        pytest.param(_cut("config.json"), "is no saved model", id="cut config"),
        pytest.param(_edited(lambda d: d.update(format=3)), "newer version (format 3, known: 2)", id="newer"),
        pytest.param(_edited(lambda d: d.update(spec="other")), "is no saved model", id="other spec"),
        pytest.param(
            _edited(lambda d: d["card"].update(preset="nope")), "unknown preset 'nope'", id="other preset"
        ),
        pytest.param(
            _edited(lambda d: d["card"]["encoder"].update(fingerprint="0" * 64)),
            "train again",
            id="other encoder",
        ),
        pytest.param(_edited(lambda d: d["card"]["grid"].update(mpp=0.5)), "train again", id="other grid"),
        pytest.param(_cut("model.safetensors"), "cannot be read", id="cut weights"),
        pytest.param(_edited(lambda d: d.pop("model")), "train again", id="no model"),
        pytest.param(_edited(lambda d: d["card"].pop("seed")), "train again", id="no seed"),
        pytest.param(_edited(lambda d: d["card"].update(preset="ridge")), "train again", id="wrong preset"),
        pytest.param(_edited(lambda d: d["card"]["genes"].append("X")), "train again", id="a gene more"),
        pytest.param(_edited(lambda d: d["card"]["genes"].pop()), "train again", id="a gene less"),
        pytest.param(_edited(lambda d: d["card"]["genes"].reverse()), "train again", id="genes swapped"),
        pytest.param(_flipped_weights, "train again", id="flipped weights"),
    ],
)
def test_a_damaged_model_is_refused_in_one_line_and_nothing_is_written(
    chain: Chain, tmp_path: Path, damage: Damage, named: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(chain.model("dense"), model)
    damage(model)
    assert named in _refusal(chain, model, tmp_path / "out")


# ---------------------------------------------------------------- a second time into the same place


def test_predicting_again_computes_nothing_and_touches_nothing(chain: Chain) -> None:
    before = _contents(chain.out("dense"))
    (result,) = predict(chain.store, chain.model("dense"), chain.out("dense"))
    assert (result.computed, result.planned) == (0, len(_map(chain.out("dense")).planned()))
    assert _contents(chain.out("dense")) == before


def test_only_what_is_missing_is_predicted_again_as_it_was(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain.out("dense"), out)
    before = _contents(out)
    lost = sorted(out.rglob("expression/c/*/*/0"))[3::5]
    for path in lost:
        path.unlink()
    steps: list[Progress] = []
    (result,) = predict(chain.store, chain.model("dense"), str(out), on_progress=steps.append)
    assert result.computed == len(lost) >= 2
    assert steps == [Progress(number, len(lost), "S1") for number in range(1, len(lost) + 1)]
    after = _contents(out)
    assert {path: data for path, (_, data) in after.items()} == {p: data for p, (_, data) in before.items()}
    rewritten = {path for path in before if after[path][0] != before[path][0]}
    # Depth is written with its block, before the expression that makes the block done.
    assert rewritten <= {str(path) for path in lost} | {
        str(path).replace("/expression/", "/depth/") for path in lost
    }


def test_a_write_that_fails_between_depth_and_expression_leaves_no_block_done(
    chain: Chain, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain.out("dense"), out)
    before = {path: data for path, (_, data) in _contents(out).items()}
    (depth,), (expression,) = out.rglob("depth/c"), out.rglob("expression/c")
    shutil.rmtree(depth)
    shutil.rmtree(expression)
    depth.write_text("no depth can be written below a file")
    with pytest.raises(OSError, match="depth"):
        predict(chain.store, chain.model("dense"), str(out))
    assert not _map(str(out)).array.done()
    depth.unlink()
    (result,) = predict(chain.store, chain.model("dense"), str(out))
    assert result.computed == result.planned
    assert {path: data for path, (_, data) in _contents(out).items()} == before


def test_a_map_of_another_model_is_refused_and_left_as_it_is(chain: Chain, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(chain.out("ridge"), out)
    before = _contents(out)
    with pytest.raises(IdentityMismatchError) as refused:
        predict(chain.store, chain.model("dense"), str(out))
    message = str(refused.value)
    for preset in ("ridge", "dense"):
        assert load_model(chain.model(preset)).fingerprint[:16] in message
    assert "give another OUT, or replace the map with --overwrite" in message
    assert _contents(out) == before


def test_a_map_of_other_genes_is_refused_and_left_as_it_is(chain: Chain, tmp_path: Path) -> None:
    first, second, third = load_model(chain.model("ridge")).card.genes[:3]
    out = str(tmp_path / "out")
    predict(chain.store, chain.model("ridge"), out, genes=(first, second))
    before = _contents(out)
    for others in ((second, first), (first, third), (first,), ()):
        with pytest.raises(
            IdentityMismatchError, match="give another OUT, or replace the map with --overwrite"
        ):
            predict(chain.store, chain.model("ridge"), out, genes=others)
    assert _contents(out) == before


# ---------------------------------------------------------------- AnnData


@pytest.fixture(scope="module")
def h5ad(chain: Chain) -> anndata.AnnData:
    path = chain.folder / "S1.h5ad"
    n_rows = write_h5ad(_map(chain.out("dense")), path)
    data = anndata.read_h5ad(path)
    assert data.n_obs == n_rows
    return data


def test_the_h5ad_has_a_row_per_tissue_patch_and_the_genes(
    chain: Chain, patches: Patches, h5ad: anndata.AnnData
) -> None:
    assert tuple(h5ad.var_names) == load_model(chain.model("dense")).card.genes
    assert h5ad.obs_names.is_unique
    rows, cols = h5ad.obs["row"].to_numpy(), h5ad.obs["col"].to_numpy()
    assert set(zip(rows.tolist(), cols.tolist(), strict=True)) == set(
        zip(patches.rows.tolist(), patches.cols.tolist(), strict=True)
    )
    assert h5ad.X.dtype == np.float32
    np.testing.assert_array_equal(h5ad.X, _values(chain.out("dense"))[rows, cols].astype(np.float32))


def test_the_h5ad_s_positions_are_level_0_pixels(chain: Chain, h5ad: anndata.AnnData) -> None:
    """The mean colour of the slide around a position is what `colour` saw of that patch."""
    xy = h5ad.obsm["spatial"]
    np.testing.assert_allclose(xy * SLIDE_MPP, h5ad.obs[["x_um", "y_um"]].to_numpy())
    slide = open_slide(chain.slide)
    try:
        pixels = slide.read_region(0, 0, *slide.size_px, slide.mpp).astype(float)
    finally:
        slide.close()
    embedding = Store.open(chain.store).embedding("S1", GRID.key, "colour")
    seen = embedding.read((0, embedding.shape[0]), (0, embedding.shape[1]), slice(0, 3)).astype(float) * 255
    half = round(GRID.patch_px * GRID.mpp / SLIDE_MPP / 2)

    def apart(centres: np.ndarray) -> float:
        found = []
        for x, y in centres.astype(int):
            square = pixels[max(0, y - half) : y + half, max(0, x - half) : x + half]
            found.append(square.mean(axis=(0, 1)) if square.size else np.zeros(3))
        return float(np.abs(np.array(found) - seen[h5ad.obs["row"], h5ad.obs["col"]]).mean())

    assert apart(xy) < 1.0
    assert apart(xy[:, ::-1]) > 5.0
    assert apart(xy / 2) > 5.0
    assert apart(xy + half) > 2.0


def test_the_h5ad_s_picture_lies_under_its_positions(h5ad: anndata.AnnData) -> None:
    """Scanpy plots positions times the scale factor on the picture: there it shows the patch's colour."""
    library = h5ad.uns["spatial"]["S1"]
    picture, factors = library["images"]["hires"], library["scalefactors"]
    cols, rows = np.floor(h5ad.obsm["spatial"] * factors["tissue_hires_scalef"]).astype(int).T
    assert (rows >= 0).all()
    assert (rows < picture.shape[0]).all()
    assert (cols < picture.shape[1]).all()
    tissue_brightness = picture[rows, cols].mean()
    everywhere = picture.mean()
    assert tissue_brightness < everywhere - 5
    assert factors["spot_diameter_fullres"] == pytest.approx(GRID.stride_px * GRID.mpp / SLIDE_MPP)


# ---------------------------------------------------------------- read without our code

_PLAIN = """
    import json, sys, warnings
    import numpy as np
    import xarray as xr

    answers = []
    for url, path, variable, out, options in json.loads(sys.argv[1]):
        with warnings.catch_warnings():
            # Remarks: that only slides are consolidated, and that the folder of failures is no group.
            warnings.simplefilter("ignore")
            tree = xr.open_datatree(url, engine="zarr", **options)
        warnings.simplefilter("error")
        array = tree[path][variable]
        coords = {name: list(array.coords[name].dims) for name in array.coords}
        nearest = array.sel(y=333.0, x=222.0, method="nearest")
        np.savez(out, values=array.values, nearest=nearest.values, y=array.y.values, x=array.x.values,
                 tissue=tree[path]["tissue" if variable == "expression" else "../tissue"].values)
        units = [array.y.attrs.get("units"), array.x.attrs.get("units")]
        answers.append({"dims": array.dims, "dtype": str(array.dtype), "coords": coords, "units": units,
                        "gene": [str(g) for g in array.coords["gene"].values] if "gene" in array.coords else [],
                        "slides": list(tree.children)})
    ours = [name for name in sys.modules if name.partition(".")[0] in ("featurestore", "histosge")]
    print(json.dumps([answer | {"ours": ours} for answer in answers]))
"""
PlainRead = tuple[dict[str, Any], dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def read_plainly(chain: Chain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, PlainRead]:
    """Read arrays in a fresh Python with xarray alone, away from the repository: what it says, and the values."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "broken.svs").write_text("this is no slide\n")
    store = folder / "store"
    shutil.copytree(chain.store, store)
    (failed,) = embed(str(folder / "broken.svs"), str(store), EMBEDDED)
    assert failed.state == "failed"
    embedding = (str(store), f"S1/{GRID.key}/colour", "embedding")
    asked: dict[str, tuple[object, ...]] = {
        "plain": (*embedding, f"{folder}/plain.npz", {}),
        "as in SPEC.md": (*embedding, f"{folder}/spec.npz", {"consolidated": False}),
        "map": (
            chain.out("dense"),
            f"S1/{GRID.key}",
            "expression",
            f"{folder}/map.npz",
            {"consolidated": False},
        ),
    }
    command = [sys.executable, "-I", "-c", textwrap.dedent(_PLAIN), json.dumps(list(asked.values()))]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)
    assert ran.returncode == 0, ran.stderr
    found = {}
    for (name, (*_, out, _)), said in zip(asked.items(), json.loads(ran.stdout), strict=True):
        with np.load(str(out)) as arrays:
            found[name] = said, dict(arrays)
    return found


@pytest.mark.parametrize("options", ["plain", "as in SPEC.md"])
def test_plain_xarray_reads_the_embedding_that_we_read(
    chain: Chain, read_plainly: dict[str, PlainRead], options: str
) -> None:
    said, arrays = read_plainly[options]
    assert said["ours"] == []
    assert said["slides"] == ["S1"]
    assert (said["dims"], said["dtype"]) == (["y", "x", "feature"], "float16")
    assert said["coords"] == {"y": ["y"], "x": ["x"]}
    assert said["units"] == ["micrometer", "micrometer"]

    opened = Store.open(chain.store)
    stored, array = opened.grid("S1", GRID.key), opened.embedding("S1", GRID.key, "colour")
    values = array.read((0, stored.grid.n_rows), (0, stored.grid.n_cols))
    assert np.isfinite(values).any()
    np.testing.assert_array_equal(arrays["values"], values)
    np.testing.assert_array_equal(arrays["tissue"], stored.tissue)
    np.testing.assert_array_equal(arrays["y"], stored.grid.y_um)
    np.testing.assert_array_equal(arrays["x"], stored.grid.x_um)
    # Centres are 24, 48, 72 ... microns: 333 is nearest to the 14th, 222 to the 9th.
    np.testing.assert_array_equal(arrays["nearest"], values[13, 8])


def test_plain_xarray_reads_the_map_that_we_read(chain: Chain, read_plainly: dict[str, PlainRead]) -> None:
    said, arrays = read_plainly["map"]
    assert said["ours"] == []
    assert (said["dims"], said["dtype"]) == (["y", "x", "gene"], "float16")
    assert said["coords"] == {"y": ["y"], "x": ["x"], "gene": ["gene"]}
    assert tuple(said["gene"]) == load_model(chain.model("dense")).card.genes
    np.testing.assert_array_equal(arrays["values"], _values(chain.out("dense")))
    np.testing.assert_array_equal(arrays["tissue"], Store.open(chain.store).grid("S1", GRID.key).tissue)
    np.testing.assert_array_equal(arrays["nearest"], _values(chain.out("dense"))[13, 8])


# ---------------------------------------------------------------- depth, intervals, measured spots


def test_a_map_carries_half_widths_trust_and_bounds(chain: Chain) -> None:
    saved, stored = load_model(chain.model("dense")), _map(chain.out("dense"))
    assert saved.intervals is not None
    assert saved.intervals.held_out == "block"
    np.testing.assert_array_equal(stored.half_width, saved.intervals.half_width)
    assert (stored.level, stored.trained_on) == (saved.intervals.level, True)
    made_by = table_of_map(stored).made_by
    assert (made_by["half_width_level"], made_by["trained_on_this_slide"]) == ("0.9", "yes")
    np.testing.assert_array_equal(stored.trust, saved.intervals.trust)
    values, lower, upper = stored.read_with_bounds((5, 20), (3, 30))
    there = np.isfinite(values)
    assert there.any()
    assert (lower[there] >= 0).all()
    assert ((lower < values) & (values < upper))[there].mean() > 0.99
    np.testing.assert_allclose((upper - values)[there.all(axis=2)][0], saved.intervals.half_width, rtol=1e-3)


def test_card_map_and_export_say_for_whom_intervals_and_trust_hold(chain: Chain) -> None:
    intervals = load_model(chain.model("dense")).intervals
    assert intervals is not None
    scope, claim = "held-out blocks of one section, within donor D1 only", "within donor D1 only"
    config = json.loads((chain.model("dense") / "config.json").read_text())
    n_trusted = int(intervals.trusted.sum())
    assert config["card"]["trusted"] == {"genes": n_trusted, "of": N_GENES, "scope": scope}
    assert (config["calibration"]["scope"], config["calibration"]["method"]) == (scope, "cross-conformal")
    stored = _map(chain.out("dense"))
    assert (stored.scope, stored.claim, stored.embedding_distance) == (scope, claim, None)
    made_by = table_of_map(stored).made_by
    assert (made_by["half_width_claim"], made_by["trust_scope"]) == (claim, scope)


def test_a_slide_of_another_donor_gets_no_claim_but_how_far_its_embeddings_lie(
    chain: Chain, tmp_path: Path
) -> None:
    (other,) = make_cohort(tmp_path / "data", replace(SPEC, seed=17), 1).sections
    shutil.move(other.slide, tmp_path / "other.tif")
    store, out, messages = str(tmp_path / "store"), str(tmp_path / "map"), list[str]()
    embed(str(tmp_path / "other.tif"), store, EMBEDDED)
    (result,) = predict(store, chain.model("dense"), out, on_message=messages.append)
    assert messages == [f"other: {result.note}"]
    assert "within donor D1 only" in result.note
    stored = ExpressionStore.open(out).map("other", GRID.key)
    reference = load_model(chain.model("dense")).intervals.reference  # type: ignore[union-attr]
    patches = load_patches(open_embedded(Store.open(store), "other", None, None))
    own, sd = patches.embedding.mean(axis=0, dtype=np.float64), reference.sd  # type: ignore[union-attr]
    wanted = float(np.sqrt(np.mean(((own - reference.mean) / sd) ** 2)))  # type: ignore[union-attr]
    # A sample of its blocks is read for it.
    assert stored.embedding_distance == pytest.approx(wanted, rel=0.3)
    assert f"{stored.embedding_distance:.2f} standard deviations" in result.note
    # The slide that was trained on needs no such evidence.
    assert predict(chain.store, chain.model("dense"), chain.out("dense"))[0].note == ""


def test_patches_with_less_than_half_tissue_are_flagged_in_the_map_and_left_out_of_domains(
    chain: Chain,
) -> None:
    stored = _map(chain.out("dense"))
    share = Store.open(chain.store).grid("S1", GRID.key).tissue / 255
    wanted = (share >= 0.1) & (share < 0.5)
    assert 0.02 < wanted.sum() / stored.is_tissue.sum() < 0.5
    np.testing.assert_array_equal(stored.is_rim, wanted)
    flag = zarr.open_array(f"{chain.out('dense')}/S1/{GRID.key}/rim", mode="r")[...]
    np.testing.assert_array_equal(flag, wanted)
    table = table_of_map(stored)
    obs = annotated(table).obs
    np.testing.assert_allclose(obs["tissue"], share[stored.is_tissue], rtol=1e-6)
    np.testing.assert_array_equal(obs["rim"], wanted[stored.is_tissue])
    labels = domain_labels(table, 3)
    assert (labels[wanted] == -1).all()
    assert set(labels[stored.is_tissue & ~wanted]) == {0, 1, 2}


def test_python_gives_bounds_beside_every_prediction(chain: Chain, patches: Patches) -> None:
    saved = load_model(chain.model("ridge"))
    found = saved.predict(patches)
    assert found.lower is not None
    assert found.upper is not None
    assert found.values.shape == found.lower.shape == found.upper.shape == (len(patches), N_GENES)
    assert (found.lower <= found.values).all()


def test_a_model_that_was_not_calibrated_says_so_when_bounds_are_asked_for(chain: Chain) -> None:
    assert load_model(chain.model("paper")).intervals is None
    with pytest.raises(StoreError, match="not calibrated"):
        _map(chain.out("paper")).read_with_bounds((0, 1), (0, 1))


def test_depth_is_mapped_apart_from_composition(chain: Chain) -> None:
    stored = _map(chain.out("dense"))
    assert stored.depth is not None
    depth = stored.depth.read((0, stored.grid.n_rows), (0, stored.grid.n_cols))[..., 0]
    assert np.array_equal(np.isfinite(depth), np.isfinite(_values(chain.out("dense"))[..., 0]))
    (section,) = [item.section for item in load_sections(chain.sheet, chain.store, Selection())]
    measured = np.log(np.asarray(section.spots.counts.sum(axis=1)).ravel())
    under = section.overlap @ depth[section.patches.rows, section.patches.cols].astype(float)
    assert np.corrcoef(under, measured)[0, 1] > 0.5
    assert abs(under.mean() - measured.mean()) < 0.3
    assert _map(chain.out("ridge")).depth is None


def test_a_map_conditioned_on_spots_is_nearer_to_them_and_is_not_mixed_with_another(
    chain: Chain, tmp_path: Path
) -> None:
    (section,) = [item.section for item in load_sections(chain.sheet, chain.store, Selection())]
    model, expression = chain.model("ridge"), str(chain.folder / "data" / "S1.h5ad")
    said: list[str] = []
    out = str(tmp_path / "conditioned")
    predict(chain.store, model, out, slide_ids=["S1"], condition_on=expression, on_message=said.append)
    assert any(f"conditioned on {len(section.spots)} spots" in line for line in said)
    assert any("trained on spots of this slide" in line for line in said)
    target = training_section(section, load_model(model).card.genes).target

    def off(url: str) -> float:
        patches = section.patches
        mapped = _values(url)[patches.rows, patches.cols].astype(np.float32)
        return float(np.abs(spots_from_patches(section.overlap, mapped) - target).mean())

    assert off(out) < 0.8 * off(chain.out("ridge"))
    with pytest.raises(IdentityMismatchError, match="spots"):
        predict(chain.store, model, out, slide_ids=["S1"])


def test_conditioning_on_what_does_not_belong_is_refused_and_nothing_is_written(
    chain: Chain, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ExpressionError, match="none of the layouts"):
        predict(chain.store, chain.model("ridge"), str(out), condition_on=chain.sheet)
    data = anndata.read_h5ad(chain.folder / "data" / "S1.h5ad")
    data[:11].write_h5ad(tmp_path / "few.h5ad")
    with pytest.raises(ModelError, match="too few to condition on"):
        predict(chain.store, chain.model("ridge"), str(out), condition_on=str(tmp_path / "few.h5ad"))
    assert not out.exists()


def test_a_section_with_fewer_than_twenty_spots_is_left_out_and_alone_refused(
    chain: Chain, tmp_path: Path
) -> None:
    data = anndata.read_h5ad(chain.folder / "data" / "S1.h5ad")
    data[:19].write_h5ad(tmp_path / "few.h5ad")
    sheet = tmp_path / "sheet.csv"
    sheet.write_text(f"slide_id,slide,expression,mpp\nS1,{chain.slide},{tmp_path / 'few.h5ad'},{SLIDE_MPP}\n")
    said: list[str] = []
    with pytest.raises(ModelError, match=r"no section of .* has the 20 usable spots") as refused:
        train(str(sheet), chain.store, tmp_path / "model", _settings("ridge"), on_message=said.append)
    assert "\n" not in str(refused.value)
    assert any("S1: left out, since" in line for line in said)
    assert not (tmp_path / "model").exists()


def test_a_model_written_by_a_newer_version_is_refused_in_one_line(chain: Chain, tmp_path: Path) -> None:
    newer = tmp_path / "newer"
    shutil.copytree(chain.model("dense"), newer)
    config = json.loads((newer / "config.json").read_text())
    (newer / "config.json").write_text(json.dumps(config | {"format": 99}))
    assert "newer version (format 99" in _refusal(chain, newer, tmp_path / "out")


def test_the_h5ad_says_which_genes_can_be_trusted(chain: Chain, tmp_path: Path) -> None:
    write_h5ad(_map(chain.out("dense")), tmp_path / "map.h5ad")
    data = anndata.read_h5ad(tmp_path / "map.h5ad")
    assert data.var["trusted"].tolist() == (data.var["trust"] >= 0.1).tolist()
    assert (data.var["half_width"] > 0).all()
    assert np.isfinite(data.obs["log_total_counts"]).all()
