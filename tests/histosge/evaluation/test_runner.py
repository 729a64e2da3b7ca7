import re
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from killed_steps import COUNT_STEPS
from make_sections import GRID, N_GENES, PATCH_UM, make_section
from scipy import sparse

from featurestore.errors import OutputError
from featurestore.events import Progress
from histosge.data.sections import Section
from histosge.errors import HistosgeError, SplitError
from histosge.evaluation import section_maps
from histosge.evaluation.hest_protocol import hest_split
from histosge.evaluation.plan_notes import plan_notes
from histosge.evaluation.report_files import read_evaluation, write_evaluation
from histosge.evaluation.results import Scores
from histosge.evaluation.runner import NOISE_DRAWS, SMOOTH_DRAWS, evaluate_sections
from histosge.evaluation.tasks import Plan
from histosge.heldout.splits import Fold


@pytest.fixture(scope="module")
def three() -> list[Section]:
    return [make_section(name, seed) for name, seed in (("A", 1), ("B", 2), ("C", 3))]


@pytest.fixture(scope="module")
def by_section(three: list[Section]) -> Scores:
    return evaluate_sections(three, ["mean", "ridge"], split="section", genes=19, seeds=(0, 5))


@pytest.fixture(scope="module")
def on_noise() -> Scores:
    noise = [make_section(name, seed, signal=0.0) for name, seed in (("A", 1), ("B", 2))]
    return evaluate_sections(noise, ["knn", "ridge"], split="random", genes=N_GENES, seeds=(0, 1, 2))


def test_a_planted_linear_signal_is_found_and_the_mean_and_noise_score_zero(by_section: Scores) -> None:
    assert by_section.mean("ridge", "pearson_mean") > 0.7
    assert by_section.mean("mean", "pearson_mean") == 0
    assert by_section.mean("mean", "n_nan_genes") == 19
    assert abs(by_section.mean("noise", "pearson_mean")) < 0.03
    assert by_section.mean("ridge", "mse") < by_section.mean("mean", "mse")


def test_every_preset_fold_and_seed_has_its_rows(by_section: Scores) -> None:
    rows = by_section.scores
    assert rows.columns == ["preset", "split", "fold", "seed", "metric", "value"]
    assert rows["split"].unique().to_list() == ["section"]
    for preset, seeds in (("mean", [0, 5]), ("ridge", [0, 5])):
        mine = rows.filter((pl.col("preset") == preset) & (pl.col("metric") == "pearson_depth_adjusted"))
        assert sorted(mine.select("fold", "seed").rows()) == [(f, s) for f in "ABC" for s in seeds]
    wanted = {"pearson_mean", "pearson_median", "pearson_top50", "pearson_depth_adjusted", "mse", "mae"}
    assert wanted <= set(rows["metric"])


def test_the_noise_control_is_always_there_with_at_least_ten_draws(by_section: Scores) -> None:
    noise = by_section.scores.filter((pl.col("preset") == "noise") & (pl.col("metric") == "pearson_mean"))
    assert noise["seed"].n_unique() >= NOISE_DRAWS
    assert noise["value"].n_unique() == len(noise)


def test_the_smooth_control_is_there_scores_zero_by_section_and_says_how_many_genes_it_would_trust(
    by_section: Scores,
) -> None:
    smooth = by_section.scores.filter(pl.col("preset") == "smooth_noise")
    assert by_section.controls == ("noise", "smooth_noise")
    assert smooth.filter(pl.col("metric") == "pearson_mean")["seed"].n_unique() == SMOOTH_DRAWS
    assert abs(by_section.mean("smooth_noise", "pearson_mean")) < 0.03
    assert by_section.mean("smooth_noise", "trusted_share") <= 0.02
    # What is measured on one donor is said to be.
    assert any("trusted_share) are measured within donor d1 only" in note for note in by_section.notes)


def test_donors_that_are_not_named_are_neither_counted_nor_kept_apart(three: list[Section]) -> None:
    unnamed = [replace(s, spots=replace(s.spots, donor=s.spots.slide_id)) for s in three]
    notes = " ".join(plan_notes(Plan.from_sections(unnamed, "section", 5), {}))
    assert "3 sections whose donors the sample sheet does not name." in notes
    assert "may share donors" in notes
    assert "within these sections' donors only, who are not named" in notes
    assert hest_split(unnamed) == "section"


