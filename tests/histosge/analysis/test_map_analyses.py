"""Signatures, pseudobulk and Moran's I of maps, against scanpy, scipy and shapely on the maps as a whole."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import polars as pl
import pytest
import shapely
from make_maps import SLIDE_MPP, make_map, ramps
from scipy import sparse
from scipy.spatial import cKDTree
from scipy.stats import zscore

from histosge.analysis.cohort_maps import CohortMaps
from histosge.analysis.gene_sets import parse_sets, present, read_gmt
from histosge.analysis.pseudobulk import pseudobulk
from histosge.analysis.signatures import write_signatures
from histosge.analysis.variable_genes import moran_table
from histosge.errors import ExportError, HistosgeError
from histosge.exporting.open_tables import ExportSelection, open_tables
from histosge.prediction.expression_store import ExpressionStore
from histosge_cli import main

GENES = ("EPCAM", "CD3E", "COL1A1", "flat", "noise")


def _values(x_um: np.ndarray, y_um: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(11)
    first = ramps(x_um, y_um)
    return np.concatenate([first[..., :2], rng.random((*x_um.shape, 3)) * [2, 0, 1] + [0, 1.25, 0]], axis=-1)


@pytest.fixture(scope="module")
def maps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("analysis") / "maps"
    make_map(folder, "A", _values, GENES, depth=8.0)
    make_map(folder, "B", _values, GENES, depth=7.0, size_px=(900, 760))
    return folder


def _whole(maps: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return each slide's centres in microns and its values, patch by patch."""
    tables = open_tables(str(maps), ExportSelection())
    return {
        t.slide_id: (t.xy_um, np.concatenate([v for _, v in t.chunks()]).astype(np.float64)) for t in tables
    }


def test_a_signature_is_the_mean_of_z_scores_over_the_cohort(maps: Path, tmp_path: Path) -> None:
    sets = {"one": ("EPCAM",), "three": ("noise", "EPCAM", "flat")}
    frame = write_signatures(CohortMaps(maps), sets, tmp_path)
    whole = _whole(maps)
    everything = np.concatenate([values for _, values in whole.values()])
    scores = {i: zscore(everything[:, i]) for i in (0, 4)}
    expected = {"one": scores[0], "three": (scores[4] + scores[0]) / 3}  # flat has no z-score
    start = 0
    for slide_id, (xy_um, values) in whole.items():
        found = pl.read_parquet(tmp_path / f"{slide_id}.parquet")
        np.testing.assert_allclose(found.select("x_um", "y_um").to_numpy(), xy_um)
        for name, score in expected.items():
            part = score[start : start + len(values)]
            np.testing.assert_allclose(found[name], part, atol=1e-5)
            row = frame.filter((pl.col("slide") == slide_id) & (pl.col("signature") == name)).row(
                0, named=True
            )
            assert row["mean"] == pytest.approx(part.mean(), abs=1e-5)
            assert row["sd"] == pytest.approx(part.std(), rel=1e-5)
        start += len(values)


