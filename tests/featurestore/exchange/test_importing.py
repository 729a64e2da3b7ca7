"""Embeddings of other tools come in at their own places, or are refused in one line."""

import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import zarr

from featurestore.documents import DocumentError
from featurestore.encoders.protocol import EncoderIdentity
from featurestore.errors import MppError, StoreError
from featurestore.exchange.h5 import write_h5
from featurestore.exchange.importing import ImportOptions, import_embeddings
from featurestore.exchange.lattice import find_lattice, find_step
from featurestore.grid import GridSpec, PatchGrid
from featurestore.storage.block_array import BlockArray
from featurestore.storage.catalogue import catalogue
from featurestore.storage.removal import remove
from featurestore.storage.selection import open_slides
from featurestore.storage.store import SlideRecord, Store
from featurestore.storage.tree import open_store
from featurestore.storage.validation import validate
from featurestore.tissue.survey import Survey

SIZE = (1310, 1109)  # width, height
PATCH, MPP = 113, 0.5
DIM = 7
CELLS = np.argwhere(np.random.default_rng(5).random((8, 10)) > 0.3)  # (row, col)
CORNERS = CELLS[:, ::-1] * PATCH
FEATURES = np.random.default_rng(3).standard_normal((len(CORNERS), DIM)).astype(np.float32)
TRIDENT = {
    "patch_size": PATCH,
    "patch_size_level0": PATCH,
    "overlap": 0,
    "level0_magnification": 20,
    "target_magnification": 20,
    "name": "A",
    "savetodir": "/x",
    "level0_width": SIZE[0],
    "level0_height": SIZE[1],
}
CLAM_OPTIONS = {"patch_px": PATCH, "mpp": MPP, "encoder": "resnet50"}


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _slide(tmp_path_factory.mktemp("slides") / "A.tif", SIZE)


def _slide(path: Path, size: tuple[int, int]) -> Path:
    pixels = np.full((size[1], size[0], 3), 200, np.uint8)
    per_cm = 1e4 / MPP
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=(256, 256), resolution=(per_cm, per_cm), resolutionunit=3
    )
    return path


def _h5(
    path: Path,
    features: Any = FEATURES,
    corners: Any = CORNERS,
    attrs: dict[str, Any] | None = None,
    *,
    encoder: str | None = "uni_v1",
    names: tuple[str, str] = ("features", "coords"),
    file_attrs: dict[str, Any] | None = None,
) -> Path:
    with h5py.File(path, "w") as file:
        vectors, coords = (
            file.create_dataset(name, data=data)
            for name, data in zip(names, (features, corners), strict=True)
        )
        coords.attrs.update(TRIDENT if attrs is None else attrs)
        vectors.attrs.update({"encoder": encoder} if encoder else {})
        file.attrs.update(file_attrs or {})
    return path