def test_smooth_embeddings_predict_smooth_genes_between_training_spots_and_white_ones_do_not() -> None:
    section = make_section("A", 1, signal=0.0)
    xy_um = section.spots.xy_um
    wave = np.exp(2 * np.sin(xy_um[:, :1] / 150) * np.cos(xy_um[:, 1:] / 150) * np.linspace(-1, 1, N_GENES))
    counts = np.random.default_rng(3).poisson(100 * wave)
    spots = replace(section.spots, counts=sparse.csr_matrix(counts.astype(np.float32)))
    scores = evaluate_sections(
        [replace(section, spots=spots)], ["mean"], split="random", genes=19, seeds=(0,)
    )
    assert scores.mean("smooth_noise", "pearson_mean") > 0.3
    assert abs(scores.mean("noise", "pearson_mean")) < 0.1


def test_summaries_follow_from_the_rows_of_single_genes(by_section: Scores) -> None:
    keys = ["preset", "fold", "seed"]
    again = by_section.genes.group_by(keys).agg(
        pl.col("pearson").mean().alias("pearson_mean"),
        pl.col("pearson").median().alias("pearson_median"),
        pl.col("pearson").filter(pl.col("top50")).mean().alias("pearson_top50"),
        pl.col("pearson_depth_adjusted").mean(),
        pl.col("mse").mean(),
        pl.col("pearson_undefined").sum().cast(pl.Float64).alias("n_nan_genes"),
    )
    wide = by_section.scores.pivot("metric", index=keys, values="value").sort(keys)
    for metric in again.columns[3:]:
        np.testing.assert_allclose(again.sort(keys)[metric], wide[metric], atol=1e-12)


def test_genes_are_chosen_on_the_training_part_only(three: list[Section]) -> None:
    # In the held-out section alone, G0 is the most variable gene by far.
    counts = three[0].spots.counts.toarray()
    counts[:, 0] = np.where(np.arange(len(counts)) % 2, 100000, 0)
    flat = [s.spots.counts.toarray() for s in three[1:]]
    for other in flat:
        other[:, 0] = 2
    changed = [
        replace(section, spots=replace(section.spots, counts=sparse.csr_matrix(values)))
        for section, values in zip(three, [counts, *flat], strict=True)
    ]
    scores = evaluate_sections(changed, ["mean"], split="section", genes=5, seeds=(0,))
    chosen = scores.genes.filter(pl.col("preset") == "mean").group_by("fold").agg("gene")
    genes = dict(chosen.iter_rows())
    assert "G0" not in genes["A"]
    assert "G0" in genes["B"]


def varying_only_in_the_first_block(section: Section) -> tuple[Section, Fold]:
    """Let G0 vary, by far the most of all genes, but in the first block's held-out spots alone."""
    fold = Plan.from_sections([section], "block", 5).folds(0)[0]
    counts = section.spots.counts.toarray()
    odd = np.arange(len(counts)) % 2 == 1
    counts[:, 0] = np.where(fold.test[section.slide_id] & odd, 100000, 0)
    spots = replace(section.spots, counts=sparse.csr_matrix(counts))
    return replace(section, spots=spots), fold


def test_held_out_spots_of_a_training_section_have_no_say_in_the_genes(three: list[Section]) -> None:
    section, fold = varying_only_in_the_first_block(three[0])
    tasks = {task.fold.name: task for task in Plan.from_sections([section], "block", 5).tasks([0])}
    assert "G0" not in tasks[fold.name].genes
    assert all("G0" in task.genes for name, task in tasks.items() if name != fold.name)


def test_the_top_genes_are_picked_without_the_held_out_spots() -> None:
    section, fold = varying_only_in_the_first_block(make_section("A", 1, n_genes=61))
    tasks = {
        task.fold.name: task
        for task in Plan.from_sections([section], "block", section.spots.genes).tasks([0])
    }
    assert not tasks[fold.name].top_genes()[0]
    assert all(
        task.top_genes()[0] and task.top_genes().sum() == 50
        for name, task in tasks.items()
        if name != fold.name
    )


def test_genes_that_one_section_lacks_are_not_chosen(three: list[Section]) -> None:
    spots = three[2].spots
    fewer = replace(three[2], spots=replace(spots, counts=spots.counts[:, :7], genes=spots.genes[:7]))
    scores = evaluate_sections([*three[:2], fewer], ["mean"], split="section", genes=5, seeds=(0,))
    assert set(scores.genes["gene"]) <= set(spots.genes[:7])


