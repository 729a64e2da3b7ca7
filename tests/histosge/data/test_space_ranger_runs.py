"""Space Ranger folders that were aggregated, joined, renamed or written again by other tools."""

import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import polars as pl
import pytest
from write_layouts import GENES, counts, tenx_h5, visium, xenium

from histosge.data.expression.find_expression import find_expression
from histosge.data.expression.loaded_expression import LoadedExpression, SlideFrame
from histosge.errors import ExpressionError

MPP = 0.7
NAMES = "barcode,in_tissue,array_row,array_col,pxl_row_in_fullres,pxl_col_in_fullres"


def find(path: Path | str, slide_id: str = "S") -> LoadedExpression:
    return find_expression(path, SlideFrame(slide_id, "D", MPP))


def barcodes(suffix: str, n: int = 41) -> list[str]:
    return [f"BC{i:03d}{suffix}" for i in range(n)]


def rewrite(home: Path, change: Callable[[list[str]], list[str]]) -> Path:
    """Change the lines of a folder's positions, header first."""
    file = next((home / "spatial").glob("tissue_positions*.csv"))
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    return home


def test_positions_without_a_header_keep_their_first_spot(tmp_path: Path) -> None:
    whole = find(visium(tmp_path / "a", "tissue_positions.csv"))
    bare = find(rewrite(visium(tmp_path / "b", "tissue_positions.csv"), lambda lines: lines[1:]))
    named = find(rewrite(visium(tmp_path / "c", "tissue_positions_list.csv"), lambda lines: [NAMES, *lines]))
    for found in (bare, named):
        assert list(found.spots.barcodes) == list(whole.spots.barcodes)
        np.testing.assert_array_equal(found.spots.xy_um, whole.spots.xy_um)
    assert "BC000-1" in whole.spots.barcodes


def test_columns_in_another_order_are_read_by_their_names(tmp_path: Path) -> None:
    def reverse(lines: list[str]) -> list[str]:
        return [",".join([*line.split(",")[::-1], "more"]) for line in lines]

    whole = find(visium(tmp_path / "a", "tissue_positions.csv"))
    turned = find(rewrite(visium(tmp_path / "b", "tissue_positions.csv"), reverse))
    np.testing.assert_array_equal(turned.spots.xy_um, whole.spots.xy_um)
    with pytest.raises(
        ExpressionError, match=r"7 columns \(pxl_col_in_fullres, .*Space Ranger writes barcode"
    ):
        find(rewrite(tmp_path / "b", lambda lines: [lines[0].replace("barcode", "name"), *lines[1:]]))


@pytest.mark.parametrize(("yes", "no"), [("True", "False"), ("yes", "no"), ("TRUE", "FALSE"), ("1.0", "0.0")])
def test_tissue_flags_may_be_words(tmp_path: Path, yes: str, no: str) -> None:
    def words(lines: list[str]) -> list[str]:
        cells = [line.split(",") for line in lines[1:]]
        return [lines[0], *(",".join([c[0], yes if c[1] == "1" else no, *c[2:]]) for c in cells)]

    found = find(rewrite(visium(tmp_path / "a", "tissue_positions.csv"), words))
    assert len(found.spots) == 41
    assert "1 spot marked as off tissue left out" in found.describe(MPP)


def test_a_flag_that_is_neither_is_refused(tmp_path: Path) -> None:
    home = rewrite(
        visium(tmp_path, "tissue_positions.csv"),
        lambda lines: [line.replace(",1,", ",perhaps,", 1) for line in lines],
    )
    with pytest.raises(ExpressionError, match="in_tissue is 'perhaps' for"):
        find(home)


def test_barcodes_without_their_suffix_are_matched_and_it_is_said(tmp_path: Path) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    whole = find(home)
    tenx_h5(home / "filtered_feature_bc_matrix.h5", barcodes("", 42)[::-1], counts(42))
    found = find(home)
    assert list(found.spots.barcodes) == [b.removesuffix("-1") for b in whole.spots.barcodes]
    np.testing.assert_array_equal(found.spots.xy_um, whole.spots.xy_um)
    assert "barcodes matched without their suffix" in found.describe(MPP)


def test_barcodes_of_another_sample_are_refused_with_examples(tmp_path: Path) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    tenx_h5(home / "filtered_feature_bc_matrix.h5", ["XY1-1", "XY2-1"], counts(2))
    with pytest.raises(
        ExpressionError, match=r"none of 2 barcodes of .*such as 'XY1-1', is in .*such as 'BC000'"
    ):
        find(home)