def _stored(store: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vectors ``(y, x, dim)`` and centres ``x, y`` of the only embedding, with zarr alone."""
    slides = [group for name, group in zarr.open_group(store, mode="r").groups() if not name.startswith("_")]
    ((_, grid),) = slides[0].groups()
    ((_, encoder),) = grid.groups()
    return np.asarray(encoder["embedding"][...]), np.asarray(grid["x"][...]), np.asarray(grid["y"][...])


def _check(store: Path, features: np.ndarray, corners: np.ndarray, side: float = PATCH) -> None:
    """Check that each vector lies where its patch does, that there is no other, and that the store is valid."""
    values, x, y = _stored(store)
    centres = (np.asarray(corners, float) + side / 2) * MPP
    cols = np.abs(x[None] - centres[:, :1]).argmin(axis=1)
    rows = np.abs(y[None] - centres[:, 1:]).argmin(axis=1)
    np.testing.assert_allclose(np.stack([x[cols], y[rows]], axis=1), centres, atol=MPP)
    np.testing.assert_array_equal(values[rows, cols], features.astype(np.float16))
    assert np.isfinite(values).all(axis=2).sum() == len(features)
    assert validate(str(store), deep=True) == []


def test_files_come_in_whatever_their_arrays_look_like(slide: Path, tmp_path: Path) -> None:
    variants = {
        "plain": (FEATURES, CORNERS),
        "batch": (FEATURES[None], CORNERS[None].astype(np.int32)),
        "float64": (FEATURES.astype(np.float64), CORNERS.astype(float)),
        "uint32": (FEATURES, CORNERS.astype(np.uint32)),
    }
    for name, (features, corners) in variants.items():
        file = _h5(tmp_path / f"{name}.h5", features, corners)
        done = import_embeddings(file, tmp_path / name, ImportOptions(slide))
        assert (done.patches, done.grid_key) == (len(CORNERS), f"mpp0.5000_px{PATCH}_stride{PATCH}")
        _check(tmp_path / name, FEATURES, CORNERS)


def test_a_file_of_one_patch_comes_in(slide: Path, tmp_path: Path) -> None:
    for name, features, corners in (
        ("rows", FEATURES[:1], CORNERS[7:8]),
        ("batch", FEATURES[None, :1], CORNERS[7:8]),
        ("flat", FEATURES[0], CORNERS[7]),
    ):
        import_embeddings(
            _h5(tmp_path / f"{name}.h5", features, corners), tmp_path / name, ImportOptions(slide)
        )
        _check(tmp_path / name, FEATURES[:1], CORNERS[7:8])


def test_two_slides_by_one_encoder_have_one_identity(slide: Path, tmp_path: Path) -> None:
    first = _h5(tmp_path / "A.h5")
    second = _h5(tmp_path / "B.h5", FEATURES[:9] * 2, CORNERS[:9], {**TRIDENT, "name": "B"})
    other = _h5(tmp_path / "C.h5", attrs={**TRIDENT, "name": "C"}, encoder="conch_v1")
    for file in (first, second, other):
        import_embeddings(file, tmp_path / "store", ImportOptions(slide))
    by_slide = {row["slide"]: row for row in catalogue(str(tmp_path / "store")).to_dicts()}
    assert by_slide["A"]["fingerprint"] == by_slide["B"]["fingerprint"] != by_slide["C"]["fingerprint"]
    array = Store.open(tmp_path / "store").embedding("B", by_slide["B"]["grid"], "uni_v1")
    assert len(array.attrs["imported"]["file_sha256"]) == 64


def test_a_file_that_an_earlier_version_imported_goes_on(slide: Path, tmp_path: Path) -> None:
    file = _h5(tmp_path / "A.h5")
    done = import_embeddings(file, tmp_path / "new", ImportOptions(slide))
    new = Store.open(tmp_path / "new")
    array = new.embedding("A", done.grid_key, "uni_v1")
    # As commit 6995a84 wrote it: what identifies the file is among the encoder's facts.
    earlier = EncoderIdentity("uni_v1", DIM, {"imported_from": "TRIDENT", **array.attrs["imported"]})
    old, stored = Store.open_or_create(tmp_path / "old"), new.grid("A", done.grid_key)
    old.add_slide(new.slide("A"))
    attrs = new.grid_attrs("A", done.grid_key)
    old.add_grid("A", stored.grid, Survey(stored.tissue, stored.rgb, attrs["tissue"]), attrs["software"])
    old.add_embedding("A", stored.grid, earlier)
    import_embeddings(file, tmp_path / "old", ImportOptions(slide))
    assert old.identity("A", done.grid_key, "uni_v1") == earlier
    _check(tmp_path / "old", FEATURES, CORNERS)


def test_features_of_another_slide_are_refused_with_both_sizes(slide: Path, tmp_path: Path) -> None:
    other = _slide(tmp_path / "B.tif", (2620, 2218))
    with pytest.raises(StoreError, match=r"of a slide of 1310 x 1109 px, and .*B\.tif has 2620 x 2218 px"):
        import_embeddings(_h5(tmp_path / "A.h5"), tmp_path / "store", ImportOptions(other))
    clam = {"patch_size": 57, "downsample": [2.0, 2.0], "level_dim": [1310, 1109], "name": "A"}
    with pytest.raises(StoreError, match="of a slide of 2620 x 2218 px"):
        import_embeddings(
            _h5(tmp_path / "C.h5", attrs=clam), tmp_path / "store", ImportOptions(slide, encoder="resnet50")
        )
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("corner", [(-113, 0), (0, -1), (1311, 0), (0, 11300)])
def test_patches_beyond_the_slide_are_refused_with_where(
    slide: Path, tmp_path: Path, corner: tuple[int, int]
) -> None:
    corners = np.concatenate([CORNERS[1:], [corner]])
    file = _h5(tmp_path / "A.h5", corners=corners, attrs={}, encoder=None)
    with pytest.raises(
        StoreError, match=rf"1 of {len(CORNERS)} patches begin beyond .*\({corner[0]}, {corner[1]}\)"
    ):
        import_embeddings(file, tmp_path / "store", ImportOptions(slide, **CLAM_OPTIONS))
    assert not (tmp_path / "store").exists()


def test_values_beyond_float16_are_refused_with_the_factor_that_fits(slide: Path, tmp_path: Path) -> None:
    large = FEATURES * np.float32(60000.0)
    file = _h5(tmp_path / "A.h5", large)
    with pytest.raises(StoreError, match=r"values up to \d+, .* --scale (0\.\d+)") as refused:
        import_embeddings(file, tmp_path / "store", ImportOptions(slide))
    assert not (tmp_path / "store").exists()
    scale = float(str(refused.value).split("--scale ")[1].split(",")[0])
    done = import_embeddings(file, tmp_path / "store", ImportOptions(slide, scale=scale))
    assert done.patches == len(CORNERS)
    _check(tmp_path / "store", large * np.float32(scale), CORNERS)
    facts = Store.open(tmp_path / "store").identity("A", done.grid_key, "uni_v1").facts
    assert facts["scale"] == scale


def test_vectors_that_are_not_finite_in_the_file_are_counted(slide: Path, tmp_path: Path) -> None:
    features = FEATURES.copy()
    features[3, 2], features[5] = np.nan, np.inf
    done = import_embeddings(_h5(tmp_path / "A.h5", features), tmp_path / "store", ImportOptions(slide))
    assert (done.patches, done.not_finite) == (len(CORNERS) - 2, 2)
    keep = np.delete(np.arange(len(CORNERS)), [3, 5])
    _check(tmp_path / "store", FEATURES[keep], CORNERS[keep])


def test_a_grid_that_begins_at_the_tissue_has_an_origin(slide: Path, tmp_path: Path) -> None:
    corners = CORNERS + np.array([37, 53])
    keep = (corners < (SIZE[0] - PATCH, SIZE[1] - PATCH)).all(axis=1)
    corners, features = corners[keep], FEATURES[keep]
    file = _h5(tmp_path / "A.h5", features, corners, {}, encoder=None)
    done = import_embeddings(file, tmp_path / "store", ImportOptions(slide, **CLAM_OPTIONS))
    assert done.grid_key == f"mpp0.5000_px{PATCH}_stride{PATCH}_offset"
    _check(tmp_path / "store", features, corners)
    stored = Store.open(tmp_path / "store").grid("A", done.grid_key)
    assert stored.grid.origin_px == (37, 53)
    assert stored.grid.region_px((2, 3), (1, 2))[:2] == (37 + PATCH, 53 + 2 * PATCH)
    # Out again, the corners are those that came in.
    write_h5(Store.open(tmp_path / "store"), "A", done.grid_key, "resnet50", tmp_path / "out.h5")
    with h5py.File(tmp_path / "out.h5") as out:
        assert sorted(map(tuple, out["coords"][...])) == sorted(map(tuple, corners))


def test_pieces_of_tissue_with_grids_of_their_own_are_stored_patch_by_patch(
    slide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featurestore.storage.spots.CHUNK", 17)
    corners = CORNERS.copy()
    corners[40:] += (31, 17)
    features, store = FEATURES.copy(), tmp_path / "store"
    features[5] = np.nan
    file = _h5(tmp_path / "A.h5", features, corners, {}, encoder=None)
    for _ in range(2):  # the second time there is nothing to do
        done = import_embeddings(file, store, ImportOptions(slide, slide_id="A", **CLAM_OPTIONS))
        assert (done.grid_key, done.patches, done.not_finite) == (
            f"spots-mpp0.5000_px{PATCH}",
            len(corners) - 1,
            1,
        )
    group = zarr.open_group(store, mode="r")["A"][done.grid_key]
    np.testing.assert_array_equal(group["x"][...], (corners[:, 0] + PATCH / 2) * MPP)
    np.testing.assert_array_equal(group["y"][...], (corners[:, 1] + PATCH / 2) * MPP)
    np.testing.assert_array_equal(group["resnet50/embedding"][...], features.astype(np.float16))
    assert validate(str(store), deep=True) == []
    (row,) = catalogue(str(store)).to_dicts()
    assert (row["grid"], row["state"], row["patches"]) == (done.grid_key, "done", len(corners))
    tree = open_store(str(store))
    assert tree[f"A/{done.grid_key}/resnet50"].embedding.dims == ("patch", "feature")
    with pytest.raises(StoreError, match="need a grid"):
        Store.open(store).select(done.grid_key, None, "A")
    with pytest.raises(StoreError, match="holds no embedding for grid any"):
        open_slides(Store.open(store), None, None, None)
    # An object that is gone is a problem, and the same import writes it again.
    lost = store / "A" / done.grid_key / "resnet50" / "embedding" / "c" / "2" / "0"
    lost.unlink()
    assert [problem.path for problem in validate(str(store))] == [str(lost.relative_to(store))]
    assert catalogue(str(store))["state"].to_list() == ["partial"]
    import_embeddings(file, store, ImportOptions(slide, slide_id="A", **CLAM_OPTIONS))
    assert validate(str(store), deep=True) == []
    other = _h5(tmp_path / "B.h5", features, corners + 1, {}, encoder=None)
    with pytest.raises(StoreError, match="stored with other patches"):
        import_embeddings(other, store, ImportOptions(slide, slide_id="A", **CLAM_OPTIONS))
    document = store / "A" / done.grid_key / "resnet50" / "embedding" / "zarr.json"
    document.write_text(document.read_text().replace('"fingerprint"', '"finger"'))
    with pytest.raises(DocumentError, match=r"attributes\.encoder.*fingerprint"):
        import_embeddings(file, store, ImportOptions(slide, slide_id="A", **CLAM_OPTIONS))
    assert remove(str(store), "A", done.grid_key, None) == [f"A/{done.grid_key}"]
    assert catalogue(str(store))["grid"].to_list() == [None]


@pytest.mark.parametrize("overlap", [28, 32, 56])
def test_trident_files_with_overlap_come_in_without_the_patches_off_their_grid(
    slide: Path, tmp_path: Path, overlap: int
) -> None:
    side = 112

    def starts(n: int) -> np.ndarray:
        k = np.arange(n)
        return k * side - overlap * np.maximum(k - 1, 0)  # TRIDENT's first step has no overlap

    corners = np.stack(np.meshgrid(starts(9), starts(7)), axis=-1).reshape(-1, 2)
    features = np.random.default_rng(2).standard_normal((len(corners), DIM)).astype(np.float32)
    attrs = {**TRIDENT, "patch_size": side, "patch_size_level0": side, "overlap": overlap}
    done = import_embeddings(
        _h5(tmp_path / "A.h5", features, corners, attrs), tmp_path / "store", ImportOptions(slide)
    )
    on = np.ones(len(corners), bool) if overlap == 56 else (corners > 0).all(axis=1)
    assert (done.patches, done.off_grid) == (on.sum(), (~on).sum())
    _check(tmp_path / "store", features[on], corners[on], side)


def test_clam_files_state_sides_at_the_level_that_was_cut(slide: Path, tmp_path: Path) -> None:
    attrs = {
        "patch_size": 57,
        "patch_level": 1,
        "downsample": np.array([2.0, 2.0]),
        "downsampled_level_dim": np.array([655, 554]),
        "level_dim": np.array([655, 554]),
        "name": "A",
        "save_path": "/x",
    }
    corners = CELLS[:, ::-1] * 114
    inside = (corners < SIZE).all(axis=1)
    file = _h5(tmp_path / "A.h5", FEATURES[inside], corners[inside], attrs, encoder=None)
    done = import_embeddings(file, tmp_path / "store", ImportOptions(slide, encoder="resnet50"))
    assert done.grid_key == "mpp1.0000_px57_stride57"
    _check(tmp_path / "store", FEATURES[inside], corners[inside], 114)


def test_stamp_files_are_in_microns(slide: Path, tmp_path: Path) -> None:
    corners_um = (CELLS[:, ::-1] * 64.0).astype(np.float32)
    attrs = {"extractor": "uni2", "unit": "um", "tile_size_um": 64.0, "tile_size_px": 97, "code_hash": "ab12"}
    file = _h5(
        tmp_path / "A.h5", FEATURES, corners_um, {}, encoder=None, names=("feats", "coords"), file_attrs=attrs
    )
    done = import_embeddings(file, tmp_path / "store", ImportOptions(slide))
    assert (done.slide_id, done.grid_key) == ("A", "mpp0.6598_px97_stride97")
    _check(tmp_path / "store", FEATURES, corners_um / MPP, 128)
    early = _h5(tmp_path / "B.h5", names=("feats", "coords"), attrs={}, encoder=None)
    with pytest.raises(StoreError, match="does not state that its coordinates are microns"):
        import_embeddings(early, tmp_path / "none", ImportOptions(slide, **CLAM_OPTIONS))


def test_mpp_that_is_nearly_the_levels_own_is_that_of_the_level(slide: Path, tmp_path: Path) -> None:
    file = _h5(tmp_path / "A.h5", attrs={}, encoder=None)
    options = ImportOptions(slide, **{**CLAM_OPTIONS, "mpp": 0.51})
    done = import_embeddings(file, tmp_path / "store", options)
    assert done.grid_key == f"mpp0.5100_px{PATCH}_stride{PATCH}"
    _check(tmp_path / "store", FEATURES, CORNERS)


def test_an_mpp_that_contradicts_the_file_is_refused(slide: Path, tmp_path: Path) -> None:
    with pytest.raises(MppError, match=r"have 0\.5 microns per pixel, and --mpp is 1;"):
        import_embeddings(_h5(tmp_path / "A.h5"), tmp_path / "store", ImportOptions(slide, mpp=1.0))


def test_steps_that_were_rounded_to_whole_pixels_are_still_whole_strides(slide: Path, tmp_path: Path) -> None:
    # 112 px at 1 um of a slide of 0.5053 um: 221.65 px on the slide, rounded to 222; steps of 56 px: 110.8 -> 111.
    corners = CELLS[:, ::-1] * 111
    attrs = {**TRIDENT, "patch_size": 112, "patch_size_level0": 222, "overlap": 56}
    done = import_embeddings(
        _h5(tmp_path / "A.h5", FEATURES, corners, attrs), tmp_path / "s", ImportOptions(slide)
    )
    assert done.grid_key.endswith("px112_stride56")


@pytest.mark.parametrize(
    "encoder", ["..", ".", "tissue", "rgb", "x", "y", "quality", "Tissue", "_a", "zarr.json", "e" * 300]
)
def test_an_encoder_cannot_take_the_name_of_something_else(slide: Path, tmp_path: Path, encoder: str) -> None:
    with pytest.raises(StoreError, match="cannot name a folder of a store"):
        import_embeddings(_h5(tmp_path / "A.h5"), tmp_path / "store", ImportOptions(slide, encoder=encoder))
    store = Store.open_or_create(tmp_path / "store")
    store.add_slide(SlideRecord("A", "", SIZE, MPP, "f"))
    grid = PatchGrid.for_slide(SIZE, MPP, (MPP,), GridSpec(MPP, PATCH, PATCH))
    with pytest.raises(StoreError, match="cannot name a folder of a store"):
        store.add_embedding("A", grid, EncoderIdentity(encoder, DIM))


def test_names_in_other_alphabets_stay_apart(slide: Path, tmp_path: Path) -> None:
    names = ["样本", "对照", "_failures", "n" * 300]
    for number, name in enumerate(names):
        file = _h5(tmp_path / f"{number}.h5", attrs={**TRIDENT, "name": name})
        import_embeddings(file, tmp_path / "store", ImportOptions(slide))
    reserved = _h5(tmp_path / "reserved.h5", attrs={**TRIDENT, "name": "zarr.json"})
    with pytest.raises(StoreError, match=r"slide id .zarr\.json."):
        import_embeddings(reserved, tmp_path / "store", ImportOptions(slide))
    ids = Store.open(tmp_path / "store").slide_ids()
    assert len(ids) == 4
    assert "failures" in ids


def test_a_killed_import_goes_on_with_the_same_command(slide: Path, tmp_path: Path) -> None:
    file = _h5(tmp_path / "A.h5")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    for owner, name in (
        (Store, "add_grid"),
        (Store, "add_embedding"),
        (Store, "consolidate"),
        (BlockArray, "write"),
    ):
        patch = pytest.MonkeyPatch()
        patch.setattr(owner, name, stop)
        with pytest.raises(KeyboardInterrupt):
            import_embeddings(file, tmp_path / "store", ImportOptions(slide))
        patch.undo()
    import_embeddings(file, tmp_path / "store", ImportOptions(slide))
    _check(tmp_path / "store", FEATURES, CORNERS)


@pytest.mark.parametrize(
    "options", [{"mpp": float("inf")}, {"mpp": 1e-320}, {"slide_mpp": -1.0}, {"patch_px": 0}, {"scale": 0.0}]
)
def test_options_that_cannot_be_meant_are_refused(tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises((StoreError, MppError), match="--"):
        import_embeddings(_h5(tmp_path / "A.h5"), tmp_path / "store", ImportOptions(**options))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "A.h5")
    with pytest.raises(StoreError, match="there is no file"):
        import_embeddings(tmp_path / "A.h5", tmp_path / "store", ImportOptions())


def test_the_step_is_that_of_most_neighbours() -> None:
    mixed = np.concatenate([CORNERS, CORNERS[:20] + np.array([31, 17])]).astype(float)
    assert find_step(mixed) == PATCH
    assert find_step(np.array([[0.0, 0.0], [31.0, 17.0]])) == 0
    rounded = np.rint(np.stack([np.arange(50) * 112.5, np.zeros(50)], axis=1))
    assert find_step(rounded) == pytest.approx(112.5, abs=0.02)


def test_a_lattice_keeps_the_slides_corner_as_origin_up_to_rounding() -> None:
    corners = np.rint(CELLS[:, ::-1] * 110.4)
    lattice = find_lattice(corners, 110.4)
    assert lattice.origin_px == (0, 0)
    assert lattice.is_on.all()
    np.testing.assert_array_equal(np.stack([lattice.rows, lattice.cols], axis=1), CELLS)
