"""Extension points with packages as pip leaves them: a module and its entry points in a folder on the path."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from install_package import install

from featurestore import extensions
from featurestore.slides.slide_reader import READERS
from featurestore.storage.store import Store
from featurestore.tissue.tissue_method import TISSUE_METHODS

OURS = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    name: str
    help: str
    corners: int
"""
THEIRS = """
import pathlib

from ours import Shape

pathlib.Path(__file__).with_name("imported").touch()

RECORD = Shape("square", "four equal sides", 4)
OVAL = Shape("oval", "no corners", 0)
CLASH = Shape("triangle", "another one", 33)
NUMBER = 7
"""
ALL = """
square = theirs:RECORD
"""
SETUP = """
import json, sys, warnings
from pathlib import Path

from featurestore.errors import EncoderError
from featurestore.extensions import Registry
from ours import Shape

SHAPES = Registry("shapes", "ours.shapes", Shape, EncoderError)
IMPORTED = Path("imported")
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with our small kind of extension, whose own record is ``triangle``, and another package's module."""
    shapes = tmp_path / "ours" / "shapes"
    shapes.mkdir(parents=True)
    (tmp_path / "ours" / "__init__.py").write_text(OURS)
    (shapes / "__init__.py").touch()
    (shapes / "triangle.py").write_text(
        "from ours import Shape\nRECORD = Shape('triangle', 'three sides', 3)\n"
    )
    (shapes / "arithmetic.py").write_text("CORNERS = 3\n")
    (tmp_path / "theirs.py").write_text(THEIRS)
    (tmp_path / "broken.py").write_text("raise RuntimeError('first line\\nsecond line')\n")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(3)\n")
    return tmp_path


def run(site: Path, code: str, *options: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=site,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )


def found(site: Path, expression: str) -> Any:
    """Evaluate an expression where the packages are installed; the warnings come with it, as lines."""
    code = (
        f"{SETUP}\nwith warnings.catch_warnings(record=True) as caught:\n    warnings.simplefilter('always')\n"
        f"    value = {expression}\nprint(json.dumps([value, [str(w.message) for w in caught]]))"
    )
    done = run(site, code)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_record_of_another_package_is_found_and_used(site: Path) -> None:
    install(site, "shape-pack", "[histosge.shapes]\nsquare = theirs:RECORD\noval = theirs:OVAL\n")
    assert found(site, "[SHAPES.get('square').corners, SHAPES.get('triangle').corners]") == [[4, 3], []]
    assert found(site, "[r.name for r in SHAPES.records()]") == [["triangle", "oval", "square"], []]


def test_names_import_nothing_of_the_other_package(site: Path) -> None:
    install(site, "shape-pack", "[histosge.shapes]\nsquare = theirs:RECORD\n")
    seen, lines = found(site, "[SHAPES.names(), SHAPES.suggest('squair'), IMPORTED.exists()]")
    assert seen == [["triangle", "square"], "did you mean square?", False]
    assert lines == []
    assert found(site, "[len(SHAPES.records()), IMPORTED.exists()]") == [[2, True], []]