def test_barcodes_without_a_position_and_spots_without_counts_are_counted(tmp_path: Path) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    tenx_h5(home / "filtered_feature_bc_matrix.h5", [*barcodes("-1", 37), "XY-1", "YX-1"], counts(39))
    text = find(home).describe(MPP)
    assert "2 spots without a position left out" in text
    assert "4 spots on tissue without counts" in text


@pytest.mark.parametrize("where", ["positions", "matrix"])
def test_a_barcode_that_occurs_twice_is_refused(tmp_path: Path, where: str) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    if where == "positions":
        rewrite(home, lambda lines: [*lines, lines[3]])
    else:
        tenx_h5(home / "filtered_feature_bc_matrix.h5", ["BC001-1", "BC001-1"], counts(2))
    with pytest.raises(ExpressionError, match=r"names.* barcode .*twice"):
        find(home)


def aggregated(folder: Path, *, positions: bool) -> Path:
    """Write what `spaceranger aggr` leaves of two runs whose positions differ."""
    runs = {
        "LV1": visium(folder / "one", "tissue_positions.csv"),
        "LB2": visium(folder / "two", "tissue_positions.csv"),
    }
    rewrite(runs["LB2"], lambda lines: [lines[0], *(shift(line) for line in lines[1:])])
    home = folder / "agg" / "outs"
    tables = []
    for i, (name, run) in enumerate(runs.items(), 1):
        (home / "spatial" / name).mkdir(parents=True)
        shutil.copy(run / "spatial" / "scalefactors_json.json", home / "spatial" / name)
        table = pl.read_csv(run / "spatial" / "tissue_positions.csv")
        if positions:
            tables.append(table.with_columns(pl.col("barcode").str.replace("-1$", f"-{i}")))
        else:
            shutil.copy(run / "spatial" / "tissue_positions.csv", home / "spatial" / name)
    if positions:
        pl.concat(tables).write_csv(home / "aggr_tissue_positions.csv")
    (home / "aggregation.csv").write_text("library_id,molecule_h5,cloupe_file\nLV1,a,b\nLB2,c,d\n")
    tenx_h5(home / "filtered_feature_bc_matrix.h5", [*barcodes("-1"), *barcodes("-2")], counts(82))
    return home


def shift(line: str) -> str:
    cells = line.split(",")
    return ",".join([*cells[:4], str(int(cells[4]) + 1000), cells[5]])


@pytest.mark.parametrize("positions", [True, False])
def test_each_slide_gets_its_run_of_an_aggregation(tmp_path: Path, positions: bool) -> None:
    home = aggregated(tmp_path, positions=positions)
    for i, name in enumerate(("LV1", "LB2")):
        alone = find(tmp_path / ("one", "two")[i]).spots
        for found in (find(home, name), find(f"{home.parent}#{name}"), find(f"{home}#{i + 1}")):
            assert list(found.spots.barcodes) == barcodes(f"-{i + 1}")
            order = [list(alone.barcodes).index(b) for b in barcodes("-1")]
            np.testing.assert_array_equal(found.spots.xy_um, alone.xy_um[order])
            np.testing.assert_array_equal(
                found.spots.counts.toarray(), counts(82).toarray()[41 * i : 41 * (i + 1), [0, 2, 3]]
            )
            assert f"run '{name}' of 2 aggregated ones, 41 of 82 barcodes" in found.describe(MPP)
    with pytest.raises(
        ExpressionError, match=r"2 sections \(aggregated runs: LV1, LB2\), and none is 'S'.*outs#LV1"
    ):
        find(home)


def test_a_run_of_an_aggregation_takes_no_other_sample_s_positions(tmp_path: Path) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    tenx_h5(home / "filtered_feature_bc_matrix.h5", [*barcodes("-1"), *barcodes("-2", 37)], counts(78))
    with pytest.raises(ExpressionError, match="aggregated runs: 1, 2"):
        find(home)
    assert list(find(f"{home}#1").spots.barcodes) == barcodes("-1")
    with pytest.raises(
        ExpressionError, match=r"is not of the sample whose positions are in .*4 on tissue are missing"
    ):
        find(f"{home}#2")


