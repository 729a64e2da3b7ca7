"""Arguments that cannot be: one line, exit code 2, and nothing is written. A table of commands and values."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

Histosge = Callable[..., NamedTuple]
SHEET = "data/cohort.csv"
EMBED = ("embed", SHEET, "new", "--encoder", "colour", "--mpp", 1, "--patch", 48)
TRAIN = ("train", SHEET, "store", "new", "--preset", "mean", "--genes", 3)
PREDICT = ("predict", "store", "model", "new")
EVALUATE = ("evaluate", SHEET, "store", "new", "--presets", "mean", "--genes", 3)
LONG = "x" * 300
NUMBERS = [
    (*EMBED, *option)
    for option in (
        *(("--mpp", value) for value in ("inf", "nan", "1e-320", "-1", 0, "1e300", "text")),
        *(("--patch", value) for value in (1, 0, -5, 10**6, 10**12)),
        *(("--stride", value) for value in (1, 0, -1, 10**9)),
        *(("--slide-mpp", value) for value in ("inf", "nan", "1e-320", "-1", 0)),
        *(("--workers", value) for value in (0, -1, 10**6, "all", "1.5")),
        ("--dashboard", 8787),
        *(("--workers", 1, "--dashboard", value) for value in (0, -1, 70000, "text")),
        *(
            ("--scheduler", value)
            for value in ("tls://", "ucx://", "nonsense", "tcp://", "http://a:1", "a:99999")
        ),
    )
]
SETTINGS = [
    (*EMBED, "--compile"),
    *((*TRAIN, "--epochs", value) for value in (0, -1, 99999999999, "text")),
    *((*EVALUATE, "--epochs", value) for value in (0, -1, 99999999999)),
    *((*TRAIN, "--genes", value) for value in (0, -1, ",", "folder", "no_file", "5+nope")),
    *((*EVALUATE, "--genes", value) for value in (0, "folder")),
    *((*EVALUATE, "--seeds", value) for value in (0, -1, 10**9, "text")),
    *((*EVALUATE, "--split", value) for value in ("nonsense", LONG)),
    *((*TRAIN, "--seed", value) for value in (-1, 2**64)),
    (*TRAIN, "--loss", "nonsense"),
    (*TRAIN, "--preset", "nonsense"),
    (*PREDICT, "--workers", 10**6),
    (*PREDICT, "--slide", "S9"),
    (*PREDICT, "--slide", "zarr.json"),
    (*PREDICT, "--slide", "../model"),
    (*PREDICT, "--genes", "nope"),
    *(
        ("export", "maps", "new.geojson", "--to", "geojson", "--slide", "S1", "--domains", n)
        for n in (0, 10**6)
    ),
    *(("analyse", "store", "clusters", "--k", value) for value in (0, -1, 10**6)),
    *(("analyse", "store", "pca", "--components", value) for value in (0, -1, 10**6)),
    *(("view", "store", "--no-open", "--port", value) for value in (-1, 70000)),
    *(("view", "store", "--static", "new", "--tiles-mpp", value) for value in ("inf", "nan", 0, "1e-320")),
    *(
        ("export", "maps", "new", "--to", "ome-zarr", "--picture-mpp", value)
        for value in ("inf", "nan", 0, -1)
    ),
]
NO_STORE = ("/dev/null", "/proc/self/mem", "folder", "file", "pipe", "nowhere", LONG, "", "model", SHEET)
PLACES = [
    *(("ls", place) for place in NO_STORE),
    *(("validate", place) for place in NO_STORE),
    *(("analyse", place, "summary") for place in NO_STORE),
    *(("train", SHEET, place, "new") for place in NO_STORE),
    *(("predict", place, "model", "new") for place in NO_STORE),
    *(("predict", "store", place, "new") for place in (*NO_STORE[:-2], SHEET, "store", "maps")),
    *(
        ("train", place, "store", "new")
        for place in ("/dev/null", "pipe", "nowhere", LONG, "", "store", "model")
    ),
    *(("embed", place, "new") for place in ("/dev/null", "pipe", "nowhere", LONG, "", "store", "maps")),
]
NO_FILE = ("/dev/full", "/proc/x", "folder", "pipe", "file/x", LONG, "", "/")
NO_FOLDER = ("/dev/null", "/proc/x", "file", "pipe", "file/x", LONG, "", "/")
OUTPUTS = [
    *((*TRAIN, "--report", place) for place in NO_FILE),
    *((*TRAIN, "--log", place) for place in (*NO_FILE, "nowhere/x")),
    *((*PREDICT, "--report", place) for place in NO_FILE),
    *((*PREDICT, "--slide", "S1", "--h5ad", place) for place in NO_FILE),
    *(("analyse", "store", "summary", "--out", place) for place in NO_FILE),
    *(("analyse", "store", "pca", "--scores", place) for place in NO_FOLDER[:-1]),
    *((*EMBED[:2], place, *EMBED[3:]) for place in (*NO_FOLDER, "folder", "model", "maps", ".", "data/..")),
    *((*TRAIN[:3], place, *TRAIN[4:]) for place in (*NO_FOLDER, "folder", "store", ".", "data/..")),
    *((*PREDICT[:3], place) for place in (*NO_FOLDER, "folder", "store", "model", ".")),
    *((*EVALUATE[:3], place, *EVALUATE[4:]) for place in NO_FOLDER[:-1]),
    *(
        ("export", "maps", place, "--to", "h5ad")
        for place in ("/dev/null", "/proc/x", "pipe", "file/x", LONG, "")
    ),
    *(("view", "store", "--static", place) for place in (*NO_FOLDER, "folder", "store")),
    *(("demo", "--out", place) for place in (*NO_FOLDER, "folder", "store", ".")),
]


def _name(command: tuple[object, ...]) -> str:
    return " ".join(str(word)[:20] or "''" for word in command).replace("/", "|")


def _everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("command", [*NUMBERS, *SETTINGS, *PLACES, *OUTPUTS], ids=_name)
def test_it_is_refused_in_one_line_and_nothing_is_written(
    histosge: Histosge, world: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...]
) -> None:
    monkeypatch.chdir(world)
    before = _everything(world)
    code, out, err = histosge(*command, "--quiet") if command[0] in QUIET else histosge(*command)
    assert (code, out) == (2, ""), err
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1, err
    assert len(err) < 800
    assert _everything(world) == before


QUIET = ("embed", "train", "predict", "evaluate", "view", "demo", "analyse")


@pytest.mark.parametrize(
    ("command", "order"),
    [
        (("train", "store", SHEET, "new"), "the order is: histosge train SAMPLES STORE MODEL"),
        (
            ("train", SHEET, "new", "store"),
            "store is a feature store; the order is: histosge train SAMPLES STORE MODEL",
        ),
        (("evaluate", "store", SHEET, "new"), "the order is: histosge evaluate SAMPLES STORE REPORT_DIR"),
        (("predict", "model", "store", "new"), "the order is: histosge predict STORE MODEL OUT"),
        (("embed", "store", SHEET), "the order is: histosge embed SAMPLES STORE"),
        (("ls", SHEET), "data/cohort.csv is a file; the order is: histosge ls STORE"),
    ],
)
def test_arguments_in_the_wrong_order_are_shown_the_right_one(
    histosge: Histosge, world: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[object, ...], order: str
) -> None:
    monkeypatch.chdir(world)
    code, _, err = histosge(*command)
    assert code == 2
    # What stands before the command is how this process was started.
    assert re.sub(r"(is: ).*?(?=[a-z]+ [A-Z])", r"\1", err).find(order.replace("histosge ", "")) > 0, err
