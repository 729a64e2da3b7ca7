"""AnnData that is odd, damaged or made to do harm: read right, or refused in one line, with bounded memory and time."""

import os
import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame, unique_names
from histosge.errors import ExpressionError

N, MPP = 7, 0.5


def make(path: Path, **uns: Any) -> Path:
    data = anndata.AnnData(
        sparse.csr_matrix(np.random.default_rng(1).poisson(9, (N, 5)).astype(np.float32)),
        obs=pd.DataFrame(index=[f"s{i}" for i in range(N)]),
        var=pd.DataFrame(index=list("ABCDE")),
    )
    data.obsm["spatial"] = np.stack([np.arange(N) * 100.0, np.arange(N) * 10.0], axis=1)
    data.uns.update(uns)
    data.write_h5ad(path)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return make(tmp_path / "a.h5ad")


def find(path: Path | str) -> LoadedExpression:
    return find_expression(path, SlideFrame("S", "D", MPP))


def refusal(path: Path | str, message: str) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ExpressionError, match=message) as refused:
        find(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20  # KB
    assert "\n" not in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize(
    "width", [-5.0, float("nan"), float("inf"), 1e12, 1e-9, "89", np.array([89.0, 90.0]), {"a": 1}]
)
@pytest.mark.parametrize("where", ["spot_diameter_fullres", "spot_diameter_um"])
def test_an_absurd_spot_diameter_is_refused(tmp_path: Path, width: object, where: str) -> None:
    group = "scalefactors" if "fullres" in where else "metadata"
    path = make(tmp_path / "a.h5ad", spatial={"L": {group: {where: width}}})
    refusal(path, f"{where} is .*should be a positive number|a spot would be .* µm wide")


def test_a_diameter_of_0_is_as_if_it_were_missing(tmp_path: Path) -> None:
    path = make(tmp_path / "a.h5ad", spatial={"L": {"scalefactors": {"spot_diameter_fullres": 0}}})
    assert "Visium's 55 µm assumed" in find(path).describe(MPP)


@pytest.mark.parametrize(
    "spatial",
    [
        True,
        7,
        "text",
        np.arange(3),
        {"is_single": True},
        {"L": 3},
        {"L": {"scalefactors": "x", "metadata": 1}},
    ],
)
def test_any_type_of_uns_spatial_is_read(tmp_path: Path, spatial: object) -> None:
    found = find(make(tmp_path / "a.h5ad", spatial=spatial))
    assert (len(found.spots), found.spots.diameter_um) == (N, 55)


@pytest.mark.parametrize("flag", ["True", "1", "yes", True, 1, 1.0])
def test_in_tissue_of_any_type_is_read(tmp_path: Path, flag: Any) -> None:
    data = anndata.read_h5ad(make(tmp_path / "a.h5ad"))
    off: Any = (
        {"True": "False", "1": "0", "yes": "no"}.get(flag, type(flag)(0))
        if isinstance(flag, str)
        else type(flag)(0)
    )
    data.obs["in_tissue"] = pd.Series([flag, flag, off, flag, off, flag, flag], index=data.obs_names)
    data.write_h5ad(tmp_path / "b.h5ad")
    found = find(tmp_path / "b.h5ad")
    assert list(found.spots.barcodes) == ["s0", "s1", "s3", "s5", "s6"]
    assert "2 spots marked as off tissue left out" in found.describe(MPP)


@pytest.mark.parametrize("value", [1e12, -1e12, np.inf, np.nan])
def test_a_position_that_is_none_is_left_out_and_counted(tmp_path: Path, value: float) -> None:
    data = anndata.read_h5ad(make(tmp_path / "a.h5ad"))
    data.obsm["spatial"][3, 1] = value
    data.write_h5ad(tmp_path / "b.h5ad")
    found = find(tmp_path / "b.h5ad")
    assert "s3" not in found.spots.barcodes
    assert "1 spot without a position left out" in found.describe(MPP)


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.full((N, 2), b"x"), "holds no numbers"),
        (np.zeros(N), "has shape"),
        (np.zeros((N, 1)), "has shape"),
    ],
)
def test_positions_of_another_kind_are_refused(path: Path, positions: np.ndarray, message: str) -> None:
    with h5py.File(path, "a") as h5:
        del h5["obsm/spatial"]
        h5["obsm/spatial"] = positions
        h5["obsm/spatial"].attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
    refusal(path, f"{message}|cannot be read as AnnData")


@pytest.mark.parametrize("layer", [False, True])
def test_without_x_counts_come_from_the_layer_or_raw(tmp_path: Path, layer: bool) -> None:
    data = anndata.read_h5ad(make(tmp_path / "a.h5ad"))
    whole = data.X.toarray()
    if layer:
        data.layers["counts"] = data.X.copy()
    else:
        data.raw = data.copy()
    data.X = None
    data.write_h5ad(tmp_path / "b.h5ad")
    np.testing.assert_array_equal(find(tmp_path / "b.h5ad").spots.counts.toarray(), whole)
    del data.raw
    # Newer releases of anndata list X among the layers, as None.
    for name in [name for name in data.layers if name is not None]:
        del data.layers[name]
    data.layers["log"] = whole
    data.write_h5ad(tmp_path / "c.h5ad")
    refusal(tmp_path / "c.h5ad", r"has no counts: put them in X or .*\(layers hold log\)")


