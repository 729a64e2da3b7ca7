"""Quality flags: each is found where it was painted and not on clean tissue, and says the same whatever the batch."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy import ndimage

from featurestore.errors import TissueError
from featurestore.tissue.flags import Flag, count_skipped, flag_attrs, flag_shares, parse_skip, shares_text
from featurestore.tissue.focus import contrasts, is_blurred
from featurestore.tissue.overview_flags import overview_masks

MPP = 8.0
HEIGHT, WIDTH = 431, 359
Density = np.ndarray


def _tissue(seed: int = 0) -> tuple[Density, np.ndarray]:
    """Optical density ``(height, width, 3)`` of a round section at 8 microns per pixel, and where it is."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    inside = np.hypot((y - HEIGHT / 2) / HEIGHT, (x - WIDTH / 2) / WIDTH) < 0.38
    nuclei = ndimage.gaussian_filter(rng.random((HEIGHT, WIDTH)), 1)
    stain = 0.35 + 0.8 * (nuclei - nuclei.mean())
    density = stain[..., None] * np.array([0.45, 1.0, 0.35])
    return density * inside[..., None], inside


def _rgb(density: Density, lamp: tuple[float, float, float] = (244, 240, 233)) -> np.ndarray:
    noise = np.random.default_rng(1).normal(0, 1, density.shape)
    return np.clip(np.array(lamp) * np.exp(-density) + noise, 0, 255).astype(np.uint8)


def _diagonal(half_px: float) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (np.abs((y - HEIGHT / 2) - (x - WIDTH / 2)) < half_px * 1.414) & (np.abs(x - WIDTH / 2) < 60)


def _pen(ink: tuple[float, float, float]) -> Callable[[Density, np.ndarray], tuple[Density, np.ndarray]]:
    def draw(density: Density, inside: np.ndarray) -> tuple[Density, np.ndarray]:
        where = _diagonal(13)
        return density + where[..., None] * np.array(ink), where

    return draw


def _fold(density: Density, inside: np.ndarray) -> tuple[Density, np.ndarray]:
    where = _diagonal(6) & inside
    return density + where[..., None] * np.roll(density, (17, 23), axis=(0, 1)), where


def _bubble(density: Density, inside: np.ndarray) -> tuple[Density, np.ndarray]:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    distance = np.hypot(y - 190, x - 170)
    rim = np.exp(-(((distance - 53) / 2.5) ** 2))
    return density + rim[..., None], distance < 53


def _edge(density: Density, inside: np.ndarray) -> tuple[Density, np.ndarray]:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    where = np.abs(x - 131 - 0.006 * y) < 3
    return density + 0.8 * where[..., None], where


PAINTED = {
    "black pen": (Flag.PEN, _pen((1.9, 1.9, 1.9))),
    "blue pen": (Flag.PEN, _pen((1.9, 1.1, 0.25))),
    "green pen": (Flag.PEN, _pen((1.5, 0.35, 1.1))),
    "red pen": (Flag.PEN, _pen((0.15, 1.5, 1.6))),
    "fold": (Flag.FOLD, _fold),
    "bubble": (Flag.BUBBLE, _bubble),
    "edge": (Flag.EDGE, _edge),
}


@pytest.mark.parametrize("kind", PAINTED)
def test_what_is_painted_is_flagged_where_it_is(kind: str) -> None:
    flag, draw = PAINTED[kind]
    density, truth = draw(*_tissue())
    masks, mpp = overview_masks(_rgb(density), MPP)
    assert mpp == 16.0
    truth = (
        truth[: HEIGHT // 2 * 2, : WIDTH // 2 * 2].reshape(HEIGHT // 2, 2, WIDTH // 2, 2).mean(axis=(1, 3))
    )
    found = masks[flag]
    assert found[truth == 1].mean() > 0.8
    # Not far from it: a pixel or two of an edge, and the whole rim of a bubble.
    near = ndimage.binary_dilation(truth > 0, iterations=9)
    assert not found[~near].any()
    others = [name for name in masks if name != flag and masks[name].any()]
    assert others == []


@pytest.mark.parametrize("lamp", [(244, 240, 233), (250, 225, 200)], ids=["white", "yellow"])
@pytest.mark.parametrize("strength", [0.5, 1.0, 1.8])
def test_clean_tissue_of_any_strength_has_no_flag(lamp: tuple[float, float, float], strength: float) -> None:
    density, _ = _tissue()
    masks, _ = overview_masks(_rgb(strength * density, lamp), MPP)
    assert {flag.name: int(mask.sum()) for flag, mask in masks.items()} == dict.fromkeys(
        ("PEN", "FOLD", "BUBBLE", "EDGE"), 0
    )


def test_a_field_that_is_covered_with_tissue_has_no_flag() -> None:
    rng = np.random.default_rng(3)
    stain = 0.5 + 1.5 * (ndimage.gaussian_filter(rng.random((HEIGHT, WIDTH)), 1) - 0.5)
    masks, _ = overview_masks(_rgb(stain[..., None] * np.array([0.45, 1.0, 0.35])), MPP)
    assert not any(mask.any() for mask in masks.values())


def test_a_field_that_is_covered_with_ink_is_all_pen() -> None:
    masks, _ = overview_masks(_rgb(np.broadcast_to((1.9, 1.1, 0.25), (HEIGHT, WIDTH, 3))), MPP)
    assert masks[Flag.PEN].all()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (3, 2), (40, 37)])
