"""Quality flags in a run: written once, the same after a kill, and `skip` leaves patches out and changes no other."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid
from scipy import ndimage

from featurestore import EmbedSettings, GridSpec, catalogue, embed, validate
from featurestore.errors import IdentityMismatchError, SlideWarning
from featurestore.events import Progress
from featurestore.preview.planned_preview import PlannedPreview
from featurestore.preview.store_preview import write_preview
from featurestore.storage.store import Store, StoredGrid
from featurestore.tissue.flags import Flag, has_any

MPP = 1.0
SPEC = GridSpec(MPP, 64, 64)
SETTINGS = EmbedSettings(("colour",), SPEC, block_shape=(3, 4))


def _spoiled(path: Path) -> Path:
    """A slide whose tissue has a blue stroke of a pen on the left, and is out of focus on the right."""
    image = tissue_like(1100, 900, MPP).astype(float)
    image[:, 330:430] *= np.exp(-np.array([1.9, 1.1, 0.25]))
    soft = ndimage.gaussian_filter(image, (4, 4, 0)) + np.random.default_rng(3).normal(0, 1, image.shape)
    image[:, 620:] = soft[:, 620:]
    return write_pyramid(path, np.clip(image, 0, 255).astype(np.uint8), MPP)


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _spoiled(tmp_path_factory.mktemp("slide") / "a.tif")


@pytest.fixture(scope="module")
def plain(slide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of an undisturbed run without `skip`; only for reading."""
    store = tmp_path_factory.mktemp("plain") / "store"
    embed(slide, store, SETTINGS)
    return store


def _files(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def _grid(store: Path) -> tuple[StoredGrid, np.ndarray]:
    opened = Store.open(store)
    stored = opened.grid("a", SPEC.key)
    quality = opened.quality("a", SPEC.key, stored.grid.shape)
    assert quality is not None
    return stored, quality


def _vectors(store: Path) -> np.ndarray:
    opened = Store.open(store)
    stored = opened.grid("a", SPEC.key)
    array = opened.embedding("a", SPEC.key, "colour")
    whole = np.full((*stored.grid.shape, opened.identity("a", SPEC.key, "colour").dim), np.nan, np.float16)
    for block in stored.planned(array.block_shape):
        whole[block.slices] = array.read_block(block)
    return whole


def test_flags_lie_where_the_slide_is_bad_and_all_tissue_is_measured(plain: Path) -> None:
    stored, quality = _grid(plain)
    tissue, left = stored.is_tissue, np.arange(stored.grid.n_cols) * 64
    pen, blur = has_any(quality, Flag.PEN), has_any(quality, Flag.BLUR)
    assert pen[:, left == 320].all()
    assert not pen[:, (left <= 256) | (left >= 448)].any()
    assert blur[:, left >= 640][tissue[:, left >= 640]].mean() > 0.8
    assert not blur[:, left <= 512].any()
    assert np.array_equal(has_any(quality, Flag.FOCUS_KNOWN), tissue)
    assert not has_any(quality, Flag.FOLD | Flag.BUBBLE | Flag.EDGE | Flag.SKIPPED).any()
    assert np.isfinite(_vectors(plain)[tissue]).all(), "flags alone leave nothing out"
    assert validate(plain, deep=True) == []


def test_a_clean_slide_has_no_flag(tmp_path: Path) -> None:
    path = write_pyramid(tmp_path / "a.tif", tissue_like(1100, 900, MPP), MPP)
    embed(path, tmp_path / "store", SETTINGS)
    stored, quality = _grid(tmp_path / "store")
    assert np.array_equal(quality, np.where(stored.is_tissue, int(Flag.FOCUS_KNOWN), 0))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    ("stop_after", "workers"), [(1, None), (4, None), pytest.param(2, 2, marks=pytest.mark.e2e)]
)
def test_a_run_that_was_stopped_goes_on_to_equal_bytes(
    slide: Path, plain: Path, tmp_path: Path, stop_after: int, workers: int | None
) -> None:
    store = tmp_path / "store"

    def stop(progress: Progress) -> None:
        if progress.done == stop_after:
            raise StoppedError

    with pytest.raises(StoppedError):
        embed(slide, store, SETTINGS, on_progress=stop)
    done = len(list(store.rglob("embedding/c/*/*/0")))
    assert stop_after <= done < len(list(plain.rglob("embedding/c/*/*/0")))
    assert not has_any(_grid(store)[1], Flag.FOCUS_KNOWN).any(), "focus is written once, at the slide's end"
    embed(slide, store, SETTINGS, workers=workers)
    assert _files(store) == _files(plain)
    assert embed(slide, store, SETTINGS)[0].computed == 0
    assert _files(store) == _files(plain)