def test_counts_of_raw_come_with_the_genes_of_raw(tmp_path: Path) -> None:
    data = anndata.read_h5ad(make(tmp_path / "a.h5ad"))
    whole = data.X.toarray()
    data.raw = data.copy()
    data = data[:, :2].copy()
    data.X = sparse.csr_matrix(np.log1p(data.X.toarray()))
    data.write_h5ad(tmp_path / "b.h5ad")
    found = find(tmp_path / "b.h5ad")
    assert found.spots.genes == tuple("ABCDE")
    np.testing.assert_array_equal(found.spots.counts.toarray(), whole)
    assert "counts of raw.X taken, since X is normalised" in found.describe(MPP)


@pytest.mark.parametrize("value", [-1, np.nan, np.inf, -np.inf, 0.5, 1e30])
def test_counts_that_are_none_are_refused(path: Path, value: float) -> None:
    with h5py.File(path, "a") as h5:
        h5["X/data"][2] = value
    refusal(path, "negative or missing|look normalised|counts reach 1e.30")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda h: h["X/indices"].__setitem__(0, 10_000), "sparse counts are damaged"),
        (lambda h: h["X/indices"].__setitem__(0, -3), "sparse counts are damaged"),
        (lambda h: h["X/indptr"].__setitem__(3, 10_000), "damaged|cannot be read as AnnData"),
        (lambda h: h["X"].attrs.__setitem__("shape", [2**60, 5]), "cannot be read as AnnData"),
        (lambda h: h["X"].attrs.__setitem__("encoding-type", "unknown"), "cannot be read as AnnData"),
        (lambda h: h["obs"].attrs.__setitem__("_index", "nothing"), "cannot be read as AnnData"),
        (lambda h: h["obs"].attrs.__setitem__("encoding-type", b"\xff"), "cannot be read as AnnData"),
        (lambda h: h.__delitem__("var"), "is no AnnData file: it holds"),
        (
            lambda h: h.create_dataset("layers/counts", (2**40, 2**20), "i8", chunks=(1024, 1024)),
            "claims 9.22e.18 bytes",
        ),
        (lambda h: h.create_dataset("uns/big", (2**30,), "f8"), "claims 8.59e.09 bytes"),
        (
            lambda h: h.__setitem__("uns/far", h5py.ExternalLink("/dev/zero", "/")),
            "'far' is a link to another file",
        ),
        (
            lambda h: h.create_dataset("uns/raw", (9,), "u1", external=[("/dev/zero", 0, 9)]),
            "lies in another file",
        ),
        (lambda h: h["obs"].__setitem__("self", h["obs"]), None),
    ],
)
def test_a_damaged_or_hostile_file_is_one_line(
    path: Path, spoil: Callable[[h5py.File], object], message: str | None
) -> None:
    with h5py.File(path, "a") as h5:
        spoil(h5)
    if message is None:
        find(path)  # what is not needed may be anything
    else:
        refusal(path, message)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as HDF5"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 5\n",
            "Git LFS pointer.*git lfs pull",
        ),
        (b"\x89HDF\r\n\x1a\n" + b"\0" * 100, "cannot be read as HDF5"),
        (b"<html>404</html>", "cannot be read as HDF5"),
        (b"PK\x03\x04", "cannot be read as HDF5"),
    ],
)
def test_what_is_no_hdf5_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.h5ad").write_bytes(content)
    refusal(tmp_path / "a.h5ad", message)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_cut_file_is_one_line(path: Path, share: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refusal(path, "cannot be read as")


def test_nothing_is_waited_for_and_no_path_is_a_traceback(tmp_path: Path, path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.h5ad")
    refusal(tmp_path / "pipe.h5ad", "is a pipe or a device")
    refusal("/dev/zero", "is a pipe or a device")
    for place in (f"{tmp_path}/a\0b.h5ad", f"{tmp_path}/{'x' * 5000}.h5ad", f"{path}/inside.h5ad", ""):
        assert len(refusal(place, "there is no expression at|none of the layouts")) < 800


def test_a_pipe_among_the_chunks_of_a_zarr_is_not_waited_for(tmp_path: Path, path: Path) -> None:
    data = anndata.read_h5ad(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that another format will be the default
        data.write_zarr(tmp_path / "a.zarr", convert_strings_to_categoricals=False)
    assert len(find(tmp_path / "a.zarr").spots) == N
    chunk = next(file for file in (tmp_path / "a.zarr" / "obsm" / "spatial").rglob("*") if file.is_file())
    chunk.unlink()
    os.mkfifo(chunk)
    refusal(tmp_path / "a.zarr", "is a pipe or a device")


def test_genes_of_one_name_are_numbered_as_anndata_numbers_them() -> None:
    for names in (
        ["A", "A", "A-1"],
        ["A", "A-1", "A"],
        ["A-1", "A", "A", "A", "A-2"],
        ["B", "A", "B", "B-1", "B"],
    ):
        made = unique_names(names)
        assert len(set(made)) == len(names)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the numbers collide with names
            assert list(made) == anndata.utils.make_index_unique(pd.Index(names)).tolist()
