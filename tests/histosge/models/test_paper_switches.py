import numpy as np
import pytest
import torch
from make_sections import make_section

from histosge.data.sections import TrainingSection
from histosge.models.paper import GROUP_SIZE, PaperModel, PaperSwitches, lattice_position
from histosge.models.paper_network import PaperNetwork


@pytest.fixture(scope="module")
def training() -> TrainingSection:
    section = make_section("A", 1)
    target = np.random.default_rng(3).random((len(section.spots), 5)).astype(np.float32)
    # Off the lattice: where two spots lie equally far along, only their order could tell them apart.
    xy_um = section.spots.xy_um + np.random.default_rng(7).uniform(-1, 1, (len(target), 2))
    return TrainingSection(section.patches, section.overlap, xy_um, target)


def fit(training: TrainingSection, **switches: bool) -> PaperModel:
    return PaperModel.fit_with(PaperSwitches(**switches), [training], epochs=2)


def at_spots(model: PaperModel, training: TrainingSection, order: np.ndarray, shift: float = 0) -> np.ndarray:
    embedding = training.overlap @ training.patches.embedding
    found = model.predict_spots(embedding[order], training.spot_xy_um[order] + shift)
    return found[np.argsort(order)]


def test_a_prediction_depends_on_the_order_of_the_file_with_the_defect_alone(
    training: TrainingSection,
) -> None:
    straight = np.arange(len(training.spot_xy_um))
    mixed = np.random.default_rng(5).permutation(len(straight))
    mended, defect = fit(training), fit(training, file_order_groups=True)
    a, b = (at_spots(mended, training, order) for order in (straight, mixed))
    np.testing.assert_allclose(a, b, atol=1e-5)
    a, b = (at_spots(defect, training, order) for order in (straight, mixed))
    assert np.abs(a - b).max() > 1e-3


def test_positions_between_spots_collapse_with_integer_coordinates_alone(training: TrainingSection) -> None:
    straight, shift = np.arange(len(training.spot_xy_um)), 0.3 * 53.0
    mended, defect = fit(training), fit(training, integer_coordinates=True)
    assert (
        np.abs(at_spots(mended, training, straight) - at_spots(mended, training, straight, shift)).max()
        > 1e-3
    )
    same = at_spots(defect, training, straight, shift)
    np.testing.assert_array_equal(at_spots(defect, training, straight), same)


def test_whole_positions_mean_the_same_either_way() -> None:
    torch.manual_seed(0)
    network = PaperNetwork(8, 3).eval()
    embedding, exists = torch.randn(2, 7, 8), torch.ones(2, 7, dtype=torch.bool)
    position = torch.randint(0, 512, (2, 7, 2))
    position[0, 0] = 511
    with torch.inference_mode():
        whole = network(embedding, position, exists)
        mixed = network(embedding, position.float(), exists)
    torch.testing.assert_close(whole, mixed)


def test_positions_stay_within_the_tables() -> None:
    found = lattice_position(np.array([[-53.0, 1e6], [106.0, 53.0]]), 53.0)
    np.testing.assert_allclose(found, [[511, 0], [1, 2]])


@pytest.mark.parametrize("switch", ["file_order_groups", "integer_coordinates"])
def test_a_model_with_a_defect_is_saved_with_it_and_maps_every_patch(
    switch: str, training: TrainingSection
) -> None:
    model = fit(training, **{switch: True})
    again = PaperModel.from_state(model.config(), model.state())
    assert again.switches == model.switches
    found = model.predict(training.patches)
    assert found.shape == (len(training.patches), 5)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, again.predict(training.patches))


def test_groups_of_the_file_hold_fifty(training: TrainingSection) -> None:
    # 221 spots, 50 to a group: the last one is short, and nobody is lost.
    found = at_spots(fit(training, file_order_groups=True), training, np.arange(221))
    assert GROUP_SIZE == 50
    assert np.isfinite(found).all()
