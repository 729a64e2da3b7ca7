"""Which models there are, and what may stand for one: names, classes, objects."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import own_model
import pytest
from make_sections import make_section

from histosge.data.genes import select_target
from histosge.data.sections import TrainingSection
from histosge.errors import ModelError
from histosge.models.dense import DenseModel
from histosge.models.estimators import class_name, find_estimator, load_saved_class
from histosge.models.presets.ridge import RidgeModel
from histosge.models.protocol import Capabilities, capabilities
from histosge.models.registry import MODELS, PRESETS, load_preset, offered_by


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """The name of a module with somebody's models on the path; another one for each test."""
    name = f"own_{abs(hash(request.node.name))}"
    own_model.write_module(tmp_path, name)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.fixture(scope="module")
def training() -> list[TrainingSection]:
    section = make_section("A", 1)
    target = select_target(section.spots, section.spots.genes)
    return [TrainingSection(section.patches, section.overlap, section.spots.xy_um, target)]


def test_listing_the_presets_loads_no_torch() -> None:
    code = "import sys; from histosge.models.registry import MODELS; MODELS.records(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"


@pytest.mark.parametrize("name", PRESETS)
def test_a_record_s_name_is_its_class_s(name: str) -> None:
    assert load_preset(name).name == name
    assert class_name(load_preset(name)) == name


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ModelError, match=r"unknown preset 'dens': did you mean dense"):
        load_preset("dens")


def test_what_a_class_does_not_say_has_its_default() -> None:
    class Plain:
        losses = ("mse", "huber")

    assert capabilities(Plain) == Capabilities(losses=("mse", "huber"))
    assert capabilities(load_preset("paper")).calibrated_by_default is False
    assert capabilities(DenseModel).takes_stain_pairs


def test_a_loss_that_a_model_does_not_have_is_refused_with_those_it_has() -> None:
    with pytest.raises(ModelError, match="'dense' has no loss 'huber': choose one of mse, poisson, nb"):
        find_estimator("dense").check_loss("huber")
    with pytest.raises(ModelError, match="'ridge' has no loss 'nb': it has mse alone"):
        find_estimator("ridge").check_loss("nb")
    find_estimator("dense").check_loss("nb")


def test_a_class_of_the_user_s_is_imported_by_its_name_and_fits(
    module: str, training: list[TrainingSection]
) -> None:
    found = find_estimator(f"{module}:Line")
    assert found.name == f"{module}:Line"
    fitted = found.fit(training)
    assert fitted.predict(training[0].patches).shape == training[0].target.shape
    assert found.saved_name(fitted) == f"{module}:Line"


def test_classes_and_objects_are_taken_as_they_are(module: str, training: list[TrainingSection]) -> None:
    line, half = (getattr(__import__(module), name) for name in ("Line", "Half"))
    assert find_estimator(line).name == "line"
    found = find_estimator(half())
    assert found.name == "half"
    fitted = found.fit(training)
    assert found.saved_name(fitted) == f"{module}:Line"
    some, all_spots = fitted.predict(training[0].patches), line.fit(training).predict(training[0].patches)
    assert not np.array_equal(some, all_spots)


def test_a_subclass_of_a_preset_does_not_pass_for_it() -> None:
    class Tuned(RidgeModel):
        pass

    assert Tuned.name == "ridge"
    assert find_estimator(Tuned).name.endswith(
        ":test_a_subclass_of_a_preset_does_not_pass_for_it.<locals>.Tuned"
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module:Line", "there is no module 'no_such_module' in the current folder"),
        ("{module}:Lin", "has no 'Lin'; did you mean Line"),
        ("{module}:Nothing", "is no model: it has no fit, predict, config, state, from_state"),
        ("{module}:SOURCE", "has no 'SOURCE'"),
        ("{module}:", "write module:Class"),
        (".relative:Line", "write module:Class"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused_in_one_line(module: str, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as refused:
        find_estimator(name.format(module=module))
    assert "\n" not in str(refused.value)


def test_an_error_in_the_user_s_module_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "own_broken.py").write_text("import no_such_library\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_library"):
        find_estimator("own_broken:Line")


def test_an_object_without_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="object has no fit"):
        find_estimator(object())  # type: ignore[arg-type]


def test_what_another_package_offers_is_a_preset_like_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, training: list[TrainingSection]
) -> None:
    with own_model.installed(monkeypatch, tmp_path, "own_installed"):
        assert "line" in MODELS.names()
        assert "own_installed" not in sys.modules
        assert offered_by("line") == (own_model.PACKAGE, own_model.VERSION)
        fitted = find_estimator("line").fit(training)
        assert class_name(type(fitted)) == "line"
    assert "line" not in MODELS.names()
    assert offered_by("dense") is None


def test_a_saved_name_is_never_imported_but_compared(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = f"{module}:Line"
    with pytest.raises(ModelError, match=f"--preset {saved}") as refused:
        load_saved_class(saved, None, "m")
    assert f"load_model('m', preset='{saved}')" in str(refused.value)
    assert module not in sys.modules
    line = load_saved_class(saved, saved, "m")
    assert line.__name__ == "Line"
    assert load_saved_class(saved, line, "m") is line
    # A class of a script bears that script's name when it is imported from elsewhere.
    assert load_saved_class("__main__:Line", line, "m") is line
    with pytest.raises(ModelError, match=f"was trained with '{saved}', not with '{module}:Other'"):
        load_saved_class(saved, f"{module}:Other", "m")
    with pytest.raises(ModelError, match="was trained with 'dense', not with"):
        load_saved_class("dense", line, "m")


def test_a_preset_whose_package_is_gone_is_named_with_it() -> None:
    with pytest.raises(
        ModelError, match=r"'line' is not installed: .* \(it was line-models 1.7 when trained\)"
    ):
        load_saved_class("line", None, "m", "line-models 1.7")
