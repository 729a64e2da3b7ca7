"""Maps scored at bins of single molecules of a Xenium run."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy import sparse
from write_xenium_truth import XeniumTruth, write_xenium

import histosge
from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.expression import foreign_files
from histosge.data.expression.find_expression import find_expression, find_molecules
from histosge.data.expression.layouts import xenium as xenium_layout
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.expression.molecules import MoleculeBins, Molecules, bin_molecules, count_genes
from histosge.data.expression.pseudo_spots import pool_spots
from histosge.data.sections import Patches, Section, Spots
from histosge.data.spot_overlap import spot_overlap
from histosge.errors import ExpressionError, HistosgeError
from histosge.evaluation.bin_scores import HeldOutBins
from histosge.evaluation.fine_bins import FineBins, MoleculeUnits
from histosge.evaluation.tasks import Plan
from histosge.synthetic import GeneCounts, SyntheticCohort, SyntheticSpec, Truth, load_truth, make_cohort

SPEC = SyntheticSpec(
    size_px=(808, 760), genes=GeneCounts(8, 3, 2, 3), spot_diameter_um=41.0, spot_pitch_um=59.0
)
FRAME = SlideFrame("S2", "D", SPEC.mpp, SPEC.size_px)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> SyntheticCohort:
    return make_cohort(tmp_path_factory.mktemp("cohort"), SPEC, 2)


@pytest.fixture(scope="module")
def truth(cohort: SyntheticCohort) -> Truth:
    return load_truth(cohort.sections[1].truth)


@pytest.fixture(scope="module")
def run(truth: Truth, tmp_path_factory: pytest.TempPathFactory) -> XeniumTruth:
    return write_xenium(tmp_path_factory.mktemp("xenium") / "run", truth, SPEC.mpp, counts_per_um2=0.5)


@dataclass(frozen=True)
class Pooled:
    """All bins with their genes."""

    bins: MoleculeBins
    spots: Spots
    cells: sparse.csr_matrix


def pooled(folder: Path, side_um: float) -> Pooled:
    molecules = find_molecules(folder, FRAME)
    assert molecules is not None
    return counted(molecules, side_um)


def counted(molecules: Molecules, side_um: float) -> Pooled:
    bins = bin_molecules(molecules, FRAME, side_um)
    return Pooled(bins, *count_genes(molecules, FRAME, bins, np.arange(len(bins))))


def histogram(run: XeniumTruth, side_um: float) -> np.ndarray:
    """Molecules of each gene in each square by numpy's own histogram, ``(gene, row, col)``."""
    size_um = np.array(SPEC.size_px) * SPEC.mpp
    edges = [np.arange(int(np.ceil(side / side_um)) + 1) * side_um for side in size_um[::-1]]
    found = []
    for gene in range(run.gene.max() + 1):
        x_um, y_um = run.xy_um[run.counted & (run.gene == gene)].T
        found.append(np.histogram2d(y_um, x_um, edges)[0])
    return np.stack(found)


@pytest.mark.parametrize("side_um", [8.0, 11.5])
@pytest.mark.parametrize(
    ("name", "early"),
    [
        ("transcripts.parquet", False),
        ("transcripts.parquet", True),
        ("transcripts.csv.gz", False),
        ("transcripts.csv.gz", True),
    ],
)
def test_bins_of_molecules_are_those_of_a_plain_histogram_on_the_slide(
    truth: Truth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, early: bool, side_um: float
) -> None:
    # Parts far smaller than the file, so that they end anywhere.
    monkeypatch.setattr(foreign_files, "ROWS", 7_001)
    monkeypatch.setattr(xenium_layout, "BLOCK_BYTES", 300_007)
    run = write_xenium(tmp_path / "run", truth, SPEC.mpp, counts_per_um2=0.1, name=name, early=early)
    whole = pooled(run.folder, side_um)
    bins, spots = whole.bins, whole.spots
    expected = histogram(run, side_um)
    row, col = np.array([barcode.split("x") for barcode in spots.barcodes.tolist()], int).T
    np.testing.assert_allclose(spots.xy_um, (np.stack([col, row], axis=1) + 0.5) * side_um)
    dense = np.zeros(expected.shape)
    dense[:, row, col] = spots.counts.toarray().T
    # Positions are stored as float32: one or two molecules lie within their rounding of a bin's edge.
    assert np.abs(dense - expected).sum() <= 4
    assert bins.n_kept == dense.sum() == run.counted.sum()
    assert bins.n_other == (run.gene < 0).sum()
    assert bins.n_low == ((run.gene >= 0) & (run.qv < 20)).sum()
    assert bins.n_off == 0
    assert spots.genes == truth.genes
    np.testing.assert_array_equal(bins.counts, np.asarray(spots.counts.sum(axis=1)).ravel())
    # Of some bins the same counts.
    molecules = find_molecules(run.folder, FRAME)
    assert molecules is not None
    some = np.arange(3, len(bins), 7)
    few, _ = count_genes(molecules, FRAME, bins, some)
    assert (few.counts != spots.counts[some]).nnz == 0
    np.testing.assert_array_equal(few.barcodes, spots.barcodes[some])


