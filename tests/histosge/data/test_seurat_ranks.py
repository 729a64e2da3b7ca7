"""Checked against scanpy's ``highly_variable_genes(flavor="seurat_v3")``, see `seurat_truth`."""

import json
from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse
from seurat_truth import GENES, N_SPOTS, N_TOP, TRUTH, section_counts

from histosge.data.gene_choice import GeneChoice
from histosge.data.loess import loess_fit
from histosge.data.sections import Spots
from histosge.data.seurat_ranks import SeuratRanks, excess_variance
from histosge.errors import ExpressionError

truth = json.loads(TRUTH.read_text())


def _section(i: int) -> Spots:
    n = N_SPOTS[i]
    barcodes = np.array([f"b{k}" for k in range(n)])
    return Spots(f"S{i}", "D", barcodes, np.zeros((n, 2)), 55.0, sparse.csr_matrix(section_counts(i)), GENES)


SECTIONS = [_section(i) for i in range(len(N_SPOTS))]


def test_genes_of_one_section_are_scanpys_in_its_order() -> None:
    assert list(GeneChoice.parse(f"seurat_v3:{N_TOP}").choose(SECTIONS[:1])) == truth["one"]


def test_genes_of_several_sections_are_those_that_scanpy_takes_by_batch() -> None:
    # Scanpy leaves ties of the median rank in the order of its columns, ours go by name: here that is the same.
    assert list(GeneChoice.parse(f"seurat_v3:{N_TOP}").choose(SECTIONS)) == truth["three"]
    assert truth["three"][:N_TOP] != truth["one"][:N_TOP]


def test_the_excess_variance_is_scanpys_number_by_number() -> None:
    found = excess_variance(SECTIONS[0].counts)
    expected = np.array(truth["one, excess variance"])
    constant = SECTIONS[0].counts.toarray().std(axis=0) == 0
    np.testing.assert_array_equal(np.isnan(found), constant)
    np.testing.assert_allclose(found[~constant], expected[~constant], rtol=1e-5)


def test_named_genes_follow_the_chosen_ones() -> None:
    chosen = GeneChoice.parse("seurat_v3:5+G011,G023").choose(SECTIONS)
    assert chosen[5:] == ("G011", "G023")
    assert list(chosen[:5]) != list(GeneChoice.parse("5").choose(SECTIONS))


def test_constant_genes_are_never_chosen() -> None:
    chosen = GeneChoice.parse(f"seurat_v3:{len(GENES)}").choose(SECTIONS)
    assert len(chosen) == len(GENES) - 2
    assert not {"G011", "G023"} & set(chosen)


def test_sections_may_be_handed_over_one_by_one_and_only_shared_genes_are_chosen() -> None:
    ranking = SeuratRanks()
    for spots in SECTIONS:
        ranking.add(spots)
    assert ranking.choose(N_TOP) == GeneChoice.parse(f"seurat_v3:{N_TOP}").choose(SECTIONS)
    best = truth["three"][0]
    kept = [i for i, gene in enumerate(GENES) if gene != best]
    without = replace(SECTIONS[0], counts=SECTIONS[0].counts[:, kept], genes=tuple(GENES[i] for i in kept))
    assert best not in GeneChoice.parse(f"seurat_v3:{N_TOP}").choose([*SECTIONS[1:], without])


def test_a_few_genes_give_no_trend_and_are_refused_with_the_other_choice() -> None:
    few = replace(SECTIONS[0], counts=SECTIONS[0].counts[:, :7], genes=GENES[:7])
    with pytest.raises(ExpressionError, match=r"'S0': no trend .* choose by the variance of log counts"):
        GeneChoice.parse("seurat_v3:3").choose([few])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("seurat_v3:", "how many"),
        ("seurat_v3:all", "how many"),
        ("seurat_v3:0", "at least 1"),
        ("seurat_v3:5+", "no gene after"),
        ("seurat_v3:x.txt", "how many"),
    ],
)
def test_a_choice_without_a_number_is_refused_before_any_data(given: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        GeneChoice.parse(given)


def test_the_curve_goes_through_a_parabola_whatever_the_span() -> None:
    x = np.random.default_rng(0).permutation(np.linspace(-3, 2, 211))
    y = 2 - x + 0.5 * x**2
    np.testing.assert_allclose(loess_fit(x, y, 0.3), y, atol=1e-9)


def test_equal_neighbours_are_refused_by_the_curve() -> None:
    with pytest.raises(ValueError, match="all have the value 1"):
        loess_fit(np.ones(50), np.arange(50.0), 0.3)