@pytest.mark.parametrize("grey", [0, 120, 255])
def test_slides_of_one_colour_and_of_a_few_pixels_are_judged(shape: tuple[int, int], grey: int) -> None:
    masks, mpp = overview_masks(np.full((*shape, 3), grey, np.uint8), MPP)
    assert len({mask.shape for mask in masks.values()}) == 1
    assert mpp >= MPP


def _sharp(n: int, side: int, mpp: float) -> np.ndarray:
    """Patches ``(n, side, side, 3)`` of nuclei 7 microns wide with sharp edges."""
    rng = np.random.default_rng(5)
    cells = rng.random((n, side, side)) < (mpp / 12) ** 2
    radius = 3.5 / mpp
    around = int(radius) + 1
    y, x = np.mgrid[-around : around + 1, -around : around + 1]
    nuclei = np.stack([ndimage.binary_dilation(one, np.hypot(y, x) <= radius) for one in cells])
    colour = np.where(nuclei[..., None], (95, 60, 140), (225, 160, 195))
    return np.clip(colour + rng.normal(0, 2, colour.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("mpp", [0.25, 0.5, 1.0])
def test_blurred_patches_are_told_from_sharp_ones(mpp: float) -> None:
    sharp = _sharp(11, 128, mpp)
    sigma = 3.0 / mpp
    blurred = ndimage.gaussian_filter(sharp.astype(float), (0, sigma, sigma, 0))
    noise = np.random.default_rng(7).normal(0, 1.5, blurred.shape)
    assert not is_blurred(sharp, mpp).any()
    assert is_blurred(np.clip(blurred + noise, 0, 255).astype(np.uint8), mpp).all()


def test_glass_and_patches_of_a_few_pixels_are_not_called_blurred() -> None:
    noise = np.random.default_rng(2).normal(240, 2, (5, 64, 64, 3))
    assert not is_blurred(np.clip(noise, 0, 255).astype(np.uint8), 0.5).any()
    assert not is_blurred(np.zeros((3, 2, 2, 3), np.uint8), 0.25).any()
    assert is_blurred(np.zeros((0, 64, 64, 3), np.uint8), 0.5).shape == (0,)


@pytest.mark.parametrize("side", [61, 224, 601])
def test_focus_of_a_patch_does_not_depend_on_its_batch(side: int) -> None:
    """A resumed run cuts batches elsewhere, and must store the same bits; so sums must be exact."""
    patches = np.random.default_rng(11).integers(0, 256, (7, side, side, 3)).astype(np.uint8)
    whole = contrasts(patches, 0.5)
    for number in range(7):
        one = contrasts(patches[number : number + 1], 0.5)
        assert [values[0] for values in one] == [values[number] for values in whole]
    # Against whole numbers, which are exact whatever their order.
    rows = patches[:, :, :, 1].astype(np.int64)[:, : side - 8 : side // 7]
    across = ((rows[..., 1:] - rows[..., :-1]) ** 2).mean(axis=(1, 2))
    below = patches[:, :, :, 1].astype(np.int64)[:, 1 : side - 7 : side // 7]
    down = ((below - rows) ** 2).mean(axis=(1, 2))
    np.testing.assert_allclose(whole[0], (across + down) / 2 - 8, rtol=1e-13)


def test_skip_takes_names_in_any_order_and_refuses_others() -> None:
    assert parse_skip((" Fold", "pen", "fold", "")) == ("pen", "fold")
    assert parse_skip(("",)) == ()
    with pytest.raises(
        TissueError, match=r"--skip 'ink' is no quality flag; there are pen, blur, fold, bubble, edge$"
    ):
        parse_skip(("pen", "ink"))


def test_shares_are_of_tissue_with_what_was_skipped_and_blur_of_what_was_measured() -> None:
    known = Flag.FOCUS_KNOWN
    quality = np.array([[1, 1 | 32, known | 2, known, 0, 8]], np.uint8)
    tissue = np.array([[True, False, True, True, True, False]])
    shares = flag_shares(quality, tissue)
    assert shares == {"pen": 0.4, "blur": 0.5, "skipped": 0.2}
    assert count_skipped(quality) == 1
    assert shares_text(shares) == "blur 50%, pen 40%, skipped 20%"
    assert shares_text({"fold": 0.0004}) == "fold <1%"
    assert flag_shares(quality, np.zeros_like(tissue) & False) == {"pen": 1.0, "skipped": 1.0}
    assert flag_shares(np.zeros((2, 3), np.uint8), np.zeros((2, 3), bool)) == {}


def test_the_bits_are_named_as_the_cf_conventions_name_them() -> None:
    assert flag_attrs() == {
        "flag_masks": [1, 2, 4, 8, 16, 32, 128],
        "flag_meanings": "pen blur fold bubble edge skipped focus_known",
    }
