"""`evaluate --annotation`: domains against classes that are planted in the expression file."""

from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import polars as pl
import pytest
from sklearn.metrics import adjusted_rand_score
from write_layouts import visium

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.grid import GridSpec
from histosge.data.expression.annotation import read_annotation
from histosge.data.expression.loaded_expression import SlideFrame
from histosge.data.section_loading import Selection, load_sections
from histosge.errors import ExpressionError, HistosgeError
from histosge.evaluation.annotated_domains import Annotation
from histosge.evaluation.evaluate import EvaluateSettings, evaluate
from histosge.evaluation.spatial_domains import find_domains
from histosge.synthetic import SyntheticSpec, load_truth, make_section
from histosge_cli import main

GRID = GridSpec(mpp=1.0, patch_px=112, stride_px=112)
SPEC = SyntheticSpec(size_px=(3000, 2700), spot_pitch_um=80.0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Two sections; `layer` is the tissue type under a spot, missing for every eleventh."""
    folder = tmp_path_factory.mktemp("annotated")
    rows = []
    for seed in (1, 2):
        section = make_section(folder / "data", replace(SPEC, seed=seed), f"S{seed}")
        data, truth = anndata.read_h5ad(section.expression), load_truth(section.truth)
        step = float(truth.x_um[1] - truth.x_um[0])
        cell = np.floor(data.obsm["spatial"] * SPEC.mpp / step).astype(int)
        types = truth.label[cell[:, 1], cell[:, 0]]
        layer = np.array([f"L{kind}" for kind in types], dtype=object)
        layer[::11] = None
        data.obs["layer"] = layer
        data.obs["one"] = "tumour"
        data.obs["only_S2"] = layer if seed == 2 else "stroma"
        data.obs["many"] = [f"n{i}" for i in range(data.n_obs)]
        data.write_h5ad(section.expression)
        rows.append(f"S{seed},{section.slide},{section.expression}\n")
    sheet, store = folder / "sheet.csv", folder / "store"
    sheet.write_text("slide_id,slide,expression\n" + "".join(rows))
    embed(str(sheet), str(store), EmbedSettings(("colour", "morphology"), GRID))
    return str(sheet), str(store)


def test_domains_of_what_was_measured_predicted_and_embedded_are_scored_on_held_out_spots(
    made: tuple[str, str], tmp_path: Path
) -> None:
    settings = EvaluateSettings(
        split="section",
        presets=("ridge",),
        genes=20,
        annotation="layer",
        selection=Selection(None, "morphology"),
    )
    scores = evaluate(*made, tmp_path, settings)
    table = pl.read_csv(tmp_path / "domains.csv")
    assert table["preset"].unique(maintain_order=True).to_list() == [
        *("ridge", "measured", "embeddings", "noise", "smooth_noise")
    ]
    assert set(table["section"]) == {"S1", "S2"}
    assert (table.group_by("preset", "section").len()["len"] == 20).all()
    means = {name: ari for name, ari, _, _ in scores.domain_means()}
    assert means["measured"] > 0.2
    assert means["ridge"] > 0.2
    assert abs(means["noise"]) < 0.1
    # By another hand: sections, genes and labels read again, and scikit-learn's index.
    loaded = {
        item.section.slide_id: item.section for item in load_sections(*made, Selection(None, "morphology"))
    }
    fold = pl.read_csv(tmp_path / "genes.csv").filter(
        (pl.col("preset") == "ridge") & (pl.col("fold") == "S2")
    )
    spots = loaded["S2"].spots
    counts = spots.counts.toarray()
    column = [spots.genes.index(gene) for gene in fold["gene"]]
    values = np.log1p(counts[:, column] / counts.sum(axis=1, keepdims=True) * 1e4)
    data = anndata.read_h5ad(Path(made[0]).parent / "data" / "S2.h5ad")
    labels = data.obs["layer"].reindex(spots.barcodes)
    kept = labels.notna().to_numpy()
    domains = find_domains(values, labels.nunique(), [0])[0]
    expected = adjusted_rand_score(labels[kept].astype(str), domains[kept])
    row = table.filter(
        (pl.col("preset") == "measured") & (pl.col("section") == "S2") & (pl.col("kmeans_seed") == 0)
    )
    assert row["ari"].item() == pytest.approx(expected, abs=0.02)
    assert row["n_domains"].item() == labels.nunique()
    assert (row["n_labelled"].item(), row["n_unlabelled"].item()) == (kept.sum(), (~kept).sum())
    # In scores.csv, too, and on the page; and the same again is nothing to do.
    found = pl.read_csv(tmp_path / "scores.csv").filter(
        (pl.col("metric") == "ari") & (pl.col("preset") == "measured")
    )
    assert found["value"].mean() == pytest.approx(means["measured"])
    assert "Domains against the annotation" in (tmp_path / "report.html").read_text()
    again = evaluate(*made, tmp_path, settings)
    assert again.was_there
    assert again.domain_means() == scores.domain_means()


@pytest.mark.slow
def test_with_blocks_every_spot_is_in_the_domains_once_and_encoders_are_compared(
    made: tuple[str, str], tmp_path: Path
) -> None:
    settings = EvaluateSettings(
        split="block", presets=("mean",), genes=9, annotation="layer", encoders=("colour", "morphology")
    )
    scores = evaluate(*made, tmp_path, settings)
    sizes = {
        item.section.slide_id: len(item.section.spots)
        for item in load_sections(*made, Selection(None, "colour"))
    }
    assert scores.domains is not None
    for row in scores.domains.iter_rows(named=True):
        assert row["n_labelled"] + row["n_unlabelled"] == sizes[row["section"]]
    names = [name for name, *_ in scores.domain_means()]
    assert {"embeddings on colour", "embeddings on morphology", "measured on colour"} <= set(names)


def test_one_class_is_refused_and_a_section_with_one_is_left_out_by_name(made: tuple[str, str]) -> None:
    loaded = load_sections(*made, Selection(None, "colour"))
    with pytest.raises(
        ExpressionError, match=r"^annotation 'one' tells no two classes .*S1: one class \('tumour'\)"
    ):
        Annotation.read(made[0], loaded, "one")
    found = Annotation.read(made[0], loaded, "only_S2")
    assert set(found.labels) == {"S2"}
    assert found.notes[0].startswith("S1: one class ('stroma') of 'only_S2'")


def test_columns_that_are_no_classes_or_not_there_are_refused_in_one_line(
    made: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loaded = load_sections(*made, Selection(None, "colour"))
    with pytest.raises(ExpressionError, match=r"^annotation 'many' has \d+ values in section 'S1'"):
        Annotation.read(made[0], loaded, "many")
    with pytest.raises(ExpressionError, match=r"has no column 'layr' in obs; did you mean layer\?$"):
        Annotation.read(made[0], loaded, "layr")
    arguments = ["evaluate", *made, str(tmp_path), "--encoder", "colour", "--annotation", "one", "--quiet"]
    monkeypatch.setattr("sys.argv", ["histosge", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "annotation 'one' tells no two classes apart" in message


def test_a_layout_without_columns_of_spots_and_the_hest_protocol_are_refused(tmp_path: Path) -> None:
    place = visium(tmp_path, "tissue_positions.csv")
    with pytest.raises(
        ExpressionError, match=r"no annotation is read; give an AnnData whose obs holds 'layer'"
    ):
        read_annotation(place, SlideFrame("S", "d", 0.5), "layer")
    with pytest.raises(HistosgeError, match="leave out --annotation or --protocol"):
        replace(EvaluateSettings(), annotation="layer", protocol="hest").check()