@pytest.mark.parametrize(
    ("points", "reason"),
    [
        ("hexagon = broken:RECORD", "RuntimeError: first line second line"),
        ("hexagon = quits:RECORD", "SystemExit: 3"),
        ("hexagon = no_such_module:RECORD", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("hexagon = theirs:NOTHING", "AttributeError: module 'theirs' has no attribute 'NOTHING'"),
        ("hexagon = theirs:NUMBER", "it is a int, not a Shape"),
        ("hexagon = theirs:OVAL", "its record is named 'oval'"),
    ],
    ids=["import fails", "import exits", "no module", "no attribute", "wrong type", "wrong name"],
)
def test_one_that_cannot_be_used_is_one_line_and_the_others_work(
    site: Path, points: str, reason: str
) -> None:
    install(site, "shape-pack", f"[histosge.shapes]\nsquare = theirs:RECORD\n{points}\n")
    names, lines = found(site, "[[r.name for r in SHAPES.records()] for _ in range(3)]")
    assert names == [["triangle", "square"]] * 3
    (line,) = lines
    assert line.startswith("histosge.shapes 'hexagon' of shape-pack (")
    assert line.endswith(f") is left out: {reason}")
    assert "\n" not in line


def test_an_unusable_one_that_is_named_is_an_error_with_its_reason(site: Path) -> None:
    install(site, "shape-pack", "[histosge.shapes]\nhexagon = broken:RECORD\n")
    for _ in range(2):
        done = run(site, f"{SETUP}\nSHAPES.get('hexagon')")
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(
            "featurestore.errors.EncoderError: shapes: 'hexagon' (broken:RECORD) cannot be"
        )
        assert last.endswith("RuntimeError: first line second line; correct or remove the package shape-pack")
        assert "ExtensionWarning" not in done.stderr


def test_a_name_that_we_have_stays_ours(site: Path) -> None:
    install(site, "shape-pack", "[histosge.shapes]\ntriangle = theirs:CLASH\nsquare = theirs:RECORD\n")
    corners, lines = found(site, "{r.name: r.corners for r in SHAPES.records()}")
    assert corners == {"triangle": 3, "square": 4}
    (line,) = lines
    assert line.startswith("histosge.shapes 'triangle' of shape-pack (theirs:CLASH) is left out: ")
    assert line.endswith("we have one of that name, which is used")


def test_one_name_of_two_packages_is_one_of_them_always_the_same(site: Path) -> None:
    (site / "another.py").write_text("from ours import Shape\nRECORD = Shape('square', 'a second one', 44)\n")
    install(site, "shape-pack", "[histosge.shapes]\nsquare = theirs:RECORD\n")
    install(site, "zoo", "[histosge.shapes]\nsquare = another:RECORD\n")
    corners, (line,) = found(site, "[SHAPES.get('square').corners, SHAPES.get('square').corners]")
    assert corners == [44, 44]
    assert "'square' of shape-pack (theirs:RECORD) is left out: zoo has one of that name" in line


def test_a_package_that_is_installed_meanwhile_is_found_after_a_refresh(site: Path) -> None:
    code = f"""{SETUP}
before = SHAPES.names()
info = Path("shape_pack-1.0.dist-info")
info.mkdir()
(info / "METADATA").write_text("Metadata-Version: 2.1\\nName: shape-pack\\nVersion: 1.0\\n")
(info / "entry_points.txt").write_text("[histosge.shapes]\\nsquare = theirs:RECORD\\n")
import importlib
importlib.invalidate_caches()
same = SHAPES.names()
SHAPES.refresh()
print(json.dumps([before, same, SHAPES.names()]))"""
    assert json.loads(run(site, code).stdout) == [["triangle"], ["triangle"], ["triangle", "square"]]


def test_registries_share_one_look_at_the_installed_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = []
    monkeypatch.setattr(extensions, "entry_points", lambda: looks.append(1) or entry_points())
    extensions._points_on.cache_clear()
    for registry in (READERS, TISSUE_METHODS, READERS):
        registry.refresh()
        assert "theirs" not in registry.offered
    assert len(looks) == 1


def test_an_unknown_name_gets_the_nearest_names_or_all_of_them(site: Path) -> None:
    for name, hint in (("triangel", "did you mean triangle?"), ("xyz", "choose one of triangle")):
        done = run(site, f"{SETUP}\nSHAPES.get({name!r})")
        assert done.stderr.strip().endswith(f"EncoderError: unknown name {name!r} among shapes: {hint}")


KINDS = (
    "encoders",
    "slide_readers",
    "tissue_methods",
    "models",
    "expression_layouts",
    "exports",
    "export_formats",
    "metrics",
)


@pytest.mark.parametrize(
    "code",
    [
        "import featurestore, histosge, histosge_cli.main",
        "import sys; from histosge_cli.main import main; sys.argv = ['histosge', '--help']; main()",
    ],
    ids=["import", "--help"],
)
def test_help_and_plain_imports_load_no_module_of_other_packages(site: Path, code: str) -> None:
    install(site, "shape-pack", "".join(f"[histosge.{kind}]\nsquare = theirs:RECORD\n" for kind in KINDS))
    done = run(site, code)
    assert done.returncode == 0, done.stderr
    assert not (site / "imported").exists()
    assert done.stderr == ""


DARK = """
from featurestore.tissue.tissue_method import TissueMethod

RECORD = TissueMethod("dark", "whatever is dark", lambda overview: overview.rgb.mean(2) < 99)
"""


def test_help_of_a_command_shows_other_packages_records_of_its_own_kinds_and_loads_no_others(
    site: Path,
) -> None:
    (site / "dark_tissue.py").write_text(DARK)
    others = "".join(
        f"[histosge.{kind}]\nsquare = theirs:RECORD\n" for kind in KINDS if kind != "tissue_methods"
    )
    install(site, "dark-pack", f"{others}[histosge.tissue_methods]\ndark = dark_tissue:RECORD\n")
    done = run(
        site,
        "import sys; from histosge_cli.main import main; sys.argv = ['histosge', 'embed', '--help']; main()",
    )
    assert done.returncode == 0, done.stderr
    # Without the frame, and wherever a line ends.
    assert "dark: whatever is dark" in re.sub(r"[\s│]+", " ", done.stdout)
    assert not (site / "imported").exists()


PLUGIN = """
import numpy as np

from featurestore.encoders.protocol import EncoderExtension, EncoderIdentity
from featurestore.slides.pyramid_slide import PyramidSlide, check_mpp
from featurestore.slides.slide_reader import SlideReader
from featurestore.tissue.tissue_method import TissueMethod


class Brightness:
    identity = EncoderIdentity("brightness", 1, {"algorithm": "mean byte", "version": 1})

    def encode(self, patches):
        return patches.reshape(len(patches), -1).mean(1, dtype=np.float32)[:, None]


class ArraySlide(PyramidSlide):
    def __init__(self, path, mpp):
        self.array = np.load(path)
        super().__init__(path, (self.array.shape[1::-1],), check_mpp(mpp or 2.0, path))

    def read_level(self, level, x, y, width, height):
        return self.array[y : y + height, x : x + width]

    def close(self):
        pass


ENCODER = EncoderExtension("brightness", "mean byte", 1, lambda key, options: Brightness())
READER = SlideReader("arrays", "numpy arrays", (".xyz",), ArraySlide)
TISSUE = TissueMethod("dark", "below 128", lambda overview: overview.rgb.mean(2) < 128)
"""
PLUGIN_POINTS = """[histosge.encoders]
brightness = plugin:ENCODER
[histosge.slide_readers]
arrays = plugin:READER
useless = no_such_module:READER
[histosge.tissue_methods]
dark = plugin:TISSUE
"""


def test_the_command_line_uses_one_of_each_kind_and_warns_of_a_broken_one_in_one_line(site: Path) -> None:
    install(site, "plugin", PLUGIN_POINTS, plugin=PLUGIN)
    (site / "slides").mkdir()
    pixels = np.full((96, 160, 3), 201, np.uint8)
    pixels[:, :64] = 17
    with (site / "slides" / "A.xyz").open("wb") as file:
        np.save(file, pixels)
    arguments = ["embed", "slides", "store", "--mpp", "2", "--patch", "32", "--encoder", "brightness"]
    arguments += ["--tissue", "dark", "--device", "cpu", "--quiet"]
    code = f"import sys; from histosge_cli.main import main; sys.argv = ['histosge', *{arguments}]; main()"
    done = run(site, code)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 blocks computed, 6 patches" in done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        "warning: histosge.slide_readers 'useless' of plugin (no_such_module:READER) is left"
    )
    store = Store.open(str(site / "store"))
    key = "mpp2.0000_px32_stride32"
    assert store.grid_attrs("A", key)["tissue"] == {"name": "dark", "version": 1, "overview_mpp": 8.0}
    values = store.embedding("A", key, "brightness").read((0, 3), (0, 5))[..., 0]
    np.testing.assert_array_equal(values[:, :2], 17)
    assert np.isnan(values[:, 2:]).all()


def test_the_doctor_tells_which_extensions_work(site: Path) -> None:
    install(site, "plugin", PLUGIN_POINTS, plugin=PLUGIN)
    done = run(site, "from histosge_cli.doctor import other_packages; print(*other_packages(), sep='\\n')")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "encoder brightness: offered by plugin:ENCODER: mean byte" in lines
    assert "slide reader arrays: offered by plugin:READER: numpy arrays" in lines
    assert "tissue dark: offered by plugin:TISSUE: below 128" in lines
    assert any(line.startswith("slide reader useless: cannot be used: ") for line in lines)
