"""Commands on stores and maps of the hub: they make what they make of the folder, and write nothing there."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _cohorts import MadeCohort, write_cohort
from hub_server import COMMIT, TOKEN, Hub, serving_hub

from histosge.prediction.predict import predict
from histosge.training.train import TrainSettings, train
from histosge_cli import main as command_line

MADE = MadeCohort(sections=4, shape=(17, 19), dim=7, spots=61, genes=5, block=(7, 11), frame=2)
STORE, MAPS = "hf://datasets/lab/store", "hf://datasets/lab/maps"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four sections, a model of them, and its maps."""
    folder = tmp_path_factory.mktemp("hub")
    sheet, store = write_cohort(folder, MADE)
    train(sheet, store, folder / "model", TrainSettings(preset="ridge", intervals=False))
    predict(store, folder / "model", folder / "maps", slide_ids=["S000", "S001"])
    return folder


@pytest.fixture
def hub(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HISTOSGE_CACHE", str(tmp_path / "kept"))
    with serving_hub(monkeypatch, tmp_path / "cache") as found:
        found.add_folder("datasets/lab/store", world / "store")
        found.add_folder("datasets/lab/maps", world / "maps")
        yield found


@pytest.fixture
def histosge(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["histosge", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            command_line.main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        (("view", "STORE", "--expression", "MAPS", "--static", "OUT/page.html"), "page.html"),
        (("figure", "MAPS", "--slide", "S001", "--genes", "G00004,G00000", "OUT/f.svg"), "f.svg"),
        (("export", "MAPS", "OUT/q.geojson", "--to", "qupath", "--slide", "S000"), "q.geojson"),
        (("preview", "STORE", "OUT/seen"), "seen/index.html"),
    ],
)
def test_a_command_makes_of_the_hub_what_it_makes_of_the_folder(
    hub: Hub, world: Path, tmp_path: Path, histosge: Run, arguments: tuple[str, ...], made: str
) -> None:
    places = {
        "there": {"STORE": STORE, "MAPS": MAPS},
        "here": {"STORE": str(world / "store"), "MAPS": str(world / "maps")},
    }
    for name, urls in places.items():
        # Of one name, since some pages state their own.
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        given = [urls.get(word, word).replace("OUT", str(out)) for word in arguments]
        code, _, err = histosge(*given)
        assert code == 0, err
        assert TOKEN not in err

    def text(name: str) -> bytes:
        data = (tmp_path / name / "out" / made).read_bytes()
        for word, url in places[name].items():
            data = data.replace(url.encode(), word.encode())
        # The page's title ends in the store's name, on the hub with its commit.
        return data.replace(f"@{COMMIT}".encode(), b"")

    assert text("there") == text("here")
    assert {line.split(" ")[0] for line in hub.requests} <= {"GET", "POST", "HEAD"}
    # All files of one commit, by its name: a branch that moves on meanwhile changes nothing.
    named = hub.seen("/resolve/")
    assert named == hub.seen(f"/resolve/{COMMIT}/") != []


@pytest.mark.parametrize(
    ("arguments", "place", "upload"),
    [
        (("predict", "STORE", "MODEL", MAPS), MAPS, "hf upload-large-folder"),
        (("embed", "SHEET", STORE), STORE, "hf upload-large-folder"),
        (("train", "SHEET", "STORE", "hf://lab/model"), "hf://lab/model", "hf upload OWNER/NAME FOLDER"),
        (("export", "MAPS", "hf://datasets/lab/x", "--to", "h5ad"), "hf://datasets/lab/x", "hf upload"),
        (
            ("figure", "MAPS", "--genes", "G00000", "hf://datasets/lab/f.png"),
            "hf://datasets/lab/f.png",
            "hf upload",
        ),
        (("preview", "STORE", "hf://datasets/lab/p"), "hf://datasets/lab/p", "hf upload"),
        (("view", "STORE", "--static", "hf://datasets/lab/v.html"), "hf://datasets/lab/v.html", "hf upload"),
        (("evaluate", "SHEET", "STORE", "hf://datasets/lab/r"), "hf://datasets/lab/r", "hf upload"),
        (
            ("analyse", "STORE", "summary", "--out", "hf://datasets/lab/s.parquet"),
            "hf://datasets/lab/s.parquet",
            "hf upload",
        ),
    ],
)
def test_nothing_is_written_to_the_hub(
    hub: Hub,
    world: Path,
    tmp_path: Path,
    histosge: Run,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    place: str,
    upload: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copy(world / "cohort.csv", tmp_path / "cohort.csv")
    words = {"STORE": STORE, "MAPS": MAPS, "MODEL": world / "model", "SHEET": tmp_path / "cohort.csv"}
    code, _, err = histosge(*(words.get(word, word) for word in arguments))
    assert code == 2
    lines = err.strip().splitlines()
    assert len(lines) == 1, err
    assert f"{place} is read-only: nothing is written to the hub; write to a folder" in lines[0]
    assert upload in lines[0]
    # Refused before anything is read, and no folder of such a name was made here.
    assert not hub.requests
    assert not list(tmp_path.glob("hf*"))