def test_of_two_samples_matrices_beside_one_spatial_folder_only_its_own_is_taken(tmp_path: Path) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    mine, other = home / "A_filtered_feature_bc_matrix.h5", home / "B_filtered_feature_bc_matrix.h5"
    (home / "filtered_feature_bc_matrix.h5").unlink()
    tenx_h5(mine, barcodes("-1"), counts(41))
    tenx_h5(other, barcodes("-1", 37), counts(37, 5))
    with pytest.raises(
        ExpressionError, match=r"2 sections \(matrices of several samples: A, B\), and none is 'S'"
    ):
        find(home)
    for found in (find(home, "A"), find(f"{home}#A"), find(mine)):
        np.testing.assert_array_equal(found.spots.counts.toarray(), counts(41).toarray()[:, [0, 2, 3]])
    for place, slide_id in ((home, "B"), (f"{home}#B", "S"), (other, "S")):
        with pytest.raises(ExpressionError, match="give each sample a folder of its own"):
            find(place, slide_id)


def test_a_prefixed_xenium_matrix_is_found(tmp_path: Path) -> None:
    plain = find(xenium(tmp_path / "a")).spots
    home = xenium(tmp_path / "b")
    (home / "cell_feature_matrix.h5").rename(home / "Xenium_V1_cell_feature_matrix.h5")
    for path in (home, home / "Xenium_V1_cell_feature_matrix.h5"):
        np.testing.assert_array_equal(find(path).spots.counts.toarray(), plain.counts.toarray())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m["indices"].__setitem__(0, 10_000), "sparse counts are damaged"),
        (lambda m: m["indices"].__setitem__(0, -7), "sparse counts are damaged"),
        (lambda m: m["indptr"].__setitem__(3, 10**6), "damaged"),
        (lambda m: m.__delitem__("features"), "cannot be read as a 10x matrix"),
        (lambda m: m["data"].__setitem__(0, -1), "negative"),
        (
            lambda m: m.create_dataset("big", (2**40, 2**20), "i8", chunks=(1024, 1024)),
            "claims 9.22e.18 bytes",
        ),
        (
            lambda m: m.__setitem__("far", h5py.ExternalLink("/dev/zero", "/")),
            "'far' is a link to another file",
        ),
    ],
)
def test_a_damaged_matrix_is_one_line(
    tmp_path: Path, spoil: Callable[[h5py.Group], None], message: str
) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    with h5py.File(home / "filtered_feature_bc_matrix.h5", "a") as h5:
        spoil(h5["matrix"])
    with pytest.raises(ExpressionError, match=message) as refused:
        find(home)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ["barcodes.tsv.gz", "features.tsv.gz", "matrix.mtx.gz"])
@pytest.mark.parametrize("kept", [0, 40])
def test_a_cut_matrix_market_folder_is_one_line(tmp_path: Path, name: str, kept: int) -> None:
    home = visium(tmp_path, "tissue_positions.csv", mtx=True)
    file = home / "filtered_feature_bc_matrix" / name
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ExpressionError, match=r"cannot be read as|matrix.mtx is") as refused:
        find(home)
    assert "\n" not in str(refused.value)


def test_a_matrix_market_header_s_size_is_not_believed(tmp_path: Path) -> None:
    home = visium(tmp_path, "tissue_positions.csv", mtx=True)
    folder = home / "filtered_feature_bc_matrix"
    (folder / "matrix.mtx.gz").unlink()
    for sizes, message in (
        (f"{10**12} {10**12} 1", "matrix.mtx is 1000000000000 x"),
        (f"{len(GENES)} 42 {10**14}", "claims 100000000000000 entries"),
    ):
        (folder / "matrix.mtx").write_text(
            f"%%MatrixMarket matrix coordinate integer general\n{sizes}\n1 1 1\n"
        )
        with pytest.raises(ExpressionError, match=message):
            find(home)


@pytest.mark.parametrize("kept", [0, 300])
def test_cut_parquet_positions_are_one_line(tmp_path: Path, kept: int) -> None:
    home = visium(tmp_path, "tissue_positions.parquet")
    file = home / "spatial" / "tissue_positions.parquet"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ExpressionError, match="cannot be read as tissue positions") as refused:
        find(home)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ["[]", "7", "{", "[" * 100_000, "\0", '{"bin_size_um": -8}', '{"bin_size_um": "8"}']
)
def test_damaged_scale_factors_are_one_line(tmp_path: Path, text: str) -> None:
    home = visium(tmp_path, "tissue_positions.csv")
    (home / "spatial" / "scalefactors_json.json").write_text(text)
    with pytest.raises(ExpressionError, match=r"is damaged|should be a positive number"):
        find(home)
