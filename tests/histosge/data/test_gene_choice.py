import os
from pathlib import Path

import numpy as np
import pytest
from scipy import sparse

from histosge.data.gene_choice import GeneChoice
from histosge.data.genes import (
    choose_genes,
    library_size,
    read_gene_list,
    read_gene_names,
    select_target,
    shared_genes,
    usable,
)
from histosge.data.sections import Spots
from histosge.errors import ExpressionError


def _spots(counts: np.ndarray, genes: tuple[str, ...], slide_id: str = "S") -> Spots:
    n = len(counts)
    return Spots(
        slide_id,
        "D",
        np.array([f"b{i}" for i in range(n)]),
        np.zeros((n, 2)),
        55.0,
        sparse.csr_matrix(counts),
        genes,
    )


COUNTS = np.array([[90, 10, 0, 900], [10, 10, 0, 980], [50, 10, 1, 939]], dtype=np.float32)
SPOTS = _spots(COUNTS, ("varies", "flat", "rare", "house"))


def test_targets_are_log_counts_per_ten_thousand_of_the_whole_library() -> None:
    target = select_target(SPOTS, ("flat", "varies"))
    np.testing.assert_allclose(target, np.log1p(COUNTS[:, [1, 0]] / 1000 * 1e4), rtol=1e-6)
    assert target.dtype == np.float32


def test_depth_alone_does_not_move_a_target() -> None:
    deeper = _spots(COUNTS * np.array([[1], [5], [13]], dtype=np.float32), SPOTS.genes)
    np.testing.assert_allclose(
        select_target(deeper, SPOTS.genes), select_target(SPOTS, SPOTS.genes), rtol=1e-6
    )


def test_the_most_variable_genes_come_first() -> None:
    assert choose_genes([SPOTS], 2) == ("rare", "varies")
    assert "flat" not in choose_genes([SPOTS], 4)


def test_only_genes_that_all_sections_share_are_chosen() -> None:
    other = _spots(COUNTS[:, [3, 0]], ("house", "varies"), "T")
    assert shared_genes([SPOTS, other]) == ("varies", "house")
    assert set(choose_genes([SPOTS, other], 9)) == {"varies", "house"}


def test_ties_go_by_name_not_by_column() -> None:
    counts = np.array([[5, 5, 90], [1, 1, 98]], dtype=np.float32)
    assert choose_genes([_spots(counts, ("b", "a", "z"))], 2) == ("a", "b")


def test_no_variable_gene_is_refused() -> None:
    with pytest.raises(ExpressionError, match="none of 4 genes varies over 2 spots"):
        choose_genes([_spots(COUNTS[[0, 0]], SPOTS.genes)], 3)


def test_spots_under_the_floor_are_not_usable() -> None:
    assert list(usable(SPOTS, 1000)) == [True, True, True]
    assert list(usable(_spots(COUNTS * [[1], [0.1], [0.5]], SPOTS.genes), 500)) == [True, False, True]
    np.testing.assert_array_equal(library_size(SPOTS), COUNTS.sum(axis=1))


def test_a_gene_list_is_read_and_misspelt_genes_get_their_neighbours(tmp_path: Path) -> None:
    file = tmp_path / "genes.txt"
    file.write_text("# mine\nvaries\n\nhouse  # the keeper\nvaries\n")
    assert read_gene_list(str(file), [SPOTS]) == ("varies", "house")
    file.write_text("varris\n")
    with pytest.raises(ExpressionError, match="'varris': did you mean varies"):
        read_gene_list(str(file), [SPOTS])
    with pytest.raises(ExpressionError, match="nor a file with one gene a line"):
        read_gene_list(str(tmp_path / "none"), [SPOTS])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "latin-1"])
@pytest.mark.parametrize("text", ["A # für später\nB\n", '"A"\r\n"B"\r\n', "'A',\n\n B ;\n", "A\tB"])
def test_a_gene_list_may_be_in_any_usual_encoding_with_quotes(
    tmp_path: Path, encoding: str, text: str
) -> None:
    file = tmp_path / "genes.txt"
    file.write_bytes(text.encode(encoding))
    if encoding == "utf-16-le":  # without the mark at its start
        with pytest.raises(ExpressionError, match="holds binary data"):
            read_gene_names(file)
        return
    assert read_gene_names(file) == (("A\tB",) if "\t" in text else ("A", "B"))


def test_a_gene_list_that_is_no_file_of_text_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "cut").write_bytes("AB".encode("utf-16")[:-1])
    with (tmp_path / "large").open("wb") as file:
        file.truncate(17 << 20)
    for name, message in (
        ("pipe", "nor a file"),
        ("cut", "in the middle of a letter"),
        ("large", "more than 16 MB"),
        ("a\0b", "nor a file"),
        ("x" * 5000, "nor a file"),
        ("9" * 5000, "5000 digits"),
        ("9" * 5000 + "+A", "5000 digits"),
    ):
        given = name if name[0] in "9x" else str(tmp_path / name)
        with pytest.raises(ExpressionError, match=message) as refused:
            GeneChoice.parse(given)
        assert len(str(refused.value)) < 500


def test_a_gene_that_was_not_measured_is_named() -> None:
    with pytest.raises(ExpressionError, match="'S' did not measure 1 of 2 genes, such as 'x'"):
        select_target(SPOTS, ("varies", "x"))


@pytest.mark.parametrize(
    ("given", "chosen"),
    [
        (1, ("rare",)),
        ("2", ("rare", "varies")),
        ("all", ("rare", "varies", "house")),
        ("1+house,flat", ("rare", "house", "flat")),
        ("1+rare", ("rare",)),
        (["flat", "rare", "flat"], ("flat", "rare")),
    ],
)
def test_genes_are_the_most_variable_the_named_or_both(given: object, chosen: tuple[str, ...]) -> None:
    assert GeneChoice.parse(given).choose([SPOTS]) == chosen  # type: ignore[arg-type]


def test_genes_of_a_file_are_read_before_any_data(tmp_path: Path) -> None:
    file = tmp_path / "genes.txt"
    file.write_text("house\nvaries\n")
    choice = GeneChoice.parse(file)
    file.unlink()
    assert choice.choose([SPOTS]) == ("house", "varies")
    assert choice.is_given


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (0, "at least 1"),
        ([], "name at least one"),
        ("seurat", "neither a number"),
        ("3+", "neither a number"),
    ],
)
def test_a_choice_of_no_gene_is_refused_at_once(given: object, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        GeneChoice.parse(given)  # type: ignore[arg-type]


def test_a_named_gene_that_was_not_measured_is_refused_with_the_nearest() -> None:
    with pytest.raises(ExpressionError, match=r"--genes 1\+hose names gene 'hose': did you mean house"):
        GeneChoice.parse("1+hose").choose([SPOTS])
