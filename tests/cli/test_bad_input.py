"""What a user may get wrong: one clear line with the fix, and nothing written that looks whole."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pytest
from make_slides import tissue_like, write_pyramid
from PIL import Image

from featurestore.storage.catalogue import catalogue

Histosge = Callable[..., NamedTuple]
MPP = 2.0
GRID = ("--mpp", MPP, "--patch", 32, "--stride", 32, "--encoder", "colour")


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("slides")
    return write_pyramid(folder / "good.tif", tissue_like(700, 600, MPP), MPP)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def _one_line(text: str) -> str:
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


def _write_spots(path: Path, slide_px: tuple[int, int] = (700, 600), *, spatial: bool = True) -> Path:
    rng = np.random.default_rng(0)
    x, y = (axis.ravel() for axis in np.meshgrid(np.arange(200, 440, 30), np.arange(220, 440, 30)))
    data = anndata.AnnData(rng.poisson(40, (len(x), 20)).astype(np.float32))
    if spatial:
        data.obsm["spatial"] = np.stack([x, y], axis=1).astype(float)
    data.write_h5ad(path)
    return path


def _sheet(folder: Path, text: str) -> Path:
    path = folder / "sheet.csv"
    path.write_text(text)
    return path


def _assert_nothing_whole(store: Path) -> None:
    if store.exists():
        frame = catalogue(str(store))
        assert not frame.filter(frame["state"] == "done").height


def _text(folder: Path) -> Path:
    path = folder / "broken.svs"
    path.write_text("this is no slide\n" * 20)
    return path


def _absurd_mpp(folder: Path) -> Path:
    return write_pyramid(folder / "boxes.tif", tissue_like(300, 256, MPP), 352.8)


def _no_mpp(folder: Path) -> Path:
    path = folder / "photo.jpg"
    Image.fromarray(tissue_like(300, 256, MPP)).save(path)
    return path


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_text, "cannot be opened"),
        (_absurd_mpp, "claims 352.8 microns per pixel, outside 0.05..20.0; give it with --slide-mpp"),
        (_no_mpp, "does not say its microns per pixel; give it with --slide-mpp"),
    ],
)
def test_a_slide_that_cannot_be_used_is_failed_with_its_reason_and_the_others_go_on(
    histosge: Histosge, tmp_path: Path, store: Path, slide: Path, make: Callable[[Path], Path], reason: str
) -> None:
    bad = make(tmp_path)
    sheet = _sheet(tmp_path, f"slide_id,slide\nbad,{bad}\ngood,{slide}\n")
    code, out, _ = histosge("embed", sheet, store, *GRID)
    assert code == 1
    assert "bad: failed: " in out
    assert reason in out
    states = {row["slide"]: (row["state"], row["reason"]) for row in catalogue(str(store)).to_dicts()}
    assert states["good"][0] == "done"
    assert states["bad"][0] == "failed"
    assert reason in states["bad"][1]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("slides/broken.svs", "cannot be opened"),
        ("slides/openslide_unopenable.tiff", "outside 0.05..20.0"),
        ("slides/openslide_boxes.tiff", "claims 352.8 microns per pixel"),
        ("mob/MOB1.jpg", "does not say its microns per pixel"),
    ],
)
def test_public_slides_that_cannot_be_used_are_failed_with_their_reason(
    histosge: Histosge, data_dir: Path, store: Path, name: str, reason: str
) -> None:
    code, out, _ = histosge("embed", data_dir / name, store)
    assert code == 1
    assert reason in out.splitlines()[0]
    _assert_nothing_whole(store)


@pytest.mark.data
def test_what_cannot_be_opened_is_failed_also_when_its_scale_is_given(
    histosge: Histosge, data_dir: Path, store: Path
) -> None:
    path = data_dir / "slides" / "openslide_unopenable.tiff"
    code, out, _ = histosge("embed", path, store, "--slide-mpp", 0.5)
    assert (code, "failed: " in out) == (1, True)
    _assert_nothing_whole(store)


def test_patches_finer_than_the_slide_are_refused(histosge: Histosge, slide: Path, store: Path) -> None:
    for more in ([], ["--dry-run"]):
        code, out, _ = histosge("embed", slide, store, "--mpp", 0.5, *more)
        assert code == 1
        assert "has 2 microns per pixel at best, which is coarser than --mpp 0.5; give --mpp 2 or more" in out
    _assert_nothing_whole(store)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,expresion\n{slide},\n", "did you mean 'expression'"),
        ("slide\nmissing.tif\n", "line 2: slide 'missing.tif' does not exist"),
        ("slide_id,slide\nA,{slide}\nA,{slide}\n", "'A' twice"),
    ],
)
def test_a_sheet_with_a_mistake_is_refused_before_anything_is_written(
    histosge: Histosge, tmp_path: Path, store: Path, slide: Path, text: str, message: str
) -> None:
    code, out, err = histosge("embed", _sheet(tmp_path, text.format(slide=slide)), store, *GRID)
    assert (code, out) == (2, "")
    assert message in _one_line(err)
    assert not store.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--encoder", "uni9"), "unknown encoder 'uni9': did you mean uni"),
        (("--stride", 0), "--stride"),
        (("--encoder", "timm:no_such_net"), "no model 'no_such_net'"),
        (("--device", "tpu"), "unknown device 'tpu': use one of auto, cpu, cuda"),
        (("--weights", "w.pt"), "leave --weights out"),
    ],
)
def test_options_that_cannot_work_are_refused(
    histosge: Histosge, slide: Path, store: Path, options: tuple[object, ...], message: str
) -> None:
    code, out, err = histosge("embed", slide, store, *options)
    assert (code, out) == (2, "")
    assert message in _one_line(err)
    assert not store.exists()


def test_a_path_that_holds_something_else_is_left_alone(
    histosge: Histosge, slide: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("miaow")
    (tmp_path / "file").write_text("text")
    for name in ("photos", "file"):
        code, _, err = histosge("embed", slide, tmp_path / name, *GRID)
        assert code == 2
        assert _one_line(err).startswith("error: ")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.txt"]
    assert (tmp_path / "file").read_text() == "text"


def test_another_grid_under_one_key_or_another_file_under_one_name_is_refused(
    histosge: Histosge, slide: Path, store: Path, tmp_path: Path
) -> None:
    assert histosge("embed", slide, store, *GRID).code == 0
    before = catalogue(str(store))
    for option in (("--no-tissue",), ("--tissue", "none")):
        code, _, err = histosge("embed", slide, store, *GRID, *option)
        assert code == 2
        line = _one_line(err)
        assert "is stored with tissue by 'texture', now it is 'none'; go on with --tissue texture" in line
        assert "or clear it with: histosge rm" in line
    other = write_pyramid(tmp_path / "good.tif", tissue_like(700, 600, MPP, seed=5), MPP)
    code, _, err = histosge("embed", other, store, *GRID)
    assert code == 2
    assert "clear it with: histosge rm" in _one_line(err)
    assert catalogue(str(store)).equals(before)


def test_expression_that_cannot_be_used_is_refused(
    histosge: Histosge, slide: Path, store: Path, tmp_path: Path
) -> None:
    spots = _write_spots(tmp_path / "spots.h5ad", spatial=False)
    sheet = _sheet(tmp_path, f"slide,expression\n{slide},{spots}\n")
    assert histosge("embed", sheet, store, *GRID).code == 0
    code, _, err = histosge("train", sheet, store, tmp_path / "model")
    assert code == 2
    assert 'no obsm["spatial"]' in _one_line(err)
    assert not (tmp_path / "model").exists()


def test_spots_of_another_scale_are_refused(
    histosge: Histosge, slide: Path, store: Path, tmp_path: Path
) -> None:
    spots = _write_spots(tmp_path / "spots.h5ad")
    data = anndata.read_h5ad(spots)
    data.obsm["spatial"] = data.obsm["spatial"] * 9
    data.write_h5ad(spots)
    sheet = _sheet(tmp_path, f"slide,expression\n{slide},{spots}\n")
    assert histosge("embed", sheet, store, *GRID).code == 0
    code, _, err = histosge("train", sheet, store, tmp_path / "model", "--preset", "ridge", "--quiet")
    assert code == 2
    assert "good" in _one_line(err)
    assert not (tmp_path / "model").exists()


def test_a_model_of_another_encoder_is_refused(
    histosge: Histosge, slide: Path, store: Path, tmp_path: Path
) -> None:
    spots = _write_spots(tmp_path / "spots.h5ad")
    sheet = _sheet(tmp_path, f"slide,expression\n{slide},{spots}\n")
    assert histosge("embed", sheet, store, *GRID).code == 0
    code, _, err = histosge("train", sheet, store, tmp_path / "model", "--preset", "ridge", "--device", "tpu")
    assert code == 2
    assert "unknown device 'tpu': use one of auto, cpu, cuda" in _one_line(err)
    assert not (tmp_path / "model").exists()
    on_cpu = ("--preset", "ridge", "--device", "cpu")
    assert histosge("train", sheet, store, tmp_path / "model", *on_cpu).code == 0
    other = tmp_path / "other"
    assert histosge("embed", slide, other, *GRID[:-1], "morphology").code == 0
    code, _, err = histosge("predict", other, tmp_path / "model", tmp_path / "maps")
    assert code == 2
    line = _one_line(err)
    assert "colour" in line
    assert "morphology" in line
    assert not (tmp_path / "maps").exists()


def test_commands_on_what_is_not_there_say_how_to_make_it(
    histosge: Histosge, store: Path, tmp_path: Path
) -> None:
    for command in (("ls", store), ("validate", store), ("predict", store, tmp_path / "m", tmp_path / "p")):
        code, out, err = histosge(*command)
        assert (code, out) == (2, "")
        assert "make one with: histosge " in _one_line(err)


FULL_DISK = """
set -e
mkdir -p "$1" && mount -t tmpfs -o size=120k tmpfs "$1"
set +e
"$2" -m histosge_cli embed "$3" "$1/store" --mpp 2 --patch 32 --stride 8 --encoder colour; echo "code $?"
"$2" -m histosge_cli ls "$1/store"; echo "ls $?"
find "$1" -name '*partial*' | wc -l
mount -o remount,size=50m "$1"
"$2" -m histosge_cli embed "$3" "$1/store" --mpp 2 --patch 32 --stride 8 --encoder colour; echo "again $?"
"$2" -m histosge_cli validate "$1/store" --deep; echo "whole $?"
"""


def _may_mount() -> bool:
    tried = subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True)
    return tried.returncode == 0


@pytest.mark.e2e
@pytest.mark.skipif(not _may_mount(), reason="this user may not mount a small disk to fill")
def test_a_full_disk_is_said_in_one_line_and_the_run_goes_on_once_there_is_room(
    slide: Path, tmp_path: Path
) -> None:
    command = ["unshare", "-rm", "bash", "-c", FULL_DISK, "bash", tmp_path / "disk", sys.executable, slide]
    ran = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300)
    assert "code 2" in ran.stdout, ran
    assert "error: cannot write" in ran.stderr
    assert "No space left on device" in ran.stderr
    assert "Traceback" not in ran.stderr
    assert "again 0" in ran.stdout
    assert "whole 0" in ran.stdout
    (listed,) = [line for line in ran.stdout.splitlines() if line.startswith("good ")]
    assert "partial" in listed or "failed" in listed or "planned" in listed