def test_a_run_that_was_stopped_before_it_wrote_flags_alone_goes_on_to_equal_bytes(
    slide: Path, plain: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    total = len(list(plain.rglob("embedding/c/*/*/0")))

    def stop(progress: Progress) -> None:
        if progress.done == total:
            raise StoppedError

    with pytest.raises(StoppedError):
        embed(slide, store, SETTINGS, on_progress=stop)
    assert embed(slide, store, SETTINGS)[0].computed == 0
    assert _files(store) == _files(plain)


def test_two_runs_at_once_lose_no_flag(slide: Path, plain: Path, tmp_path: Path) -> None:
    """The second one is planned when the first has written some blocks and no flags, and ends before it."""
    store = tmp_path / "store"

    def run_another(progress: Progress) -> None:
        if progress.done == 2:
            embed(slide, store, SETTINGS)

    embed(slide, store, SETTINGS, on_progress=run_another)
    assert _files(store) == _files(plain)


def test_another_encoder_on_the_same_grid_leaves_the_flags_alone(
    slide: Path, plain: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    embed(slide, store, SETTINGS)
    written = store / "a" / SPEC.key / "quality" / "c" / "0" / "0"
    before = written.stat().st_mtime_ns
    embed(slide, store, replace(SETTINGS, encoders=("colour", "morphology")))
    assert written.stat().st_mtime_ns == before
    assert (
        _files(store).items()
        >= {name: data for name, data in _files(plain).items() if not name.endswith("zarr.json")}.items()
    )


@pytest.mark.parametrize(
    ("skip", "workers"),
    [
        (("pen",), None),
        (("blur",), None),
        (("pen", "blur", "fold"), None),
        pytest.param(("pen", "blur"), 2, marks=pytest.mark.e2e),
    ],
)
def test_skip_leaves_flagged_patches_out_and_encodes_the_others_alike(
    slide: Path, plain: Path, tmp_path: Path, skip: tuple[str, ...], workers: int | None
) -> None:
    store = tmp_path / "store"
    (result,) = embed(slide, store, replace(SETTINGS, skip=skip), workers=workers)
    everything, flags = _grid(plain)
    stored, quality = _grid(store)
    bits = sum(int(Flag[name.upper()]) for name in skip)
    left_out = everything.is_tissue & has_any(flags, bits)
    assert 0 < left_out.sum() < everything.is_tissue.sum()
    assert (result.skipped, result.patches, result.unreadable) == (
        left_out.sum(),
        (everything.is_tissue & ~left_out).sum(),
        0,
    )
    assert np.array_equal(has_any(quality, Flag.SKIPPED), left_out)
    assert np.array_equal(stored.tissue, np.where(left_out, 0, everything.tissue))
    expected = np.where(left_out[..., None], np.nan, _vectors(plain))
    np.testing.assert_array_equal(_vectors(store), expected)
    assert json.loads((store / "a" / SPEC.key / "zarr.json").read_text())["attributes"]["skip"] == list(skip)
    (row,) = catalogue(store).to_dicts()
    assert (row["state"], row["unreadable"], row["patches"]) == ("done", 0, result.patches)
    assert f"skipped {left_out.sum() / everything.is_tissue.sum():.0%}" in row["flags"]
    assert validate(store, deep=True) == []
    before = _files(store)
    again = embed(slide, store, replace(SETTINGS, skip=tuple(reversed(skip))))
    assert [(each.computed, each.skipped) for each in again] == [(0, result.skipped)]
    assert _files(store) == before


@pytest.mark.parametrize(("earlier", "now"), [((), ("pen",)), (("pen",), ()), (("pen",), ("pen", "fold"))])
def test_another_skip_on_the_same_grid_is_refused_with_both(
    slide: Path, tmp_path: Path, earlier: tuple[str, ...], now: tuple[str, ...]
) -> None:
    store = tmp_path / "store"
    embed(slide, store, replace(SETTINGS, skip=earlier))
    before = _files(store)
    said = {skip: f"--skip {','.join(skip)}" if skip else "no --skip" for skip in (earlier, now)}
    message = (
        f"is stored with {said[earlier]}, now it is {said[now]}; go on with {said[earlier]}, or clear it"
    )
    with pytest.raises(IdentityMismatchError, match=message):
        embed(slide, store, replace(SETTINGS, skip=now))
    after = {name: data for name, data in _files(store).items() if not name.startswith("_failures")}
    assert after == before


def test_a_slide_that_is_all_pen_is_done_without_a_patch_or_with_a_warning(tmp_path: Path) -> None:
    image = tissue_like(700, 600, MPP).astype(float) * np.exp(-np.array([1.9, 1.1, 0.25]))
    path = write_pyramid(tmp_path / "a.tif", np.clip(image, 0, 255).astype(np.uint8), MPP)
    everything = replace(SETTINGS, tissue="none")
    with pytest.warns(
        SlideWarning, match=r"100% of the tissue patches of .*a\.tif have marks of a pen; --skip pen"
    ):
        embed(path, tmp_path / "kept", everything)
    (result,) = embed(path, tmp_path / "store", replace(everything, skip=("pen",)))
    assert (result.state, result.patches, result.planned) == ("done", 0, 0)
    assert result.skipped == 10 * 9
    assert validate(tmp_path / "store", deep=True) == []


def test_a_store_without_flags_stays_without(slide: Path, plain: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    embed(slide, store, SETTINGS)
    folder = store / "a" / SPEC.key
    for file in sorted((folder / "quality").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (folder / "quality").rmdir()
    Store.open(store).consolidate("a")
    next(iter(folder.rglob("embedding/c/*/*/0"))).unlink()
    (result,) = embed(slide, store, SETTINGS)
    assert result.computed == 1
    assert not (folder / "quality").exists()
    assert catalogue(store)["flags"].to_list() == [None]
    assert validate(store, deep=True) == []
    write_preview(store, tmp_path / "page")


def _set_document(store: Path, **changes: object) -> None:
    path = store / "a" / SPEC.key / "quality" / "zarr.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("kind", ["dtype", "shape", "bytes", "skipped", "missing"])
def test_damaged_flags_are_named_and_end_no_command(slide: Path, tmp_path: Path, kind: str) -> None:
    store = tmp_path / "store"
    embed(slide, store, replace(SETTINGS, skip=("pen",) if kind == "missing" else ()))
    folder = store / "a" / SPEC.key / "quality"
    _, quality = _grid(store)
    if kind == "dtype":
        _set_document(store, data_type="uint16")
        (folder / "c" / "0" / "0").unlink()  # its bytes alone would be refused as too few
    elif kind == "shape":
        _set_document(store, shape=[3, 5])
    elif kind == "bytes":
        chunk = folder / "c" / "0" / "0"
        chunk.write_bytes(chunk.read_bytes()[:-2] + b"!!")
    elif kind == "skipped":
        Store.open(store).write_quality("a", SPEC.key, quality | np.uint8(Flag.SKIPPED))
    else:
        (folder / "zarr.json").unlink()
    problems = validate(store)
    assert problems
    assert all("quality" in problem.path and "\n" not in problem.what for problem in problems)
    catalogue(store)


def test_a_dry_run_and_the_pages_tell_the_shares(slide: Path, plain: Path, tmp_path: Path) -> None:
    settings = replace(SETTINGS, skip=("blur",))
    page = PlannedPreview.open(tmp_path / "planned", tmp_path / "none", ("colour",))
    (result,) = embed(slide, tmp_path / "none", settings, dry_run=True, on_survey=page.add_survey)
    assert set(result.flags) == {"pen", "blur", "skipped"}
    assert result.flags["blur"] == result.flags["skipped"] > 0.1
    page.finish([result])
    assert '"skipped"' in _page_text(tmp_path / "planned")
    write_preview(plain, tmp_path / "page")
    assert '"blur"' in _page_text(tmp_path / "page")
    assert "blur" in catalogue(plain)["flags"][0]


def _page_text(folder: Path) -> str:
    return "".join(path.read_text() for path in folder.rglob("*.js*") if path.name != "preview.js")
