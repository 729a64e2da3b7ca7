"""Stain normalisation: equal to other implementations, and the same for every block, run and encoder."""

from pathlib import Path

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid
from skimage.color import lab2rgb, rgb2lab
from sklearn.decomposition import PCA

from featurestore.embedding.embed import EmbedSettings, embed
from featurestore.encoders import stain_normalisation as stain
from featurestore.encoders.loading import load_encoder
from featurestore.errors import EncoderError, IdentityMismatchError, SlideError
from featurestore.grid import GridSpec
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store

SPEC = GridSpec(0.5, 64, 64)
DYES = np.array([[0.65, 0.70, 0.29], [0.12, 0.95, 0.28]])


def section(seed: int = 0, side: int = 160, strong: float = 1.0) -> np.ndarray:
    """Two dyes in random amounts, patchwise; whole numbers drawn from a stream that numpy keeps the same."""
    rng = np.random.default_rng(seed)
    amounts = rng.integers(0, 1000, (side // 8, side // 8, 2)) / 1000
    amounts = amounts.repeat(8, axis=0).repeat(8, axis=1) * (1.6, 1.1) * strong
    amounts[:, :, 1] += 0.25
    light = 240 * np.exp(-amounts @ DYES)
    noise = rng.integers(-4, 5, (side, side, 3))
    return np.clip(light + noise, 0, 255).astype(np.uint8)


def macenko_in_another_way(image: np.ndarray) -> np.ndarray:
    """Macenko 2009 by principal components and the normal equations, in double precision."""
    density = -np.log((image.reshape(-1, 3).astype(float) + 1) / 240)
    kept = density[(density >= 0.15).all(axis=1)]
    axes = PCA(2, svd_solver="covariance_eigh").fit(kept).components_
    axes = axes * np.sign(axes.sum(axis=1))[:, None]
    angles = np.arctan2(kept @ axes[0], kept @ axes[1])
    ends = [np.cos(a) * axes[1] + np.sin(a) * axes[0] for a in np.quantile(angles, [0.01, 0.99])]
    dyes = np.array(sorted(ends, key=lambda dye: -dye[0]))
    amounts = np.linalg.solve(dyes @ dyes.T, dyes @ density.T)
    amounts *= np.array([[1.9705], [1.0308]]) / np.quantile(amounts, 0.99, axis=1)[:, None]
    target = np.array([[0.5626, 0.7201, 0.4062], [0.2159, 0.8012, 0.5581]])
    return np.minimum(240 * np.exp(-(amounts.T @ target)), 255).reshape(image.shape)


def reinhard_with_scikit_image(image: np.ndarray) -> np.ndarray:
    lab = rgb2lab(image)
    flat = lab.reshape(-1, 3)
    moved = (lab - flat.mean(axis=0)) / flat.std(axis=0) * stain.TARGET_SD + stain.TARGET_MEAN
    return np.asarray(lab2rgb(moved) * 255)


@pytest.mark.filterwarnings("ignore:Conversion from CIE-LAB")
@pytest.mark.parametrize(
    ("method", "other"), [("macenko", macenko_in_another_way), ("reinhard", reinhard_with_scikit_image)]
)
def test_pixels_equal_those_of_another_implementation(method: str, other) -> None:  # type: ignore[no-untyped-def]
    for seed in range(3):
        image = section(seed, strong=0.7 + 0.3 * seed)
        found = stain.fit_stain(method, image.reshape(-1, 3)).normaliser()(image)
        # Cut off to whole numbers in single precision: a last bit decides between two of them.
        apart = np.abs(found - np.floor(other(image)))
        assert apart.max() <= 1
        assert (apart == 0).mean() > 0.995


# What torchstain 1.4.1 gives: numpy backend, `NumpyMacenkoNormalizer().normalize(section())` and
# `NumpyReinhardNormalizer` with target_means = TARGET_MEAN and target_stds = TARGET_SD;
# pixels [8 * k + 3, 8 * k + 5] for k in 0..5.
TORCHSTAIN = {
    "macenko": [
        [84, 47, 90],
        [228, 192, 205],
        [99, 57, 100],
        [108, 66, 110],
        [204, 147, 172],
        [137, 87, 128],
    ],
    "reinhard": [
        [79, 45, 89],
        [255, 251, 225],
        [103, 57, 104],
        [116, 70, 115],
        [255, 172, 186],
        [159, 96, 133],
    ],
}


@pytest.mark.parametrize("method", stain.METHODS)
def test_pixels_equal_those_that_torchstain_gave(method: str) -> None:
    image = section()
    found = stain.fit_stain(method, image.reshape(-1, 3)).normaliser()(image)
    diagonal = [found[8 * k + 3, 8 * k + 5].tolist() for k in range(6)]
    np.testing.assert_allclose(diagonal, TORCHSTAIN[method], atol=1)


@pytest.mark.parametrize("method", stain.METHODS)
def test_two_stainings_of_one_section_become_alike(method: str) -> None:
    weak, strong = section(strong=0.7), section(strong=1.2)
    before = np.abs(weak.astype(int) - strong).mean()
    both = [stain.fit_stain(method, x.reshape(-1, 3)).normaliser()(x).astype(int) for x in (weak, strong)]
    assert np.abs(both[0] - both[1]).mean() < 0.35 * before


def test_a_fit_does_not_depend_on_the_sign_of_an_eigenvector(monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = section().reshape(-1, 3)
    plain, eigh = stain.fit_macenko(pixels), np.linalg.eigh

    def turned(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, vectors = eigh(matrix)
        return values, -vectors

    monkeypatch.setattr(np.linalg, "eigh", turned)
    np.testing.assert_allclose(stain.fit_macenko(pixels).values, plain.values, rtol=1e-9)


def test_what_cannot_be_measured_is_one_line() -> None:
    with pytest.raises(SlideError, match="needs 10000 pixels of tissue to measure the stain, and found 9"):
        stain.fit_stain("macenko", np.zeros((9, 3), np.uint8))
    one = np.broadcast_to(np.array([120, 80, 150], np.uint8), (20_000, 3))
    with pytest.raises(SlideError, match=r"only one stain|both stains"):
        stain.fit_stain("macenko", one)
    with pytest.raises(SlideError, match="tissue of one colour only"):
        stain.fit_stain("reinhard", one)
    with pytest.raises(EncoderError, match="--stain 'mac' is unknown: choose none, macenko or reinhard"):
        EmbedSettings(stain="mac")


def test_a_fit_is_read_back_to_the_last_bit() -> None:
    fit = stain.fit_stain("macenko", section().reshape(-1, 3))
    assert stain.parse_fit(fit.to_attrs(), "A") == fit
    with pytest.raises(EncoderError, match="normalised by 'vahadane' with 8 numbers"):
        stain.parse_fit({"method": "vahadane", "values": [0.0] * 8}, "A")


@pytest.fixture(scope="module")
def slide_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = tissue_like(700, 600, 0.5)
    return write_pyramid(tmp_path_factory.mktemp("slides") / "A.tif", image, 0.5, levels=1)


def test_vectors_are_those_of_normalised_pixels(slide_file: Path, tmp_path: Path) -> None:
    settings = EmbedSettings(("colour", "morphology"), SPEC, stain="macenko", block_shape=(3, 4))
    (result,) = embed(slide_file, tmp_path / "store", settings)
    assert result.state == "done"
    store, slide = Store.open(tmp_path / "store"), open_slide(slide_file)
    attrs = store.stain("A", SPEC.key, "colour")
    assert attrs is not None
    normalise = stain.parse_fit(*attrs).normaliser()
    stored = store.grid("A", SPEC.key)
    for key in settings.encoders:
        assert store.identity("A", SPEC.key, key).facts["stain"] == stain.stain_facts("macenko")
        encoder, array = load_encoder(key), store.embedding("A", SPEC.key, key)
        for block in stored.planned((3, 4)):
            values = array.read_block(block)
            row, col = np.argwhere(stored.is_tissue[block.slices])[0]
            at = (int(row) + block.rows[0], int(col) + block.cols[0])
            x, y, width, height = stored.grid.region_px((at[0], at[0] + 1), (at[1], at[1] + 1))
            pixels = slide.read_region(x, y, width, height, stored.grid.effective_mpp)
            expected = encoder.encode(normalise(pixels)[None])[0]
            np.testing.assert_allclose(values[row, col], expected, rtol=2e-3, atol=2e-3)
            assert not np.allclose(values[row, col], encoder.encode(pixels[None])[0], rtol=2e-3, atol=2e-3)


def test_another_stain_is_another_encoder(slide_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    embed(slide_file, store, EmbedSettings(("colour",), SPEC, stain="reinhard"))
    (again,) = embed(slide_file, store, EmbedSettings(("colour",), SPEC, stain="reinhard"))
    assert (again.state, again.computed) == ("done", 0)
    for other in ("none", "macenko"):
        with pytest.raises(IdentityMismatchError):
            embed(slide_file, store, EmbedSettings(("colour",), SPEC, stain=other))


def test_an_encoder_that_is_added_later_is_given_the_same_pixels(slide_file: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    embed(slide_file, store, EmbedSettings(("colour",), SPEC, stain="macenko"))
    embed(slide_file, store, EmbedSettings(("colour", "morphology"), SPEC, stain="macenko"))
    opened = Store.open(store)
    first, second = (opened.stain("A", SPEC.key, key) for key in ("colour", "morphology"))
    assert first is not None
    assert second is not None
    assert first[0] == second[0]
