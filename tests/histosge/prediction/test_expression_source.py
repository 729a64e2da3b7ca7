"""Analyses of expression maps against numpy on the maps as zarr reads them."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import zarr
from _models import invent_model
from _stores import SPEC, Made, write_store
from sklearn.decomposition import PCA
from typer.testing import CliRunner

from featurestore.analysis.cluster_stream import ClusterStream, connect
from featurestore.analysis.kmeans import KMeansSettings, fit_kmeans
from featurestore.analysis.patch_stream import PatchStream
from featurestore.analysis.pca import fit_pca
from featurestore.analysis.summary import summarise
from featurestore.errors import AmbiguousSelectionError, IdentityMismatchError, StoreError
from histosge.prediction.expression_source import ExpressionSource
from histosge.prediction.expression_store import ExpressionStore
from histosge.prediction.predict import predict
from histosge_cli.main import app

MADE = Made((19, 23), 11, (7, 11), frame=2)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("maps")
    store = write_store(folder / "store", 3, MADE)
    invent_model(store, "S00", folder / "model", 17)
    predict(store.location.url, folder / "model", str(folder / "maps"))
    return str(folder / "maps")


def _tables(maps: str) -> dict[str, np.ndarray]:
    found = {}
    for slide_id in ("S00", "S01", "S02"):
        values = zarr.open_array(f"{maps}/{slide_id}/{SPEC.key}/expression", mode="r")[...].astype(float)
        found[slide_id] = values[np.isfinite(values[..., 0])]
    return found


def _genes(maps: str) -> list[str]:
    return list(zarr.open_array(f"{maps}/S00/{SPEC.key}/gene", mode="r")[...])


def test_means_are_columns_named_as_the_genes(maps: str, tmp_path: Path) -> None:
    ran = CliRunner().invoke(app, ["analyse", maps, "summary", "--out", str(tmp_path / "means.parquet")])
    assert ran.exit_code == 0, ran.output
    header = ran.stdout.splitlines()[0].split()
    assert header == ["slide", "patches", "absent", "shift"], "17 genes have no room on a terminal"
    frame, genes = pl.read_parquet(tmp_path / "means.parquet"), _genes(maps)
    assert frame.columns == ["slide", "patches", "absent", "shift", *genes, *(f"sd_{g}" for g in genes)]
    tables = _tables(maps)
    for row, values in enumerate([*tables.values(), np.concatenate(list(tables.values()))]):
        assert frame["patches"][row] == len(values) > 100
        np.testing.assert_allclose(frame.select(genes).row(row), values.mean(axis=0), rtol=1e-9)
        np.testing.assert_allclose(
            frame.select(f"sd_{g}" for g in genes).row(row), values.std(axis=0, ddof=1), rtol=1e-7
        )
    printed = CliRunner().invoke(app, ["analyse", maps, "summary", "--json", "--quiet"])
    assert json.loads(printed.stdout)[1][genes[4]] == frame[genes[4]][1]


def test_components_have_a_loading_for_each_gene(maps: str, tmp_path: Path) -> None:
    options = ["--components", "3", "--out", str(tmp_path / "c.parquet"), "--quiet"]
    assert CliRunner().invoke(app, ["analyse", maps, "pca", *options]).exit_code == 0
    frame = pl.read_parquet(tmp_path / "c.parquet")
    oracle = PCA(3, svd_solver="full").fit(np.concatenate(list(_tables(maps).values())))
    loadings = frame.select(_genes(maps)).to_numpy()
    np.testing.assert_allclose(np.abs(loadings), np.abs(oracle.components_), atol=1e-6)
    np.testing.assert_allclose(frame["ratio"], oracle.explained_variance_ratio_, rtol=1e-6)


def test_domains_and_similar_patches_of_maps(maps: str, tmp_path: Path) -> None:
    command = ["analyse", maps, "clusters", "--k", "3", "--labels", str(tmp_path / "domains"), "--quiet"]
    assert CliRunner().invoke(app, command).exit_code == 0
    labels = pl.read_parquet(tmp_path / "domains" / "*.parquet")
    assert labels.height == sum(map(len, _tables(maps).values()))
    place = [
        "--slide",
        "S01",
        "--row",
        "7",
        "--col",
        "9",
        "--n",
        "40",
        "--metric",
        "euclidean",
        "--exclude-um",
        "0",
    ]
    ran = CliRunner().invoke(app, ["analyse", maps, "similar", *place, "--json", "--quiet"])
    found = json.loads(ran.stdout)
    values = np.concatenate(list(_tables(maps).values()))
    here = zarr.open_array(f"{maps}/S01/{SPEC.key}/expression", mode="r")[7, 9].astype(float)
    nearest = np.sort(np.linalg.norm(values - here, axis=1))[1:41]
    np.testing.assert_allclose([row["distance"] for row in found], nearest, atol=1e-9)


@pytest.mark.e2e
def test_workers_read_maps_too(maps: str) -> None:
    source = ExpressionSource(maps)
    with connect(1, None) as client:
        shared = fit_pca(ClusterStream(client, source), 4)
    alone = fit_pca(PatchStream(source), 4)
    np.testing.assert_allclose(shared.components, alone.components, atol=1e-9)
    assert shared.columns == alone.columns == tuple(_genes(maps))


def test_what_cannot_be_compared_or_found_is_one_line(maps: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no map of slide 'S7'; it has: S00, S01, S02"):
        PatchStream(ExpressionSource(maps, ["S7"]))
    with pytest.raises(StoreError, match="no map on grid other; it has: mpp"):
        PatchStream(ExpressionSource(maps, grid="other"))
    with pytest.raises(StoreError, match="slide 'S01' has no map on grid other"):
        PatchStream(ExpressionSource(maps, ["S01"], "other"))
    ran = CliRunner().invoke(app, ["analyse", maps, "summary", "--encoder", "uni"])
    assert isinstance(ran.exception, StoreError)
    assert "no encoder to choose" in str(ran.exception)

    copy = tmp_path / "maps"
    shutil.copytree(maps, copy)
    document = copy / "S01" / SPEC.key / "expression" / "zarr.json"
    node = json.loads(document.read_text())
    node["attributes"]["made_by"]["model"] = "another"
    document.write_text(json.dumps(node))
    whole = copy / "S01" / "zarr.json"
    plain = {k: v for k, v in json.loads(whole.read_text()).items() if k != "consolidated_metadata"}
    whole.write_text(json.dumps(plain))  # read from the documents themselves
    with pytest.raises(IdentityMismatchError, match="'S00' and 'S01' were predicted by different models"):
        summarise(PatchStream(ExpressionSource(str(copy))))
    shutil.copytree(copy / "S01" / SPEC.key, copy / "S01" / "mpp2.0000_px224_stride224")
    with pytest.raises(AmbiguousSelectionError, match="several grids, slide 'S01' too; name one of: --grid"):
        summarise(PatchStream(ExpressionSource(str(copy))))


def test_a_map_that_was_begun_counts_what_is_not_predicted(maps: str, tmp_path: Path) -> None:
    copy = tmp_path / "maps"
    shutil.copytree(maps, copy)
    removed = ExpressionStore.open(str(copy)).map("S02", SPEC.key)
    block = removed.planned()[1]
    removed.array.remove_block(block)
    ran = CliRunner().invoke(app, ["analyse", str(copy), "summary"])
    n = int(removed.is_tissue[block.slices].sum())
    assert f"{n} tissue patches left out, with no prediction: S02" in " ".join(ran.stderr.split())


def test_labels_of_maps_say_which_model_and_how_many_genes(maps: str, tmp_path: Path) -> None:
    stream = PatchStream(ExpressionSource(maps))
    fit_kmeans(stream, KMeansSettings(k=3, seed=5), tmp_path / "labels")
    made_by = ExpressionStore.open(maps).map("S01", SPEC.key).array.attrs["made_by"]
    said = pl.read_parquet_metadata(tmp_path / "labels" / "S01.parquet")["made_by"]
    assert said == (
        f"k-means with 3 clusters and seed 5 on the expression of {len(_genes(maps))} genes that model "
        f"{made_by['model'][:16]} predicts"
    )