def _by_pairs(weights: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
    """Return Moran's I as it is defined, from the whole matrix of weights."""
    z = values - values.mean(axis=1, keepdims=True)
    return len(z.T) / weights.sum() * np.einsum("gi,gi->g", z, (weights @ z.T).T) / (z**2).sum(axis=1)


def _by_scanpy(weights: sparse.csr_matrix, values: np.ndarray) -> np.ndarray:
    import scanpy

    return np.asarray(scanpy.metrics.morans_i(weights, values))


# scanpy compiles its own for ten seconds.
@pytest.mark.parametrize("reference", [_by_pairs, pytest.param(_by_scanpy, marks=pytest.mark.slow)])
def test_moran_s_i_is_that_of_the_matrix_of_neighbours_and_of_scanpy(
    maps: Path, reference: Callable[[sparse.csr_matrix, np.ndarray], np.ndarray]
) -> None:
    frame = moran_table(CohortMaps(maps))
    for slide_id, (xy_um, values) in _whole(maps).items():
        stride = 8.0
        pairs = cKDTree(xy_um).query_pairs(1.01 * stride, output_type="ndarray")
        n = len(xy_um)
        beside = sparse.coo_matrix((np.ones(len(pairs)), pairs.T), shape=(n, n))
        beside = sparse.csr_matrix(beside + beside.T)
        assert (beside.sum(axis=1) > 0).all()
        weights = sparse.csr_matrix(sparse.diags(1 / np.asarray(beside.sum(axis=1)).ravel()) @ beside)
        varying = [0, 1, 2, 4]
        expected = reference(weights, np.ascontiguousarray(values[:, varying].T))
        of_slide = frame.filter(pl.col("slide") == slide_id)
        found = dict(zip(of_slide["gene"], of_slide["moran"], strict=True))
        np.testing.assert_allclose([found[GENES[i]] for i in varying], expected, atol=1e-9)
        assert np.isnan(found["flat"])
        assert of_slide["gene"].to_list()[-1] == "flat"  # after all others, not before them
        ranked = of_slide["moran"].to_list()[:-1]
        assert ranked == sorted(ranked, reverse=True)
        assert set(of_slide["gene"].to_list()[:2]) == {"EPCAM", "CD3E"}


def test_pseudobulk_of_slides_has_mean_rates_and_predicted_counts(maps: Path) -> None:
    data = pseudobulk(CohortMaps(maps))
    assert data.obs_names.tolist() == ["A", "B"]
    for row, (slide_id, (_, values)) in enumerate(_whole(maps).items()):
        rate = np.expm1(values)
        np.testing.assert_allclose(data.X[row], np.log1p(rate.mean(axis=0)), rtol=1e-5)
        np.testing.assert_allclose(data.layers["mean_log1p"][row], values.mean(axis=0), rtol=1e-5)
        library = np.exp({"A": 8.0, "B": 7.0}[slide_id])
        np.testing.assert_array_equal(data.layers["counts"][row], np.rint((rate * library / 1e4).sum(axis=0)))
        assert data.obs["n_patches"].iloc[row] == len(values)


def _region(name: str, ring: list[list[float]], **properties: object) -> dict[str, object]:
    geometry = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    return {
        "type": "Feature",
        "geometry": geometry,
        "properties": {"objectType": "annotation", "name": name, **properties},
    }


REGIONS = [
    _region("tumour", [[400, 300], [600, 320], [500, 560]]),
    _region("stroma", [[600, 400], [760, 400], [760, 560], [600, 560]]),
    _region("tumour", [[620, 300], [700, 300], [700, 380]]),
    _region("beside", [[5000, 5000], [5100, 5000], [5100, 5100]]),
]


def test_pseudobulk_of_regions_takes_the_patches_whose_centre_lies_in_them(
    maps: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": REGIONS}))
    data = pseudobulk(CohortMaps(maps, ["A"]), tmp_path / "r.geojson")
    assert data.obs_names.tolist() == ["A_tumour", "A_stroma"]
    xy_um, values = _whole(maps)["A"]
    for row, parts in enumerate(((0, 2), (1,))):
        areas = [shapely.geometry.shape(REGIONS[i]["geometry"]) for i in parts]
        inside = np.array([any(a.contains(shapely.Point(xy)) for a in areas) for xy in xy_um / SLIDE_MPP])
        assert inside.sum() == data.obs["n_patches"].iloc[row] > 5
        np.testing.assert_allclose(data.X[row], np.log1p(np.expm1(values[inside]).mean(axis=0)), rtol=1e-5)


def test_gmt_files_are_read_and_genes_that_are_not_there_are_said(tmp_path: Path) -> None:
    (tmp_path / "s.gmt").write_text("TLS\thttp://x\tCD3E\tCXCL13\tCD3E\n\nECM\tna\tCOL1A1\t\nNONE\tna\tXYZ\n")
    sets = read_gmt(tmp_path / "s.gmt")
    assert sets == {"TLS": ("CD3E", "CXCL13"), "ECM": ("COL1A1",), "NONE": ("XYZ",)}
    kept, remarks = present(sets, GENES)
    assert kept == {"TLS": ("CD3E",), "ECM": ("COL1A1",)}
    assert remarks == [
        "TLS: 1 of 2 genes are in the map",
        "NONE: 0 of 1 genes are in the map; the set is left out",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no set of genes"),
        ("A\tx", "line 1 of .* is no set of genes"),
        ("A\tx\tg\nA\tx\th", "names the set 'A' twice"),
        ("A,x,g", "is no set of genes"),
    ],
)
def test_files_that_are_no_gmt_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.gmt").write_text(text)
    with pytest.raises(ExportError, match=message):
        read_gmt(tmp_path / "s.gmt")


def test_the_printed_mean_of_a_signature_of_one_slide_is_0(
    maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "analyse",
        str(maps),
        "signatures",
        str(tmp_path / "scores"),
        "--slide",
        "B",
        "--set",
        "A=noise",
        "--quiet",
    ]
    monkeypatch.setattr("sys.argv", ["histosge", *words])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert not stopped.value.code
    assert capsys.readouterr().out.splitlines()[1].split()[:4] == ["B", "A", "1", "0"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda maps, tmp: parse_sets(["EPCAM,CD3E"]), "give NAME=A,B,C"),
        (lambda maps, tmp: parse_sets(["a=x", "a=y"]), "given twice"),
        (lambda maps, tmp: present({"a": ("ENSG1",)}, GENES), "no gene of 1 sets is in the map"),
        (
            lambda maps, tmp: write_signatures(CohortMaps(maps), {"row": ("EPCAM",)}, tmp),
            "cannot be called 'row'",
        ),
        (lambda maps, tmp: CohortMaps(maps, ["C"]), "no map of slide 'C'"),
        (lambda maps, tmp: pseudobulk(CohortMaps(maps), tmp), r"there is no .*A.geojson; add it"),
        (
            lambda maps, tmp: pseudobulk(CohortMaps(maps), tmp / "r.geojson"),
            "has regions of one slide, the store has 2",
        ),
    ],
)
def test_what_cannot_be_analysed_is_one_line(
    maps: Path, tmp_path: Path, call: Callable[[Path, Path], object], message: str
) -> None:
    with pytest.raises(HistosgeError, match=message) as refused:
        call(maps, tmp_path)
    assert "\n" not in str(refused.value)


