"""Adapting a model to new sections is ridge regression shrunk towards its weights; claims on it are measured there."""

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import anndata as ad
import numpy as np
import pytest
from _cohorts import MadeCohort, write_cohort, write_section, write_sheet
from _dense_oracle import Floats, all_scales, centre, pool, predict_exactly, ridge, stacking
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LinearRegression
from sklearn.preprocessing import StandardScaler
from typer.testing import CliRunner

from featurestore.storage.block_array import BlockArray
from featurestore.storage.store import Store
from histosge.data.section_loading import Selection, load_sections, training_section
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.adaptation import LOADING_PENALTIES, Adaptation, adapt_ridge
from histosge.models.dense import DenseModel
from histosge.models.linear_algebra import PENALTIES as RIDGE_PENALTIES
from histosge.models.linear_algebra import Affine
from histosge.models.presets.ridge import RidgeModel
from histosge.models.ridge_sums import PENALTIES
from histosge.models.scale_ridges import SIGMAS_UM, ScaleRidges
from histosge.training.model_files import fingerprint_of as fingerprint
from histosge.training.saved_model import SavedModel, load_model, save_model
from histosge.training.train import TrainSettings, train
from histosge_cli.main import app

MADE = MadeCohort(sections=3, shape=(37, 41), dim=29, spots=211, genes=23, block=(7, 11), frame=5)
NEW = range(3, 6)
SETTINGS = TrainSettings(genes=19, intervals=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sections with a model of them, and three of another laboratory, in whose tissue some genes trade places."""
    folder = tmp_path_factory.mktemp("world")
    sheet, store = write_cohort(folder, MADE)
    for number in NEW:
        write_section(folder, Store.open_or_create(str(store)), MADE, number)
        _change_genes(folder / f"S{number:03}.h5ad")
        _change_embedding(store, f"S{number:03}")
    write_sheet(folder, folder / "new.csv", replace(MADE, donors=2), NEW)
    write_sheet(folder, folder / "lone.csv", MADE, range(3, 4))
    write_sheet(folder, folder / "all.csv", MADE, range(6))
    for preset in ("dense", "ridge"):
        train(sheet, store, folder / preset, replace(SETTINGS, preset=preset), keep_sums=False)
    return folder


def _change_genes(file: Path) -> None:
    table = ad.read_h5ad(file)
    names = table.var_names.to_numpy(str, copy=True)
    names[:9] = np.roll(names[:9], 2)
    table.var_names = names
    _write(table, file)


def _change_embedding(store: Path, slide_id: str) -> None:
    """Let some features trade places, as if another scanner showed the tissue otherwise."""
    opened = Store.open(str(store))
    grid, encoder = opened.select(None, None, slide_id)
    stored = opened.grid(slide_id, grid)
    array = BlockArray.open(opened.location, opened.embedding(slide_id, grid, encoder).path, read_only=False)
    for block in stored.planned(array.block_shape):
        values = array.read_block(block).copy()
        values[..., :19] = np.roll(values[..., :19], 3, axis=-1)
        array.write(block, values)


def _write(table: ad.AnnData, file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.write_h5ad(file)


def _adapt(world: Path, folder: Path, preset: str, sheet: str = "new.csv", **options: object) -> SavedModel:
    return train(world / sheet, world / "store", folder, start_from=world / preset, **options)  # type: ignore[arg-type]


def _sections(world: Path, genes: tuple[str, ...], sheet: str = "new.csv") -> list[TrainingSection]:
    loaded = load_sections(str(world / sheet), str(world / "store"), Selection())
    return [training_section(item.section, genes) for item in loaded]


def _oracle_of_dense(earlier: DenseModel, sections: Sequence[TrainingSection]) -> tuple[Floats, list[float]]:
    """Adapt with scikit-learn: predictions of the first section's patches before their floor, and the penalties."""
    state = earlier.state()
    old_axes, n_old = state["targets.axes"], state["targets.axes"].shape[1]
    weights = [w[:, :n_old] for w in np.split(state["scales.weight"], len(SIGMAS_UM), axis=1)]

    def old_patterns(section: TrainingSection) -> Floats:
        scales = zip(SIGMAS_UM, weights, strict=True)
        return np.asarray(sum(pool(section.patches, sigma) @ weight for sigma, weight in scales))

    at_spots = [section.overlap @ old_patterns(section) for section in sections]
    rows = np.vstack([StandardScaler().fit_transform(s.target.astype(np.float64)) for s in sections])
    patterns = np.vstack([p - p.mean(axis=0) for p in at_spots])
    group = np.repeat(np.arange(len(sections)), [len(s.target) for s in sections])
    anew = rows @ PCA(10, svd_solver="full").fit(rows).components_.T
    old = patterns @ old_axes.T
    slope = LinearRegression(fit_intercept=False).fit(old.reshape(-1, 1), rows.ravel()).coef_[0]
    held_out, chosen = _held_out(patterns, rows - slope * old, group, LOADING_PENALTIES)
    loadings = slope * old_axes + ridge(patterns, rows - slope * old, chosen).coef_
    rows = rows - patterns @ loadings.T
    axes = PCA(10, svd_solver="full").fit(rows).components_.T
    counts = [len(section.target) for section in sections]
    Y = rows @ axes
    held_out, fits, penalties = [], [], []
    pooled = [np.vstack([s.overlap @ pool(s.patches, sigma) for s in sections]) for sigma in SIGMAS_UM]
    for values in (*pooled, all_scales(pooled, None)):
        scaler = StandardScaler()
        X = scaler.fit_transform(values)
        penalty = np.sqrt(10) * _held_out(X, anew, group, PENALTIES)[1]
        predicted, _ = _held_out(X, Y, group, [penalty])
        held_out.append(predicted)
        penalties.append(penalty)
        fits.append((scaler, ridge(X, Y, penalty)))
    shares = stacking(held_out, centre(Y, group), float((Y**2).sum()))
    pooled = [pool(sections[0].patches, sigma) for sigma in SIGMAS_UM]
    inputs = (*pooled, all_scales(pooled, None))
    new = sum(
        share * fit.predict(scaler.transform(X))
        for share, (scaler, fit), X in zip(shares, fits, inputs, strict=True)
    )
    old = old_patterns(sections[0]) - np.vstack(at_spots).mean(axis=0)
    targets = [section.target.astype(np.float64) for section in sections]
    mean = np.average([t.mean(axis=0) for t in targets], axis=0, weights=counts)
    sd = np.sqrt(np.average([t.var(axis=0) for t in targets], axis=0, weights=counts))
    return mean + (old @ loadings.T + new @ axes.T) * sd, penalties


def _held_out(
    X: Floats, Y: Floats, group: NDArray[np.int64], penalties: Sequence[float]
) -> tuple[Floats, float]:
    """Return predictions of groups left out in turn, about the groups' means, and the penalty with the least error."""
    found = []
    for penalty in penalties:
        predicted = np.empty_like(Y)
        for g in np.unique(group):
            predicted[group == g] = ridge(X[group != g], Y[group != g], penalty).predict(X[group == g])
        found.append(centre(predicted, group))
    best = int(np.argmin([((p - centre(Y, group)) ** 2).sum() for p in found]))
    return found[best], float(penalties[best])


@pytest.mark.parametrize("n_patterns", [10, 3])
def test_an_adapted_dense_equals_scikit_learn_in_double_precision(n_patterns: int, world: Path) -> None:
    saved = load_model(world / "dense")
    earlier = _with_patterns(saved.model, n_patterns)
    sections = _sections(world, saved.card.genes)
    adapted = Adaptation(earlier, np.arange(len(saved.card.genes))).fit(sections)
    wanted, penalties = _oracle_of_dense(earlier, sections)
    found = predict_exactly(adapted.state(), sections[0].patches)
    assert np.abs(found - wanted).max() / wanted.std() < 1e-6
    np.testing.assert_allclose([of_scale[0] for of_scale in adapted.config()["penalties"]], penalties)
    axes = adapted.state()["targets.axes"]
    np.testing.assert_allclose(axes.T @ axes, np.eye(axes.shape[1]), atol=1e-12)


def _with_patterns(model: object, n: int) -> DenseModel:
    """Return a fitted `dense` with its first patterns alone."""
    assert isinstance(model, DenseModel)
    assert isinstance(model.linear, ScaleRidges)
    assert model.linear.weight is not None
    kept = [*range(n), -1]
    weights = [w[:, kept] for w in np.split(model.linear.weight, len(SIGMAS_UM), axis=1)]
    linear = replace(model.linear, weight=np.hstack(weights), offset=model.linear.offset[kept])
    return replace(model, linear=linear, targets=replace(model.targets, axes=model.targets.axes[:, :n]))


def test_an_adapted_ridge_is_the_closed_form_of_shrinking_to_its_weights(world: Path, tmp_path: Path) -> None:
    """W = (X'X + n penalty I)^-1 (X'Y + n penalty W_earlier), inputs of mean 0 and spread 1."""
    adapted = _adapt(world, tmp_path / "model", "ridge", settings=TrainSettings(intervals=False)).model
    earlier = load_model(world / "ridge")
    sections = _sections(world, earlier.card.genes)
    X = np.vstack([s.overlap @ s.patches.embedding.astype(np.float64) for s in sections])
    Y = np.vstack([s.target for s in sections]).astype(np.float64)
    x_mean, spread, n = X.mean(axis=0), X.std(axis=0), len(X)
    Z, start = (X - x_mean) / spread, earlier.model.state()["weight"] * spread[:, None]
    assert isinstance(adapted, RidgeModel)
    held = n * adapted.penalty
    weight = np.linalg.solve(Z.T @ Z + held * np.eye(len(start)), Z.T @ (Y - Y.mean(axis=0)) + held * start)
    found = adapted.affine(X)
    wanted = Z @ weight + Y.mean(axis=0)
    assert np.abs(found - wanted).max() / wanted.std() < 1e-8
    assert adapted.penalty in RIDGE_PENALTIES


def _units(model: object, section: TrainingSection) -> Floats:
    """Return predictions of a section's patches in units of the genes' spread, about their mean."""
    assert isinstance(model, DenseModel)
    state = model.state()
    found = (predict_exactly(state, section.patches) - state["targets.mean"]) / state["targets.sd"]
    return np.asarray(found - found.mean(axis=0))


def test_weights_stay_where_new_sections_show_nothing_else(world: Path) -> None:
    """Noise around what the earlier model predicts: nearer to it than a training anew on the same spots."""
    rng = np.random.default_rng(5)
    earlier = load_model(world / "dense")
    *seen, other = _sections(world, earlier.card.genes)
    sections = []
    for section in seen:
        truth = section.overlap @ _units(earlier.model, section)
        target = truth + rng.normal(0, 2 * truth.std(), truth.shape)
        sections.append(replace(section, target=target.astype(np.float32)))
    adapted = Adaptation(earlier.model, np.arange(len(earlier.card.genes))).fit(sections)
    truth, found, anew = (_units(m, other) for m in (earlier.model, adapted, DenseModel.fit(sections)))

    def away(values: Floats) -> float:
        return float(1 - np.corrcoef(values.ravel(), truth.ravel())[0, 1])

    assert away(found) < 0.8 * away(anew)
    same = adapt_ridge(_ridge_of(world), np.arange(len(earlier.card.genes)), _predicted_by_ridge(world, seen))
    assert same.penalty >= 10
    np.testing.assert_allclose(same.affine.weight, _ridge_of(world).affine.weight, atol=0.02)


def _ridge_of(world: Path) -> RidgeModel:
    model = load_model(world / "ridge").model
    assert isinstance(model, RidgeModel)
    return model


def _predicted_by_ridge(world: Path, sections: Sequence[TrainingSection]) -> list[TrainingSection]:
    rng, model = np.random.default_rng(6), _ridge_of(world)
    found = [model.affine(s.overlap @ s.patches.embedding) for s in sections]
    return [
        replace(s, target=(values + rng.normal(0, 2, values.shape)).astype(np.float32))
        for s, values in zip(sections, found, strict=True)
    ]


def test_what_an_earlier_model_predicts_of_noise_is_given_up(world: Path) -> None:
    rng = np.random.default_rng(7)
    earlier = load_model(world / "dense")
    sections = [
        replace(s, target=rng.normal(4, 1, s.target.shape).astype(np.float32))
        for s in _sections(world, earlier.card.genes)
    ]
    adapted = Adaptation(earlier.model, np.arange(len(earlier.card.genes))).fit(sections)
    assert _units(adapted, sections[0]).std() < 0.1 * _units(earlier.model, sections[0]).std()


def test_a_model_that_is_right_already_is_not_spoiled(world: Path) -> None:
    """The truth is in the earlier model: on other tissue the adapted one is as good, training anew on one section is not."""
    genes = load_model(world / "ridge").card.genes
    first, *_, last = _sections(world, genes)
    rng = np.random.default_rng(2)
    truth = Affine(rng.normal(0, 0.1, (MADE.dim, len(genes))), np.full(len(genes), 4.0))

    def spots(section: TrainingSection) -> tuple[Floats, TrainingSection]:
        exact = truth(section.overlap @ section.patches.embedding)
        noisy = exact + rng.normal(0, 3, exact.shape)
        return exact, replace(section, target=noisy.astype(np.float32))

    wanted = spots(last)[0]

    def error(model: object) -> float:
        assert isinstance(model, RidgeModel)
        found = model.affine(last.overlap @ last.patches.embedding) - wanted
        return float((found - found.mean(axis=0)).std())

    seen = [spots(first)[1]]
    adapted = error(adapt_ridge(RidgeModel(truth, 1.0, 0), np.arange(len(genes)), seen))
    assert adapted < 0.5 * error(RidgeModel.fit(seen))


@pytest.mark.parametrize("sheet", ["new.csv", "lone.csv"])
def test_intervals_and_the_card_are_of_the_new_sections(sheet: str, world: Path, tmp_path: Path) -> None:
    said = list[str]()
    adapted = _adapt(world, tmp_path / "model", "dense", sheet, on_message=said.append)
    earlier, n_new = load_model(world / "dense"), 3 if sheet == "new.csv" else 1
    n_spots = sum(int(s["spots"]) for s in adapted.card.sections[-n_new:])
    assert adapted.intervals is not None
    assert adapted.intervals.n_spots <= n_spots
    assert adapted.intervals.held_out == ("donor" if n_new == 3 else "block")
    assert len(adapted.card.sections) == 3 + n_new
    assert adapted.card.origin == {
        "fingerprint": earlier.fingerprint,
        "sections": 3,
        "spots": sum(int(s["spots"]) for s in earlier.card.sections),
    }
    assert load_model(tmp_path / "model").card == adapted.card
    card = (tmp_path / "model" / "README.md").read_text()
    measured = f"measured on the {n_new} sections" if n_new == 3 else "measured on blocks of the one section"
    for text in (card, "\n".join(said)):
        assert measured in text
    assert f"`{earlier.fingerprint[:16]}`" in card
    assert any(line.startswith("penalty on changes") for line in said)
    assert not (tmp_path / "model" / "stats").exists()
    # The same again is nothing to do; added to sums instead it would be another model.
    assert _adapt(world, tmp_path / "model", "dense", sheet).was_there


def test_a_model_without_an_origin_says_nothing_of_one(world: Path) -> None:
    assert "origin" not in json.loads((world / "dense" / "config.json").read_text())["card"]


def test_sections_of_the_earlier_model_are_neither_read_nor_used(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, paths = list[str](), set[str]()
    read_block = BlockArray.read_block
    monkeypatch.setattr(
        BlockArray, "read_block", lambda array, *a, **k: paths.add(array.path) or read_block(array, *a, **k)
    )
    settings = TrainSettings(intervals=False)
    whole = _adapt(world, tmp_path / "model", "ridge", "all.csv", settings=settings, on_message=said.append)
    assert {path.split("/")[0] for path in paths} == {"S003", "S004", "S005"}
    assert any(line.startswith("3 sections are left out") for line in said)
    new = _adapt(world, tmp_path / "new", "ridge", settings=settings)
    np.testing.assert_array_equal(whole.model.state()["weight"], new.model.state()["weight"])
    with pytest.raises(ModelError, match="was trained on all 3 sections of the sheet"):
        _adapt(world, tmp_path / "none", "ridge", "cohort.csv")


def test_genes_go_by_name_and_missing_ones_are_left_out(world: Path, tmp_path: Path) -> None:
    genes = load_model(world / "dense").card.genes
    lacking = {genes[2], genes[7]}
    for preset in ("dense",):
        sheet = _with_genes(
            world, tmp_path / preset, [g for g in (f"G{i:05}" for i in range(23)) if g not in lacking]
        )
        said = list[str]()
        model = train(
            sheet,
            world / "store",
            tmp_path / f"{preset}-model",
            TrainSettings(intervals=False),
            start_from=world / preset,
            on_message=said.append,
        )
        assert model.card.genes == tuple(g for g in genes if g not in lacking)
        assert any(line.startswith("2 of 19 genes") and genes[2] in line for line in said)
        kept = [i for i, g in enumerate(genes) if g not in lacking]
        wanted = Adaptation(load_model(world / preset).model, np.array(kept)).fit(
            [
                training_section(i.section, model.card.genes)
                for i in load_sections(str(sheet), str(world / "store"), Selection())
            ]
        )
        for name, array in wanted.state().items():
            np.testing.assert_array_equal(model.model.state()[name], array)


def _with_genes(world: Path, folder: Path, names: Sequence[str]) -> Path:
    """Write a sheet of the new sections whose expression has these genes alone."""
    folder.mkdir()
    text = (world / "new.csv").read_text()
    for number in NEW:
        file = f"S{number:03}.h5ad"
        table = ad.read_h5ad(world / file)
        _write(table[:, [n for n in table.var_names if n in names]].copy(), folder / file)
        text = text.replace(str(world / file), str(folder / file))
    (folder / "new.csv").write_text(text)
    return folder / "new.csv"


def test_what_cannot_be_adapted_is_refused_in_one_line(world: Path, tmp_path: Path) -> None:
    sheet, store = world / "cohort.csv", world / "store"
    train(sheet, store, tmp_path / "nb", replace(SETTINGS, genes=4, loss="nb"))
    train(sheet, store, tmp_path / "mean", replace(SETTINGS, preset="mean"))
    train(
        sheet,
        store,
        tmp_path / "others",
        replace(SETTINGS, genes=("G00001",), preset="ridge"),
        keep_sums=False,
    )
    renamed = tmp_path / "renamed"
    shutil.copytree(world / "dense", renamed)
    for start, settings, why in (
        (world / "dense", TrainSettings(genes=5), "leave --genes out"),
        (world / "dense", TrainSettings(preset="ridge"), "leave --preset out"),
        (world / "dense", TrainSettings(loss="nb"), "leave --loss"),
        (tmp_path / "nb", None, "only squared errors are adapted"),
        (tmp_path / "mean", None, "dense, ridge and attention of one encoder can be adapted"),
    ):
        with pytest.raises(ModelError, match=why) as refused:
            train(world / "new.csv", store, tmp_path / "model", settings, start_from=start)
        assert "\n" not in str(refused.value)
    other = _with_genes(world, tmp_path / "other", [f"G{i:05}" for i in range(2, 23)])
    with pytest.raises(ModelError, match="none of the 1 genes"):
        train(other, store, tmp_path / "model", start_from=tmp_path / "others")
    with pytest.raises(ModelError, match="name it with --from"):
        train(world / "new.csv", store, tmp_path / "model", adapt=True)
    assert not (tmp_path / "model").exists()


def test_a_model_that_says_nothing_of_its_sections_is_refused(world: Path, tmp_path: Path) -> None:
    saved = load_model(world / "ridge")
    section = {**saved.card.sections[0], "spots": "many"}
    save_model(tmp_path / "odd", saved.model, replace(saved.card, sections=({**saved.card.sections[1]},)))
    config = tmp_path / "odd" / "config.json"
    document = json.loads(config.read_text())
    document["card"]["sections"] = [section]
    document["fingerprint"] = fingerprint(tmp_path / "odd" / "model.safetensors", document)
    config.write_text(json.dumps(document))
    with pytest.raises(ModelError, match="spots") as refused:
        train(world / "new.csv", world / "store", tmp_path / "model", start_from=tmp_path / "odd")
    assert "\n" not in str(refused.value)


def test_another_encoder_is_refused_with_both_values(world: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    made = replace(MADE, dim=7, sections=0)
    _, store = write_cohort(other, made)
    write_section(other, Store.open(str(store)), made, 8)
    sheet = write_sheet(other, other / "cohort.csv", made, range(8, 9))
    with pytest.raises(ModelError, match=r"was trained on encoder .* the store holds"):
        train(sheet, store, tmp_path / "model", start_from=world / "dense")


def test_the_command_adapts_also_a_model_with_sums(world: Path, tmp_path: Path) -> None:
    train(world / "cohort.csv", world / "store", tmp_path / "sums", replace(SETTINGS, preset="ridge"))
    command = ["train", str(world / "new.csv"), str(world / "store"), "--from", str(tmp_path / "sums")]
    ran = CliRunner().invoke(app, [*command, str(tmp_path / "model"), "--adapt"])
    assert ran.exit_code == 0, ran.output
    assert load_model(tmp_path / "model").card.origin is not None
    bare = _adapt(world, tmp_path / "bare", "ridge")
    np.testing.assert_array_equal(
        load_model(tmp_path / "model").model.state()["weight"], bare.model.state()["weight"]
    )
    added = CliRunner().invoke(app, [*command, str(tmp_path / "model")])
    assert added.exit_code != 0
    assert "adapted" in str(added.exception)
