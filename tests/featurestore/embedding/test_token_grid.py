"""Token grids: where positions lie, what is written there, and that all that works on a grid works on them.

The encoder is of another package, as its author would write it: each token is the mean colour of its square, so that
whatever lands in a wrong place has a wrong number.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from install_package import install
from make_slides import painted, tissue_like, write_pyramid

from featurestore import EmbedSettings, GridSpec, TokenGridSpec, catalogue, embed, open_store, validate
from featurestore.analysis.patch_stream import open_stream
from featurestore.embedding.positions import failed_positions, patches_to_read
from featurestore.encoders.loading import ENCODERS
from featurestore.errors import EncoderError
from featurestore.events import Progress
from featurestore.grid import PatchGrid
from featurestore.slides.open_slide import open_slide
from featurestore.storage.store import Store

CODE = """
import numpy as np
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.encoders.tokens import TokenMap

SIDE = 6


class Squares:
    def __init__(self, key):
        self.identity = EncoderIdentity(key, 2, {"algorithm": "mean colour of squares"})
        self.token_map = TokenMap(SIDE)

    def encode(self, patches):
        return self.encode_tokens(patches)[0]

    def encode_tokens(self, patches):
        n, side = patches.shape[:2]
        cut = side // SIDE * SIDE
        squares = patches[:, :cut, :cut].reshape(n, SIDE, cut // SIDE, SIDE, cut // SIDE, 3)
        flat = patches.reshape(n, -1).astype(np.float32)
        own = np.stack([flat.mean(1), flat.max(1, initial=0)], axis=1)
        return own, squares.mean((2, 4), dtype=np.float32)


class Misstated(Squares):
    def __init__(self, key):
        super().__init__(key)
        self.token_map = TokenMap(SIDE + 2)


def load(key, options):
    return Squares(key)


def load_misstated(key, options):
    return Misstated(key)
"""
POINTS = "[histosge.encoders]\nsquares = squares_encoder:load\nmisstated = squares_encoder:load_misstated\n"
MPP, PATCH = 0.5, 48
EVERYWHERE = EmbedSettings(("squares",), TokenGridSpec.from_patches(MPP, PATCH, 3), tissue="none")


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    site = tmp_path_factory.mktemp("site")
    install(site, "squares-encoder", POINTS, squares_encoder=CODE)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(site)
        patched.setenv("PYTHONPATH", str(site), prepend=":")  # of worker processes
        ENCODERS.refresh()
        yield site
    ENCODERS.refresh()


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return painted(331, 269)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, picture: np.ndarray) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slide") / "p.tif", picture, MPP, levels=1)


@pytest.fixture(scope="module")
def tissue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pyramid(tmp_path_factory.mktemp("slide") / "t.tif", tissue_like(700, 620, MPP), MPP)


def _stored(store: Path, spec: GridSpec, slide: str = "p") -> tuple[PatchGrid, np.ndarray]:
    opened = Store.open(store)
    grid = opened.grid(slide, spec.key).grid
    array = opened.embedding(slide, spec.key, "squares")
    return grid, array.read((0, grid.n_rows), (0, grid.n_cols)).astype(np.float32)


@pytest.mark.parametrize(("k", "overlap"), [(3, 0), (6, 0), (2, 16), (1, 0), (4, 16)])
def test_each_position_holds_the_pixels_around_its_centre(
    plain: Path, picture: np.ndarray, tmp_path: Path, k: int, overlap: int
) -> None:
    spec = TokenGridSpec.from_patches(MPP, PATCH, k, overlap_px=overlap)
    embed(plain, tmp_path / "store", replace(EVERYWHERE, spec=spec))
    grid, values = _stored(tmp_path / "store", spec)
    tree = open_store(tmp_path / "store")["p"][spec.key].dataset
    assert np.array_equal(tree["x"], grid.x_um)
    assert np.array_equal(tree["y"], grid.y_um)
    half = spec.patch_px // 2
    assert grid.patch_um == (PATCH - overlap) / k * MPP
    for row, col in np.ndindex(*grid.shape):
        x, y = round(grid.x_um[col] / MPP), round(grid.y_um[row] / MPP)
        square = picture[y - half : y + half, x - half : x + half]
        assert np.abs(values[row, col] - square.mean((0, 1))).max() < 0.1


@pytest.mark.parametrize("overlap", [0, 16])
def test_positions_lie_inside_their_patches_of_the_patch_grid(plain: Path, overlap: int) -> None:
    slide = open_slide(str(plain))
    spec = TokenGridSpec.from_patches(MPP, PATCH, 4, overlap_px=overlap)
    fine = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, spec)
    patches = PatchGrid.for_slide(slide.size_px, slide.mpp, slide.level_mpps, spec.encoded)
    slide.close()
    assert fine.encoded == patches
    assert fine.shape == (4 * patches.n_rows, 4 * patches.n_cols)
    assert fine.stride_um == patches.stride_um / 4
    # The mean of a patch's positions is its centre, however wide the rim.
    assert np.allclose(fine.x_um.reshape(-1, 4).mean(1), patches.x_um)
    assert np.allclose(fine.y_um.reshape(-1, 4).mean(1), patches.y_um)
    assert PatchGrid.from_attrs(fine.to_attrs()) == fine


def test_the_patch_s_own_vector_follows_that_of_each_group(plain: Path, tmp_path: Path) -> None:
    with_own = TokenGridSpec.from_patches(MPP, PATCH, 3, cls_token=True)
    store = tmp_path / "store"
    for spec in (EVERYWHERE.spec, with_own, with_own.encoded):
        embed(plain, store, replace(EVERYWHERE, spec=spec))
    (_, groups), (_, joined), (_, own) = (
        _stored(store, spec) for spec in (EVERYWHERE.spec, with_own, with_own.encoded)
    )
    assert np.array_equal(joined[..., :3], groups)
    assert np.array_equal(joined[..., 3:], own.repeat(3, axis=0).repeat(3, axis=1))
    identities = {
        Store.open(store).identity("p", s.key, "squares").fingerprint for s in (with_own, EVERYWHERE.spec)
    }
    assert len(identities) == 2


def test_background_is_nan_in_a_patch_that_is_half_tissue_and_the_store_obeys_its_specification(
    tissue: Path, tmp_path: Path
) -> None:
    settings = replace(EVERYWHERE, tissue="texture", block_shape=(7, 8))
    (result,) = embed(tissue, tmp_path / "store", settings)
    stored = Store.open(tmp_path / "store").grid("t", settings.spec.key)
    _, values = _stored(tmp_path / "store", settings.spec, "t")
    whole = stored.is_tissue.reshape(stored.grid.n_rows // 3, 3, -1, 3).swapaxes(1, 2)
    assert (whole.any((2, 3)) & ~whole.all((2, 3))).sum() > 5, "patches at the edge of the tissue"
    assert np.array_equal(np.isfinite(values).all(2), stored.is_tissue)
    assert result.patches == stored.is_tissue.sum()
    assert validate(tmp_path / "store", deep=True) == []
    # Whole patches in each block, and no more positions than were requested.
    assert Store.open(tmp_path / "store").embedding("t", settings.spec.key, "squares").block_shape == (6, 6)
    (row,) = catalogue(tmp_path / "store").to_dicts()
    assert (row["grid"], row["state"], row["patches"]) == (settings.spec.key, "done", result.patches)
    assert sum(len(b.rows) for b in open_stream(tmp_path / "store").blocks()) == result.patches


def _objects(store: Path) -> dict[str, bytes]:
    return {str(file.relative_to(store)): file.read_bytes() for file in store.rglob("embedding/c/*/*/0")}


@pytest.mark.parametrize("workers", [None, 1])
def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tissue: Path, tmp_path: Path, workers: int | None
) -> None:
    settings = replace(EVERYWHERE, tissue="texture", block_shape=(9, 9))
    (whole,) = embed(tissue, tmp_path / "whole", settings)

    def stop(progress: Progress) -> None:
        if progress.done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embed(tissue, tmp_path / "killed", settings, on_progress=stop)
    (resumed,) = embed(tissue, tmp_path / "killed", settings, workers=workers)
    assert 0 < resumed.computed < whole.computed
    assert _objects(tmp_path / "killed") == _objects(tmp_path / "whole")
    (again,) = embed(tissue, tmp_path / "killed", settings)
    assert again.computed == 0


def test_a_dry_run_counts_the_objects_and_bytes_that_are_then_written(tissue: Path, tmp_path: Path) -> None:
    settings = replace(EVERYWHERE, tissue="texture", block_shape=(8, 8))
    (planned,) = embed(tissue, tmp_path / "store", settings, dry_run=True)
    (done,) = embed(tissue, tmp_path / "store", settings)
    objects = _objects(tmp_path / "store")
    assert (planned.planned, planned.patches) == (done.computed, done.patches)
    assert planned.bytes_to_store == sum(map(len, objects.values()))


def test_what_could_not_be_read_is_counted_by_position(tissue: Path, tmp_path: Path) -> None:
    """A truncated file loses tiles: their patches' positions are NaN, recorded, and tried again."""
    broken = tmp_path / "t.tif"
    broken.write_bytes(tissue.read_bytes())
    spec = TokenGridSpec.from_patches(MPP, PATCH, 2)
    settings = replace(EVERYWHERE, spec=spec)
    (fine,) = embed(broken, tmp_path / "fine", settings)
    with tifffile.TiffFile(broken) as tiff:
        page = tiff.pages[0]
        offset, size = page.dataoffsets[37], page.databytecounts[37]
    with broken.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * size)
    (result,) = embed(broken, tmp_path / "store", settings)
    _, values = _stored(tmp_path / "store", spec, "t")
    lost = ~np.isfinite(values).all(2)
    assert result.unreadable == lost.sum() > 0
    assert fine.unreadable == 0
    assert (lost.reshape(lost.shape[0] // 2, 2, -1, 2).swapaxes(1, 2).any((2, 3)).sum() * 4) == lost.sum()
    records = [record for _, record in Store.open(tmp_path / "store").block_failures("t")]
    recorded = {tuple(patch) for record in records for patch in record["patches"]}
    assert recorded == set(map(tuple, np.argwhere(lost).tolist()))


def test_an_encoder_without_a_map_is_refused_before_anything_is_written(plain: Path, tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="colour has no map of tokens, so --tokens does not work with it"):
        embed(plain, tmp_path / "store", replace(EVERYWHERE, encoders=("colour",)))
    assert not (tmp_path / "store").exists()
    spec = TokenGridSpec.from_patches(MPP, PATCH, 4)
    with pytest.raises(
        EncoderError, match=r"6 x 6 tokens .* --tokens 4 does not divide; give --tokens 1, 2, 3 or 6"
    ):
        embed(plain, tmp_path / "store", replace(EVERYWHERE, spec=spec))
    spec = TokenGridSpec.from_patches(MPP, PATCH, 2, overlap_px=6)
    with pytest.raises(
        EncoderError, match=r"--token-overlap 6 does not cut off whole tokens; give --token-overlap 0 or 16"
    ):
        embed(plain, tmp_path / "store", replace(EVERYWHERE, spec=spec))
    misstated = replace(EVERYWHERE, encoders=("misstated",), spec=TokenGridSpec.from_patches(MPP, PATCH, 4))
    with pytest.raises(EncoderError, match=r"gave maps of shape \(.*, 6, 6, 3\) .* its token_map says 8 x 8"):
        embed(plain, tmp_path / "s", misstated)


@pytest.mark.parametrize(
    ("patch", "k", "overlap", "message"),
    [
        (48, 5, 0, "5 x 5 positions do not divide a patch of 48 px; give one of 1, 2, 3, 4, 6, 8, 12"),
        (48, 3, 8, "48 px without its rims of 4 px; give one of 1, 2, 4, 5, 8"),
        (48, 3, 30, "cannot overlap by 30 px; give 0 to 24"),
        (48, 3, 9, "cannot overlap by 9 px; give 0 or an even number"),
        (48, 0, 0, "0 x 0 positions"),
    ],
)
def test_positions_of_no_whole_pixels_are_refused_with_those_that_are(
    patch: int, k: int, overlap: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TokenGridSpec.from_patches(MPP, patch, k, overlap_px=overlap)


@pytest.mark.parametrize(("overlap", "expected"), [(0, 48), (16, 64), (24, 48)])
def test_positions_further_apart_than_their_reach_share_no_pixel(overlap: int, expected: int) -> None:
    """Counted on pixels: two positions share some if a patch of one and a patch of the other overlap."""
    spec = TokenGridSpec.from_patches(1.0, PATCH, 2, overlap_px=overlap)
    grid = PatchGrid.for_slide((700, 48), 1.0, (1.0,), spec)
    assert grid.receptive_um == expected
    starts = np.arange(grid.encoded.n_cols).repeat(2) * spec.encoded.stride_px
    share = np.abs(starts[:, None] - starts) < PATCH
    apart = np.abs(grid.x_um[:, None] - grid.x_um)
    assert not share[apart >= grid.receptive_um].any()
    assert share[(apart > grid.receptive_um - 1.5 * grid.stride_um) & (apart < grid.receptive_um)].any()


def test_background_of_a_patch_that_cannot_be_read_is_no_failure() -> None:
    grid = PatchGrid(EVERYWHERE.spec, MPP, MPP, 6, 9)
    tissue = np.zeros((6, 9), dtype=bool)
    tissue[4, 6:8] = tissue[0, 0] = True
    assert failed_positions(((1, 2, "torn"),), tissue, grid) == [(4, 6, "torn"), (4, 7, "torn")]
    assert patches_to_read(tissue, grid).tolist() == [[True, False, False], [False, False, True]]