def test_maps_of_two_models_are_not_mixed(tmp_path: Path) -> None:
    make_map(tmp_path / "maps", "A")
    make_map(tmp_path / "maps", "B", model="another")
    with pytest.raises(ExportError, match="'A' and 'B' were predicted by different models"):
        moran_table(CohortMaps(tmp_path / "maps"))
    assert ExpressionStore.open(str(tmp_path / "maps"))


class Ran(NamedTuple):
    code: int
    out: str
    err: str


def test_the_commands_write_what_the_functions_return(
    maps: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*arguments: object) -> Ran:
        monkeypatch.setattr("sys.argv", ["histosge", "analyse", str(maps), *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main.main()
        return Ran(int(stopped.value.code or 0), *capsys.readouterr())

    (tmp_path / "scores").mkdir()
    call = ("signatures", tmp_path / "scores", "--set", "x=EPCAM,GONE")
    ran = run(*call)
    assert ran.code == 0
    assert "x: 1 of 2 genes are in the map" in ran.err
    assert {file.name for file in (tmp_path / "scores").iterdir()} == {"A.parquet", "B.parquet"}
    assert run(*call).code == 0
    refused = run("signatures", tmp_path / "scores", "--set", "x=CD3E")
    assert (refused.code, "--overwrite" in refused.err) == (2, True)
    assert run("signatures", tmp_path / "scores").code == 2
    (tmp_path / "r.geojson").write_text(json.dumps(REGIONS))
    call = ("pseudobulk", tmp_path / "p.h5ad", "--slide", "A", "--regions", tmp_path / "r.geojson")
    assert "2 profiles x 5 genes" in run(*call).out
    assert "nothing to do, 2 profiles" in run(*call).out
    assert anndata.read_h5ad(tmp_path / "p.h5ad").obs["region"].tolist() == ["tumour", "stroma"]
    assert run("pseudobulk", tmp_path / "p.h5ad").code == 2
    ran = run("moran", "--out", tmp_path / "m.parquet", "--slide", "B", "--json")
    assert [row["gene"] for row in json.loads(ran.out)][-1] == "flat"
    assert pl.read_parquet(tmp_path / "m.parquet")["gene"].to_list()[-1] == "flat"