def test_molecules_counted_by_cell_are_the_matrix_of_the_file(run: XeniumTruth) -> None:
    found = find_expression(run.folder, FRAME)
    np.testing.assert_allclose(found.spots.xy_um, run.cell_xy_um, atol=0.01)
    bins = pooled(run.folder, 8.0)
    # Of each cell, over all bins: the instrument counts the same molecules into its matrix.
    np.testing.assert_array_equal(
        np.asarray(bins.cells.sum(axis=0)).ravel(), np.asarray(found.spots.counts.sum(axis=1)).ravel()
    )


def test_merging_does_not_change_counts(run: XeniumTruth, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pooled(run.folder, 8.0)
    monkeypatch.setattr("histosge.data.expression.molecules.MOST_PENDING", 10)
    monkeypatch.setattr(foreign_files, "ROWS", 1_009)
    parts = pooled(run.folder, 8.0)
    assert (whole.spots.counts != parts.spots.counts).nnz == 0
    assert (whole.cells != parts.cells).nnz == 0
    np.testing.assert_array_equal(whole.spots.barcodes, parts.spots.barcodes)


def section_of(run: XeniumTruth, pooled_um: float | None) -> tuple[Section, MoleculeUnits]:
    """A section whose spots are the run's cells, or squares of them, on patches one every 8 µm."""
    cells = find_expression(run.folder, FRAME).spots
    spots = cells if pooled_um is None else pool_spots(cells, pooled_um)
    n_rows, n_cols = (int(side * SPEC.mpp / 8) for side in SPEC.size_px[::-1])
    rows, cols = (index.ravel() for index in np.indices((n_rows, n_cols)))
    embedding = np.random.default_rng(1).standard_normal((rows.size, 3)).astype(np.float32)
    patches = Patches("S2", rows, cols, embedding, 8.0, 8.0)
    molecules = find_molecules(run.folder, FRAME)
    assert molecules is not None
    section = Section(
        patches, spots, spot_overlap(spots, patches), np.full((n_rows, n_cols, 3), 200, np.uint8)
    )
    return section, MoleculeUnits(molecules, FRAME, cells)


@pytest.mark.parametrize("pooled_um", [None, 20.0])
@pytest.mark.parametrize("split", ["block", "random"])
def test_no_bin_holds_a_molecule_that_training_counted(
    run: XeniumTruth, truth: Truth, split: str, pooled_um: float | None
) -> None:
    section, units = section_of(run, pooled_um)
    bins = FineBins.from_sections([(section, [section.patches], units)], 8.0, 28.0)
    # Which spot each molecule was counted for, from what was written.
    names = {name: i for i, name in enumerate(section.spots.barcodes.tolist())}
    if pooled_um is None:
        spot_of_cell = np.array([names[f"cell{i:05d}-1"] for i in range(len(run.cell_xy_um))])
    else:
        place = np.floor(run.cell_xy_um / pooled_um).astype(int)
        spot_of_cell = np.array([names[f"{row}x{col}"] for col, row in place.tolist()])
    counted = run.counted & (run.cell >= 0)
    xy_um, spot = run.xy_um[counted], spot_of_cell[run.cell[counted]]
    n_scored = 0
    for task in Plan.from_sections([section], split, truth.genes).tasks((0,)):
        found = HeldOutBins.from_task(bins, task)
        assert found is not None
        seen = xy_um[task.fold.train["S2"][spot]]
        ((_, mask, chosen, _),) = found.parts
        # 0.01: positions are stored as float32.
        inside = [(np.abs(seen - centre).max(axis=1) < 4 - 0.01).sum() for centre in chosen.xy_um]
        assert sum(inside) == 0
        n_scored += len(chosen)
        if split == "block":
            assert mask is not None
            assert not (mask & task.patch_splits["S2"].train).any()
    assert n_scored > 100


def test_a_spot_is_touched_by_bins_that_lie_under_it_though_none_of_its_molecules_is_in_them(
    run: XeniumTruth,
) -> None:
    section, units = section_of(run, 28.0)
    bins = FineBins.from_sections([(section, [section.patches], units)], 8.0, 28.0).sections["S2"]
    place = np.floor(section.spots.xy_um / 28.0)
    for corner in ((-4.0, -4.0), (-4.0, 4.0), (4.0, -4.0), (4.0, 4.0)):
        # Inside the edge: a bin that ends at a square's edge does not touch it.
        at = np.floor((bins.spots.xy_um + np.array(corner) * 0.999) / 28.0)
        for number, square in enumerate(at):
            (spot,) = np.nonzero((place == square).all(axis=1))
            assert not len(spot) or bins.touched[number, spot[0]] > 0


def test_molecules_on_bare_glass_do_not_count_as_bins_with_few_counts(run: XeniumTruth) -> None:
    section, units = section_of(run, 28.0)
    on = Patches(
        "S2",
        section.patches.rows[:600],
        section.patches.cols[:600],
        section.patches.embedding[:600],
        8.0,
        8.0,
    )
    section = replace(section, patches=on, overlap=spot_overlap(section.spots, on))
    (facts,) = FineBins.from_sections([(section, [on], units)], 8.0, 28.0).facts.sections
    assert facts.n_few + facts.n_scored <= 600
    assert facts.n_bins == facts.n_few + facts.n_uncovered + facts.n_scored


@pytest.mark.parametrize("lost", ["feature_name", "x_location", "qv", "cell_id"])
def test_a_table_without_a_column_is_refused_with_its_name(
    run: XeniumTruth, tmp_path: Path, lost: str
) -> None:
    for file in run.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    pl.read_parquet(tmp_path / "transcripts.parquet").drop(lost).write_parquet(
        tmp_path / "transcripts.parquet"
    )
    with pytest.raises(
        ExpressionError, match=f"has no column '{lost}' .*give the transcripts of a Xenium run"
    ):
        find_molecules(tmp_path, FRAME)


def test_molecules_of_another_run_a_cut_file_and_another_slide_are_one_line(
    run: XeniumTruth, tmp_path: Path
) -> None:
    for file in run.folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "transcripts.parquet"
    table = pl.read_parquet(file)
    table.with_columns(pl.col("feature_name") + "_x").write_parquet(file)
    with pytest.raises(ExpressionError, match=r"none of \d+ molecules .*give the files of one run"):
        pooled(tmp_path, 8.0)
    table.with_columns(pl.col("x_location") + 1e5).write_parquet(file)
    with pytest.raises(
        ExpressionError, match=r"has no molecule to count: .*off the slide; check the alignment"
    ):
        pooled(tmp_path, 8.0)
    file.write_bytes((run.folder / file.name).read_bytes()[:5000])
    with pytest.raises(ExpressionError, match="cannot be read as a table of transcripts") as refused:
        find_molecules(tmp_path, FRAME)
    assert "\n" not in str(refused.value)
    file.unlink()
    for lines in (b"", b"a,b\n1,2\n"):
        (tmp_path / "transcripts.csv").write_bytes(lines)
        with pytest.raises(ExpressionError):
            find_molecules(tmp_path, FRAME)
    (tmp_path / "transcripts.csv").unlink()
    assert find_molecules(tmp_path, FRAME) is None


@pytest.mark.slow
def test_a_model_of_visium_is_scored_at_molecules_of_xenium(
    cohort: SyntheticCohort, run: XeniumTruth, tmp_path: Path
) -> None:
    sheet = cohort.sheet.with_name("mixed.csv")
    sheet.write_text(cohort.sheet.read_text().replace("S2.h5ad", str(run.folder)))
    # So wide a step that cells are pooled for training.
    embed(str(sheet), str(tmp_path / "store"), EmbedSettings(("colour",), GridSpec(0.5, 112, 64)))
    # 8 µm is finer than a cell of 12 µm: only molecules measure it.
    settings = histosge.EvaluateSettings("section", ("ridge",), genes="all", at_um=8.0)
    said: list[str] = []
    scores = histosge.evaluate(
        sheet, tmp_path / "store", tmp_path / "report", settings, on_message=said.append
    )
    assert scores.bins is not None
    (facts,) = scores.bins.sections
    assert facts.n_units == run.counted.sum()
    assert facts.n_scored > 1000
    low, other = ((run.gene >= 0) & (run.qv < 20)).sum(), (run.gene < 0).sum()
    for text in (
        f"pooled from {facts.n_units} molecules of quality 20 or more",
        f"{low} molecules below quality 20, {other} of controls and other features, and 0 off the slide left out",
    ):
        assert text in " ".join(said)
        assert text in (tmp_path / "report" / "report.html").read_text()
    assert scores.mean("ridge", "pearson_mean_at_8um") > 0.05
    assert abs(scores.mean("noise", "pearson_mean_at_8um")) < 0.03
    assert scores.mean("ridge", "n_bins_at_8um") == facts.n_scored


def test_without_molecules_cells_are_what_was_measured_and_too_wide(run: XeniumTruth) -> None:
    section, units = section_of(run, 28.0)
    with pytest.raises(
        HistosgeError,
        match=r"cells of 12 µm; give --at 12 or more, or put .* transcripts\.parquet into its folder",
    ):
        FineBins.from_sections([(section, [section.patches], units.cells)], 8.0, 28.0)


def test_what_is_held_in_memory_follows_bins_and_not_molecules(run: XeniumTruth) -> None:
    molecules = find_molecules(run.folder, FRAME)
    assert molecules is not None
    once = counted(molecules, 8.0)

    def twice() -> Iterator[pl.DataFrame]:
        yield from molecules.batches()
        yield from molecules.batches()

    double = counted(replace(molecules, batches=twice), 8.0)
    assert double.spots.counts.nnz == once.spots.counts.nnz
    assert abs(double.spots.counts - 2 * once.spots.counts).sum() == 0