def test_genes_given_by_the_user_are_taken_as_they_are(three: list[Section]) -> None:
    scores = evaluate_sections(three[:1], ["mean"], split="block", genes=("G7", "G3"), seeds=(0,))
    assert scores.genes["gene"].unique().sort().to_list() == ["G3", "G7"]


def test_counts_of_held_out_spots_change_no_prediction(three: list[Section]) -> None:
    rng = np.random.default_rng(11)
    shuffled = three[0].spots.counts[rng.permutation(len(three[0].spots))]
    other = [replace(three[0], spots=replace(three[0].spots, counts=shuffled)), *three[1:]]
    genes = ("G2", "G3", "G5")
    maps = [
        evaluate_sections(sections, ["ridge"], split="section", genes=genes, seeds=(0,)).maps
        for sections in (three, other)
    ]
    # The maps of the other sections are by models that were trained on the changed counts.
    predicted = [{s.gene: s.predicted for s in found if s.slide_id == found[0].slide_id} for found in maps]
    for gene in genes:
        np.testing.assert_array_equal(predicted[0][gene], predicted[1][gene])


def test_memorised_noise_scores_only_under_its_own_name(on_noise: Scores) -> None:
    assert abs(on_noise.mean("knn", "pearson_mean")) < 0.05
    assert on_noise.mean("knn", "paper_all_spots") > 0.3
    assert abs(on_noise.mean("ridge", "pearson_mean")) < 0.05


def test_the_papers_figure_is_given_for_the_random_split_only(by_section: Scores) -> None:
    assert "paper_all_spots" not in set(by_section.scores["metric"])


def test_the_block_split_scores_every_spot_and_says_what_it_dropped(three: list[Section]) -> None:
    scores = evaluate_sections(three[:1], ["ridge"], split="block", genes=19, seeds=(0, 1))
    assert scores.buffer_um == pytest.approx(43 + np.sqrt(2) * 2 * PATCH_UM)
    for seed in (0, 1):
        counts = [count for count in scores.folds if count.seed == seed]
        assert sum(count.n_test for count in counts) == GRID[0] * GRID[1]
        assert all(count.n_dropped > 0 for count in counts)
        assert all(count.n_train + count.n_test + count.n_dropped == GRID[0] * GRID[1] for count in counts)
    assert scores.mean("ridge", "pearson_mean") > 0.6


def test_the_default_preset_is_shown_and_how_far_it_looks_is_said(three: list[Section]) -> None:
    scores = evaluate_sections(three[:1], ["mean", "ridge", "dense"], split="block", genes=5, seeds=(0,))
    assert scores.default_preset == "dense"
    assert any(re.search(r"dense by \d+ µm", note) for note in scores.notes)
    assert not any("ridge by" in note for note in scores.notes)


def test_maps_are_of_the_best_median_and_worst_gene_with_their_held_out_score(by_section: Scores) -> None:
    assert [shown.role for shown in by_section.maps] == ["best", "median", "worst"]
    assert [shown.slide_id for shown in by_section.maps] == ["A", "A", "A"]
    mine = by_section.genes.filter(
        (pl.col("preset") == by_section.default_preset) & (pl.col("seed") == 0) & (pl.col("fold") == "A")
    )
    assert by_section.maps[0].pearson == pytest.approx(mine["pearson"].max())
    assert by_section.maps[2].pearson == pytest.approx(mine["pearson"].min())
    for shown in by_section.maps:
        assert shown.predicted.shape == GRID
        assert np.isfinite(shown.predicted).all()
        assert len(shown.measured) == GRID[0] * GRID[1]


def test_every_section_has_maps_of_every_gene_with_its_own_held_out_score(by_section: Scores) -> None:
    assert [maps.slide_id for maps in by_section.section_maps] == ["A", "B", "C"]
    for maps in by_section.section_maps:
        own = by_section.genes.filter(
            (pl.col("preset") == "ridge") & (pl.col("seed") == 0) & (pl.col("fold") == maps.slide_id)
        )
        assert set(maps.names) == set(own["gene"])
        scores = dict(own.select("gene", "pearson").iter_rows())
        for name, note in zip(maps.names, maps.document["notes"], strict=True):
            assert note == f"held-out r = {scores[name]:.3f}"


