"""The notebooks are kept with the outputs of a run, and run again to the same."""

import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[2] / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
NUMBER = r"-?\d+(?:\.\d+)?(?:e-?\d+)?"


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def kinds(cell: Any) -> list[str]:
    """Return what a cell put out, without standard error: ``text`` or a media type, in order."""
    shown = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            shown += ["text"] if output["name"] == "stdout" else []
        else:
            shown.append("image/png" if "image/png" in output["data"] else "text/plain")
    return shown


def texts(cell: Any, kind: str) -> Iterator[str]:
    for output in cell["outputs"]:
        if output.get("name") == "stderr" or "image/png" in output.get("data", {}):
            continue  # beside a picture stands how its library describes it
        text = output.get("text", "")
        yield "".join(text) + "".join(output.get("data", {}).get(kind, ""))


def words_and_numbers(cell: Any) -> tuple[list[str], list[float]]:
    """Take a cell's text apart; the frames of tables, which differ by version, are left out."""
    text = " ".join(texts(cell, "text/plain"))
    return re.findall(r"[^\W\d]+", re.sub(NUMBER, " ", text)), [float(n) for n in re.findall(NUMBER, text)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept_and_name_no_machine(path: Path) -> None:
    cells = code_cells(json.loads(path.read_text()))
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    shown = [kind for cell in cells for kind in kinds(cell)]
    assert len(shown) >= 5
    assert "image/png" in shown
    plain, html = (
        "\n".join(text for cell in cells for text in texts(cell, f"text/{k}")) for k in ("plain", "html")
    )
    # Folders at the root of a file system, letters of a drive.
    assert not re.search(r"(?<![\w.:/<])/(home|root|tmp|work|usr|var|mnt|opt|Users|private)\b", plain + html)
    assert not re.search(r"\b[A-Z]:\\|file://", plain + html)
    # Durations and dates.
    assert not re.search(r"\d ?(s|ms|seconds?|minutes?)\b|\b20\d\d-\d\d-\d\d\b", plain)
    assert all(output.get("name") != "stderr" for cell in cells for output in cell["outputs"])
    # A few small pictures.
    assert path.stat().st_size < 250_000


@pytest.fixture(scope="module")
def runner() -> ModuleType:
    pytest.importorskip("nbclient", reason="the extra dev has it")
    spec = importlib.util.spec_from_file_location("notebook_outputs", DOCS / "notebook_outputs.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.e2e
@pytest.mark.filterwarnings("default")  # of the notebook machinery, not ours
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_runs_to_the_outputs_that_are_kept(path: Path, tmp_path: Path, runner: ModuleType) -> None:
    ran = runner.run(path, tmp_path)
    for kept, now in zip(code_cells(json.loads(path.read_text())), code_cells(ran), strict=True):
        assert kinds(kept) == kinds(now), "run docs/notebook_outputs.py"
        # How a library describes its own objects is of its version.
        if "output-varies" not in kept["metadata"].get("tags", []):
            (words, numbers), (words_now, numbers_now) = words_and_numbers(kept), words_and_numbers(now)
            assert words == words_now, "run docs/notebook_outputs.py"
            # Sums in another order, on another processor, change the last digit that is printed.
            assert numbers_now == pytest.approx(numbers, rel=0.05, abs=0.02), "run docs/notebook_outputs.py"