def test_of_many_genes_and_sections_as_many_have_maps_as_fit_on_a_page(
    three: list[Section], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_values = GRID[0] * GRID[1] * 2  # of a gene on a section: spots and patches
    monkeypatch.setattr(section_maps, "MAP_BYTES", 2 * 3 * n_values)
    monkeypatch.setattr(section_maps, "LEAST_GENES", 3)
    monkeypatch.setattr(section_maps, "CELL_LIMITS", (20_000,))
    scores = evaluate_sections(three, ["ridge"], split="block", genes=f"{N_GENES - 2}+G1", seeds=(0,))
    assert [maps.slide_id for maps in scores.section_maps] == ["A", "B"]
    assert all(len(maps.names) == 3 and "G1" in maps.names for maps in scores.section_maps)
    assert any("2 of 3 sections have them" in note for note in scores.notes)


def test_the_same_call_gives_the_same_numbers(three: list[Section], by_section: Scores) -> None:
    again = evaluate_sections(three, ["mean", "ridge"], split="section", genes=19, seeds=(0, 5))
    assert again.scores.equals(by_section.scores)


def test_progress_counts_every_fit_once(three: list[Section]) -> None:
    seen: list[Progress] = []
    evaluate_sections(three, ["mean"], split="section", genes=5, seeds=(0,), on_progress=seen.append)
    total = 3 * (1 + NOISE_DRAWS + SMOOTH_DRAWS)
    assert [progress.done for progress in seen] == list(range(total + 1))
    assert {progress.total for progress in seen} == {total}


@pytest.mark.parametrize(
    ("presets", "seeds"), [([], (0,)), (["noise", "smooth_noise"], (0,)), (["mean"], ())]
)
def test_nothing_to_evaluate_is_refused(
    three: list[Section], presets: list[str], seeds: tuple[int, ...]
) -> None:
    with pytest.raises(HistosgeError, match="nothing to evaluate"):
        evaluate_sections(three, presets, seeds=seeds)


def test_one_section_cannot_be_held_out(three: list[Section]) -> None:
    with pytest.raises(SplitError, match="at least 2 sections"):
        evaluate_sections(three[:1], ["mean"], split="section")
    with pytest.raises(SplitError, match="nothing to split"):
        evaluate_sections([], ["mean"])


class _Page(HTMLParser):
    """Collects tables and what the page would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.cells: list[list[str]] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in {"src", "href"}]
        if tag == "tr":
            self.cells.append([])
        self.depth += tag in {"th", "td"}

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in {"th", "td"}

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.cells[-1].append(data)


def test_scores_csv_alone_reproduces_the_table_of_the_page(by_section: Scores, tmp_path: Path) -> None:
    page = _Page()
    page.feed(write_evaluation(by_section, tmp_path / "out").read_text(encoding="utf-8"))
    header = next(row for row in page.cells if row[:2] == ["preset", "Pearson"])
    shown = {row[0]: row for row in page.cells if len(row) == len(header)}
    rows = pl.read_csv(tmp_path / "out" / "scores.csv")
    for metric, title in (("pearson_mean", "Pearson"), ("pearson_depth_adjusted", "depth-adjusted")):
        for preset in ("ridge", "mean", "noise", "smooth_noise"):
            mine = rows.filter((pl.col("preset") == preset) & (pl.col("metric") == metric))
            seeds = mine.group_by("seed").agg(pl.col("value").mean())["value"]
            text = f"{seeds.mean():.3f} ± {seeds.std():.3f}"
            assert shown[preset][header.index(title)] == text


def test_the_page_loads_nothing_and_shows_three_maps(by_section: Scores, tmp_path: Path) -> None:
    text = write_evaluation(by_section, tmp_path, notes=["7 spots under 100 counts left out."]).read_text(
        "utf-8"
    )
    page = _Page()
    page.feed(text)
    pictures = [load for load in page.loads if load.startswith("data:image/svg+xml;base64,")]
    assert len(pictures) == 5  # three maps of one section, spread, differences
    # The rest is to be clicked on: the tables beside the page.
    assert sorted(set(page.loads) - set(pictures)) == ["differences.csv", "genes.csv", "scores.csv"]
    assert not re.search(r"https?://|@import|url\(", text)
    assert "7 spots under 100 counts left out." in text
    for shown in by_section.maps:
        caption = f"{shown.role} gene of ridge: held-out r = {shown.pearson:.3f}"
        assert f"<strong>{shown.gene}</strong> {caption}" in text


def test_tables_hold_one_row_per_preset_fold_seed_and_gene(by_section: Scores, tmp_path: Path) -> None:
    write_evaluation(by_section, tmp_path)
    genes = pl.read_csv(tmp_path / "genes.csv")
    assert genes.columns[:6] == ["preset", "split", "fold", "seed", "gene", "pearson"]
    assert len(genes) == 3 * 19 * (2 + 2 + NOISE_DRAWS + SMOOTH_DRAWS)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "differences.csv",
        "genes.csv",
        "report.html",
        "scores.csv",
    ]


def test_after_a_failure_there_is_no_page_and_no_half_written_file(
    by_section: Scores, tmp_path: Path
) -> None:
    write_evaluation(by_section, tmp_path)
    (tmp_path / "genes.csv").unlink()
    (tmp_path / "genes.csv").mkdir()
    with pytest.raises(OSError, match=r"genes\.csv"):
        write_evaluation(by_section, tmp_path)
    assert not (tmp_path / "report.html").exists()
    assert not list(tmp_path.glob("*.partial"))


def _same(found: Scores | None, scores: Scores) -> bool:
    if found is None:
        return False
    # Field by field: since Python 3.13 == of two dataclasses asks for the truth of the comparison of two tables.
    for field in fields(Scores):
        one, other = getattr(found, field.name), getattr(scores, field.name)
        if field.name in ("maps", "section_maps") or not field.compare:
            continue  # maps are not written
        if not (one.equals(other) if isinstance(one, pl.DataFrame) else one == other):
            return False
    return True


def test_scores_are_read_back_as_they_were_written(by_section: Scores, tmp_path: Path) -> None:
    write_evaluation(by_section, tmp_path, made_with={"seeds": 2, "sections": {"A": {"donor": '"<&>'}}})
    made_with, scores = read_evaluation(tmp_path) or (None, None)
    assert made_with == {"seeds": 2, "sections": {"A": {"donor": '"<&>'}}}
    assert _same(scores, by_section)


KILLED = (
    COUNT_STEPS
    + """
from histosge.evaluation.report_files import TABLES, read_evaluation, write_texts

folder = Path(sys.argv[1])
names = [*(f"{name}.csv" for name in TABLES), "report.html"]
# One evaluation has a table that the other lacks.
old, new = ({name: (Path(place) / name).read_text() for name in names if (Path(place) / name).exists()}
            for place in sys.argv[2:])
assert set(old) - set(new) == {"domains.csv"}

while True:
    at += 1
    write_texts(folder, old)
    child = os.fork()
    if not child:
        in_child = True
        write_texts(folder, new)
        os._exit(0)
    killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = read_evaluation(folder)
    if found is None:
        print("no page", int(killed))
    else:
        seed = found[0]["seed"]
        there = {name: (folder / name).read_text() for name in names if (folder / name).exists()}
        assert there == {1: old, 2: new}[seed]
        print(seed, int(killed))
    if not killed:
        break
"""
)


@pytest.fixture(scope="module")
def old_and_new(by_section: Scores, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two evaluations, in folders of their own."""
    old, new = tmp_path_factory.mktemp("old"), tmp_path_factory.mktemp("new")
    domains = pl.DataFrame(
        {
            "preset": ["mean"],
            "split": ["section"],
            "section": ["A"],
            "seed": [0],
            "kmeans_seed": [0],
            "ari": [0.5],
        }
        | {"nmi": [0.5], "n_domains": [2], "n_labelled": [9], "n_unlabelled": [0]}
    )
    write_evaluation(replace(by_section, domains=domains), old, made_with={"seed": 1})
    halved = by_section.scores.with_columns(pl.col("value") / 2)
    write_evaluation(replace(by_section, scores=halved), new, made_with={"seed": 2})
    return old, new


@pytest.mark.parametrize("beside", [False, True])
def test_a_kill_while_an_evaluation_is_replaced_never_leaves_a_page_with_tables_of_another(
    old_and_new: tuple[Path, Path], tmp_path: Path, beside: bool
) -> None:
    folder = tmp_path / "report"
    folder.mkdir()
    if beside:
        (folder / "mine.txt").write_text("mine")
    command = [sys.executable, "-c", KILLED, folder, *old_and_new]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    *killed, finished = done.stdout.splitlines()
    assert finished == "2 0"
    # A folder of other things cannot be replaced as a whole: there the page goes before the tables.
    assert set(killed) == ({"1 1", "no page 1", "2 1"} - ({"2 1"} if beside else {"no page 1"}))
    assert (folder / "mine.txt").exists() == beside


def test_a_file_in_the_place_of_the_folder_is_refused(by_section: Scores, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file, where a folder would go"):
        write_evaluation(by_section, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"
